"""Which dtype computes: fp32, or bf16 with fp32 parameters and reductions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

PrecisionName = Literal["auto", "fp32", "bf16-mixed"]
# With AVX512-BF16 alone a matmul ran 3.8x as fast and a whole step at 0.8x: casts and elementwise
# work eat the gain. A CPU without bf16 units at all emulates them, 200 times slower.
_CPU_FLAG = "amx_bf16"


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
    # By flag and not by a timing: a probe on a busy machine would decide otherwise on a restart.
    if _CPU_FLAG in cpu_flags():
        return Precision(name="bf16-mixed", reason=f"auto: this CPU has {_CPU_FLAG}")
    return Precision(name="fp32", reason=f"auto: this CPU has no {_CPU_FLAG}")


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Instruction sets that the kernel names for this CPU; empty where it names none."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    flags = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return set(next(flags, "").split())
