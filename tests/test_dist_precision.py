"""dist/precision.py: auto says what decided it."""

from __future__ import annotations

import pytest
import torch

import dist.precision
from dist.precision import decide_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("speed", "name"), [(0.03, "fp32"), (3.8, "fp32"), (12.0, "bf16-mixed")])
def test_auto_names_its_probe(monkeypatch: pytest.MonkeyPatch, speed: float, name: str) -> None:
    """bf16 chosen on a CPU that emulates it ran 200 times slower, silently."""
    monkeypatch.setattr(dist.precision, "bf16_speed_on_cpu", lambda: speed)
    precision = decide_precision("auto", CPU)
    assert precision.name == name
    assert f"auto: bf16 matmul probe {speed:.2f}x of fp32" in str(precision)


def test_the_probe_measures_something() -> None:
    """A probe that divides by zero or returns 0 would decide at random."""
    assert 1e-4 < dist.precision.bf16_speed_on_cpu(64) < 1e4


def test_configured_names_are_kept_and_others_refused() -> None:
    """A typo must not fall back to another precision."""
    assert decide_precision("bf16-mixed", CPU).compute_dtype == torch.bfloat16
    assert decide_precision("fp32", CPU).compute_dtype == torch.float32
    with pytest.raises(ValueError, match="bf17"):
        decide_precision("bf17", CPU)  # type: ignore[arg-type]
