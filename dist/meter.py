"""How fast a run is, against what its device could do, and what holds it up.

MFU (model FLOPs utilisation, Chowdhery et al., "PaLM", 2022, appendix B) = tokens/s x FLOPs a
token / peak. A token's forward and backward need 6 FLOPs a parameter of a matmul, and attention
12 x layers x width x sequence length more; half of that where the mask is causal. Published
numbers use either convention, so both are given. Recomputed activations do not count, nor do the
shorter reaches of packed documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist.devices import device_of_name
from dist.errors import ConfigError
from dist.local_device import matmul_flops

PEAK_SOURCE = "the maker's data sheet, dense"
# Shares of a step from which on something other than computing is worth naming.
DATA_BOUND = 0.05
COMMUNICATION_BOUND = 0.20
INTERRUPTED = 0.10


@dataclass(frozen=True, kw_only=True)
class MeterConfig:
    """Speed: what is measured, and how often a verdict is printed."""

    every_min: float = 10.0
    """Minutes between verdicts; one comes at the end too. 0: none."""
    peak_tflops: float = 0.0
    """What one device can do, for MFU; 0: by the device's name, or measured on a CPU."""

    def __post_init__(self) -> None:
        if self.every_min < 0 or self.peak_tflops < 0:
            raise ConfigError("meter: every_min and peak_tflops must not be negative")


@dataclass(frozen=True, kw_only=True)
class Peak:
    """FLOP/s of one rank's device, and where the number comes from."""

    flops: float
    """0 if unknown."""
    source: str


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """FLOPs of a token's forward and backward, in both conventions."""

    full: float
    """Attention counted over the whole sequence."""
    causal: float
    """Attention counted over half of it."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a run did over a stretch of time."""

    tokens_per_s: float
    step_s: float
    data_share: float
    """Part of the step time in which the rank that waits longest waits for data."""
    communication_share: float | None
    """Part in which the rank that waits longest waits for others, mean over the steps that were
    logged; None where it is not measured."""
    outside_share: float
    """Part of the wall time outside of steps: validation and saves."""
    mfu: float | None
    mfu_causal: float | None
    peak_memory_gib: float
    not_measured: str = ""
    """Why there is no communication_share."""


def token_flops(
    named_parameters: Iterable[tuple[str, Tensor]], *, num_layers: int, width: int, seq_len: int,
    tied: bool, embedding: str = "embed_tokens.weight",
) -> TokenFlops:  # fmt: skip
    """FLOPs a token of a decoder. Parameters without a matmul do not count: norms, and the input
    embedding unless it is the output matrix too. A frozen one has no gradient: 4 FLOPs instead
    of 6. width = heads x head size."""
    # ZeRO-3 leaves empty tensors and keeps the shape beside them.
    shapes = [(n, getattr(p, "ds_shape", p.shape), p.requires_grad) for n, p in named_parameters]
    matmul = sum(
        math.prod(shape) * (6.0 if trained else 4.0)
        for name, shape, trained in shapes
        if len(shape) >= 2 and (tied or not name.endswith(embedding))
    )
    attention = 12.0 * num_layers * width * seq_len
    return TokenFlops(full=matmul + attention, causal=matmul + attention / 2)


def device_peak(device: torch.device, dtype: torch.dtype, config: MeterConfig) -> Peak:
    """What MFU divides by: as configured, by the GPU's name, or a matmul timed on this CPU."""
    if config.peak_tflops:
        return Peak(flops=config.peak_tflops * 1e12, source="meter.peak_tflops")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return named_peak(name, dtype)
    flops = matmul_flops(dtype, 768)
    threads = torch.get_num_threads()
    return Peak(flops=flops, source=f"a {dtype} matmul measured on {threads} threads of this rank")


def named_peak(name: str, dtype: torch.dtype) -> Peak:
    """Peak of a GPU by its name; flops 0 if the table lacks it, or the type's units."""
    device = device_of_name(name)
    if device is None:
        return Peak(flops=0.0, source=f"no peak known for {name}; set meter.peak_tflops")
    if dtype not in (torch.bfloat16, torch.float16):
        return Peak(flops=device.fp32_flops, source=f"{device.name}: {PEAK_SOURCE}")
    if dtype == torch.bfloat16 and device.half != "bf16":
        source = f"{device.name} has no bf16 units; set meter.peak_tflops"
        return Peak(flops=0.0, source=source)
    return Peak(flops=device.bf16_flops, source=f"{device.name}: {PEAK_SOURCE}")


def mfu(tokens_per_s: float, flops: float, peak: Peak, num_devices: int) -> float | None:
    """Model FLOPs utilisation; None without a peak."""
    if not peak.flops:
        return None
    return tokens_per_s * flops / (peak.flops * num_devices)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ddp_communication_s(module: Any) -> float | None:
    """Seconds of a step's backward in which DDP waits for gradients of other ranks.

    From DDP's own timers (10 first steps, then every 100th); None before it has any.
    """
    times = module._get_ddp_logging_data()
    total = times.get("avg_backward_comm_time")
    if not total:
        return None
    return max(0.0, total - times.get("avg_backward_compute_comm_overlap_time", 0)) / 1e9


def verdict(speed: Speed, peak: Peak) -> str:
    """One line: how fast, what holds it up, and the knob to turn."""
    facts = [f"{speed.tokens_per_s:,.0f} tokens/s", f"step {_seconds(speed.step_s)}"]
    if speed.mfu is not None and speed.mfu_causal is not None:
        facts.append(
            f"MFU {speed.mfu:.1%} ({speed.mfu_causal:.1%} causal) of "
            f"{peak.flops / 1e12:,.3g} TFLOP/s a rank [{peak.source}]"
        )
    else:
        facts.append(f"no MFU: {peak.source}")
    facts.append(f"data wait {speed.data_share:.0%}")
    if speed.communication_share is None:
        why = f" ({speed.not_measured})" if speed.not_measured else ""
        facts.append(f"communication not measured{why}")
    else:
        facts.append(f"communication {speed.communication_share:.0%}")
    facts.append(f"outside of steps {speed.outside_share:.0%}")
    facts.append(f"peak memory {speed.peak_memory_gib:.2f} GiB")
    return f"{held_up_by(speed)} ({', '.join(facts)})"


def held_up_by(speed: Speed) -> str:
    """What costs most besides computing, and what to do about it."""
    communication = speed.communication_share or 0.0
    # Each by how far it is above what is usual.
    shares = {
        "data": speed.data_share / DATA_BOUND,
        "communication": communication / COMMUNICATION_BOUND,
        "outside": speed.outside_share / INTERRUPTED,
    }
    worst = max(shares, key=lambda name: shares[name])
    if shares[worst] < 1.0:
        return "compute-bound: more rows a micro-batch (micro_batch), where memory allows"
    if worst == "data":
        return (
            f"data-bound {speed.data_share:.0%}: put the dataset on a disk of the node, or leave "
            "a core free for the loader's thread (OMP_NUM_THREADS)"
        )
    if worst == "communication":
        return (
            f"communication-bound {communication:.0%}: larger steps between reductions "
            "(global_batch), or fewer ranks"
        )
    return (
        f"interrupted {speed.outside_share:.0%} of the time: validate and save less often "
        "(val_every_steps, val_rows, save_every_steps)"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"
