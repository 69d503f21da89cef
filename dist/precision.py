"""Which dtypes parameters, compute and optimizer have, and what they turned out to be.

    name         parameters  compute  reductions  needs
    fp32         fp32        fp32     fp32
    bf16-mixed   fp32        bf16     fp32 (of fp32 gradients)
    fp16-mixed   fp32        fp16     fp32        a gradient scaler (dist.gradient_scaler)
    bf16-true    bf16        bf16     fp32        fsdp or hsdp, and optim.stochastic_rounding

AdamW's moments are fp32 in all of them unless optim.state_dtype says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from dist.errors import ConfigError

PrecisionName = Literal["auto", "fp32", "bf16-mixed", "bf16-true", "fp16-mixed"]
_COMPUTE = {
    "fp32": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "fp16-mixed": torch.float16,
}
# With AVX512-BF16 alone a matmul ran 3.8x as fast and a whole step at 0.8x: casts and elementwise
# work eat the gain. A CPU without bf16 units at all emulates them, 200 times slower.
_CPU_FLAG = "amx_bf16"


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A decided precision and the reason for it."""

    name: Literal["fp32", "bf16-mixed", "bf16-true", "fp16-mixed"]
    reason: str

    @property
    def compute_dtype(self) -> torch.dtype:
        return _COMPUTE[self.name]

    @property
    def param_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.name == "bf16-true" else torch.float32

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """For autocast, where no sharding policy owns the dtypes; None: leave it off."""
        return self.compute_dtype if self.name.endswith("-mixed") else None

    @property
    def needs_scaler(self) -> bool:
        """fp16 has no exponents below 2**-24: small gradients are 0 unless the loss is scaled."""
        return self.name == "fp16-mixed"

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def check_precision(name: PrecisionName, strategy: str, stochastic_rounding: bool) -> None:
    """ConfigError where a precision would train wrongly with this strategy or optimizer."""
    if name == "bf16-true" and not stochastic_rounding:
        raise ConfigError(
            "precision bf16-true with plain AdamW: bf16 numbers are 0.4 % to 0.8 % apart, so "
            "updates smaller than half of that are rounded away and training stops in silence. "
            "Set optim.stochastic_rounding true, or use bf16-mixed (fp32 parameters)"
        )
    if name == "bf16-true" and strategy not in ("fsdp", "hsdp"):
        raise ConfigError(
            f"precision bf16-true with parallel.strategy {strategy}: it would sum bf16 gradients "
            "in bf16, over micro-batches and ranks; fsdp and hsdp sum them in fp32"
        )
    if name == "fp16-mixed" and strategy == "deepspeed":
        raise ConfigError(
            "precision fp16-mixed with parallel.strategy deepspeed: its engine steps the "
            "optimizer itself and knows nothing of our gradient scaler; use bf16-mixed or fsdp"
        )
    if stochastic_rounding and name != "bf16-true":
        raise ConfigError(
            f"optim.stochastic_rounding with precision {name}: parameters are fp32 and nothing is "
            "rounded; leave it out, or set precision bf16-true"
        )


def decide_precision(name: PrecisionName, device: torch.device) -> Precision:
    """Resolve `auto` by the hardware; the reason names the probe that decided."""
    if name != "auto":
        if name not in _COMPUTE:
            raise ConfigError(
                f"precision is {name!r}; it must be auto, fp32, bf16-mixed, bf16-true or fp16-mixed"
            )
        return Precision(name=name, reason="as configured")
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


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters to `dtype`, in place and before sharding; buffers (rotary frequencies) stay."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def found_dtypes(
    module: nn.Module, optimizer: torch.optim.Optimizer, autocast: torch.dtype | None
) -> dict[str, str]:
    """Dtypes of the tensors that are there after a step, before gradients are dropped.

    All ranks call it: under FSDP one block's parameters are gathered, to see what computes.
    """
    parameters = list(module.parameters())
    states = [
        tensor
        for state in optimizer.state.values()
        for key, tensor in state.items()
        if key != "step" and isinstance(tensor, torch.Tensor)
    ]
    gradients = [p.grad for p in parameters if p.grad is not None]
    compute, reduce = _compute_and_reduce(module, autocast)
    return {
        "parameters": _names(parameters),
        "compute": _name(compute),
        "reduce": _name(reduce) if reduce is not None else _names(gradients),
        "gradients": _names(gradients),
        "optimizer_state": _names(states),
    }


def _compute_and_reduce(
    module: nn.Module, autocast: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype | None]:
    """Dtype of a matrix product with a real weight, and of FSDP's reduction (None without)."""
    sharded = [m for m in module.modules() if isinstance(m, FSDPModule)]
    # A block, not the root, which comes first: its weights are a matrix or two of one layer.
    owner: Any = sharded[min(1, len(sharded) - 1)] if sharded else module
    if sharded:
        owner.unshard()
    weight = next(p for p in owner.parameters() if p.ndim == 2).detach()
    with torch.autocast(weight.device.type, autocast, enabled=autocast is not None):
        compute = torch.mm(weight.new_zeros(1, weight.shape[1]), weight.t()).dtype
    if not sharded:
        return compute, None
    group = owner._get_fsdp_state()._fsdp_param_group
    owner.reshard()
    return compute, group._reduce_dtype or compute


def _names(tensors: Any) -> str:
    return "+".join(sorted({_name(tensor.dtype) for tensor in tensors})) or "none"


def _name(dtype: torch.dtype) -> str:
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return short.get(dtype, str(dtype).removeprefix("torch."))
