"""Which dtype computes: fp32, or bf16 with fp32 parameters and reductions."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch

PrecisionName = Literal["auto", "fp32", "bf16-mixed"]
# Casts and elementwise work eat the gain: with a matmul probe of 3.8x (AVX512-BF16) a whole step
# ran at 0.8x of fp32. AMX gives ten times and more; a CPU without bf16 units is far slower.
_MIN_BF16_SPEED = 6.0


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A decided precision and the reason for it."""

    name: Literal["fp32", "bf16-mixed"]
    reason: str

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.name == "bf16-mixed" else torch.float32

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def decide_precision(name: PrecisionName, device: torch.device) -> Precision:
    """Resolve `auto` by the hardware; the reason names the probe that decided."""
    if name == "fp32" or name == "bf16-mixed":
        return Precision(name=name, reason="as configured")
    if name != "auto":
        raise ValueError(f"precision is {name!r}; it must be auto, fp32 or bf16-mixed")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return Precision(
                name="bf16-mixed", reason=f"auto: compute capability {major}.{minor} has bf16 units"
            )
        return Precision(
            name="fp32", reason=f"auto: compute capability {major}.{minor} has no bf16 units"
        )
    speed = bf16_speed_on_cpu()
    name_by_probe: Literal["fp32", "bf16-mixed"] = (
        "bf16-mixed" if speed >= _MIN_BF16_SPEED else "fp32"
    )
    return Precision(
        name=name_by_probe, reason=f"auto: bf16 matmul probe {speed:.2f}x of fp32 on this CPU"
    )


def bf16_speed_on_cpu(size: int = 256) -> float:
    """Speed of a bf16 matmul over that of an fp32 one; below 1 where the CPU emulates it."""
    return _best_matmul_s(size, torch.float32) / _best_matmul_s(size, torch.bfloat16)


def _best_matmul_s(size: int, dtype: torch.dtype, repeats: int = 3) -> float:
    # Constant input: no random state is touched.
    a = torch.full((size, size), 0.5, dtype=dtype)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return min(times[1:])
