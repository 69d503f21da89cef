"""dist/precision.py: auto says what decided it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dist.precision
from dist.errors import ConfigError
from dist.initialise import materialise
from dist.mesh import data_mesh
from dist.optim import OptimConfig, adamw
from dist.precision import (
    Precision,
    cast_parameters,
    check_precision,
    cpu_flags,
    decide_precision,
    found_dtypes,
)
from dist.sharding import shard_fsdp
from recipes import llama
from tests.run_ranks import run_ranks
from tests.test_dist_attention import CONFIG, SCHEMA, packed_and_padded

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
    assert decide_precision("bf16-true", CPU).param_dtype == torch.bfloat16
    assert decide_precision("fp16-mixed", CPU).autocast_dtype == torch.float16
    with pytest.raises(ConfigError, match="bf17"):
        decide_precision("bf17", CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "strategy", "rounding", "said"),
    [
        ("bf16-true", "fsdp", False, "optim.stochastic_rounding"),
        ("bf16-true", "ddp", True, "fsdp and hsdp sum them in fp32"),
        ("fp16-mixed", "deepspeed", False, "gradient scaler"),
        ("fp32", "fsdp", True, "nothing is rounded"),
    ],
)
def test_what_would_train_wrongly_is_refused(
    name: str, strategy: str, rounding: bool, said: str
) -> None:
    """bf16 weights under plain AdamW stop learning without any error."""
    with pytest.raises(ConfigError, match=said):
        check_precision(name, strategy, rounding)  # type: ignore[arg-type]
    check_precision("bf16-true", "hsdp", True)


def dtypes_of_a_step(name: str, sharded: bool) -> tuple[dict[str, str], bool]:
    """found_dtypes after a real step, and whether the rotary frequencies stayed fp32."""
    precision = Precision(name=name, reason="test")  # type: ignore[arg-type]
    net = llama.build(CONFIG, SCHEMA)
    cast_parameters(net, precision.param_dtype)
    if sharded:
        shard_fsdp(net, llama.blocks(net), data_mesh(CPU), precision)
    llama.set_precision(net, precision, by_policy=sharded)
    materialise(net, CPU, 0, 0.02)
    optimizer = adamw(net.named_parameters(), OptimConfig(stochastic_rounding=name == "bf16-true"))
    batch, _ = packed_and_padded()
    net(batch).backward()
    optimizer.step()
    found = found_dtypes(net, optimizer, net.autocast_dtype)
    net(batch).backward()  # one block was gathered to look at it: training must go on
    return found, all(buffer.dtype == torch.float32 for buffer in net.buffers())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # parameters, compute, reduce, gradients, optimizer state
        ("fp32", "fp32 fp32 fp32 fp32 fp32"),
        ("bf16-mixed", "fp32 bf16 fp32 fp32 fp32"),
        ("fp16-mixed", "fp32 fp16 fp32 fp32 fp32"),
        ("bf16-true", "bf16 bf16 fp32 bf16 fp32"),
    ],
)
def test_dtypes_of_the_real_tensors(name: str, expected: str) -> None:
    """A policy that reduces or keeps moments in 16 bits costs accuracy that nobody sees; rotary
    frequencies in bf16 break long contexts."""
    for found, buffers_wide in run_ranks(dtypes_of_a_step, 2, 240, name, True):
        assert " ".join(found.values()) == expected and buffers_wide
    if name != "bf16-true":
        found, _ = dtypes_of_a_step(name, False)
        assert " ".join(found.values()) == expected
