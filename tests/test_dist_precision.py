"""dist/precision.py: auto says what decided it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dist.precision
from dist.precision import cpu_flags, decide_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "name", "reason"),
    [
        ("fpu avx2 avx512_bf16", "fp32", "no amx_bf16"),
        ("fpu avx512_bf16 amx_bf16 amx_tile", "bf16-mixed", "has amx_bf16"),
        ("", "fp32", "no amx_bf16"),
    ],
)
def test_auto_names_what_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, name: str, reason: str
) -> None:
    """bf16 on a CPU that emulates it runs 200 times slower; a timing probe decided otherwise on
    the restart of a run, when the machine was busy, and its losses changed."""
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    found = cpu_flags(tmp_path / "cpuinfo")
    monkeypatch.setattr(dist.precision, "cpu_flags", lambda: found)
    precision = decide_precision("auto", CPU)
    assert precision.name == name
    assert reason in str(precision)


def test_a_machine_without_cpuinfo_has_no_flags(tmp_path: Path) -> None:
    """Not every kernel shows one."""
    assert cpu_flags(tmp_path / "absent") == set()


def test_configured_names_are_kept_and_others_refused() -> None:
    """A typo must not fall back to another precision."""
    assert decide_precision("bf16-mixed", CPU).compute_dtype == torch.bfloat16
    assert decide_precision("fp32", CPU).compute_dtype == torch.float32
    with pytest.raises(ValueError, match="bf17"):
        decide_precision("bf17", CPU)  # type: ignore[arg-type]
