"""AdamW for bf16 parameters: computed in fp32, stored with stochastic rounding.

A bf16 number has 8 bits of fraction: an update below 0.2-0.4 % of a weight is lost by rounding to
nearest, always. Rounding up with the probability of what is cut off keeps the expected value, so
small updates add up (Gupta et al., arXiv 1502.02551; for bf16 training Zamirai et al.,
arXiv 2010.06192). No fp32 copy of the weights is held.

The noise is a hash of (element's place in the full parameter, step, parameter): replicas round
alike, any number of ranks gives the same bits, and a resumed run repeats those of an
uninterrupted one. No generator, no host sync.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with the keys of torch's: step, exp_avg,
    exp_avg_sq. Honours `found_inf` like torch's fused optimizers: such a step changes nothing."""

    _step_supports_amp_scaling = True  # how torch says so

    def __init__(
        self, groups: Iterable[dict[str, Any]], *,
        lr: float, betas: tuple[float, float], eps: float, state_dtype: torch.dtype, seed: int,
    ) -> None:  # fmt: skip
        super().__init__(list(groups), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._state_dtype, self._seed = state_dtype, seed
        parameters = [one for group in self.param_groups for one in group["params"]]
        self._parts = {id(one): _part(one) for one in parameters}
        """By id of a parameter: shape and offset of its local part."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._update(parameter, group, number)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter, dtype=self._state_dtype)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        goes = None if found_inf is None else found_inf == 0
        state["step"] += 1 if goes is None else goes
        step = state["step"]
        beta1, beta2 = group["betas"]
        weight, grad = _local(parameter), _local(parameter.grad).float()  # type: ignore[arg-type]
        kept = _local(state["exp_avg"]), _local(state["exp_avg_sq"])
        mean = kept[0].float().lerp(grad, 1 - beta1)
        square = kept[1].float().mul(beta2).addcmul(grad, grad, value=1 - beta2)
        spread = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        new = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
        new -= mean.div(spread).mul_(group["lr"] / (1 - beta1**step))
        place = _place(parameter, *self._parts[id(parameter)])
        for role, (target, value) in enumerate(((weight, new), (kept[0], mean), (kept[1], square))):
            if goes is not None:
                value = torch.where(goes, value, target.float())
            if target.dtype == torch.bfloat16:
                salt = _key(self._seed, number, role)
                value = round_stochastically(value, hashed_bits(place, step, salt))
            target.copy_(value)


def round_stochastically(value: Tensor, bits: Tensor) -> Tensor:
    """fp32 `value` to bf16: up or down with the probability of what is cut off.

    bits: int32 of the same shape, uniform in [0, 2**16). What bf16 can hold stays as it is.
    """
    # bf16 is the upper half of fp32's bits; a carry out of the lower half rounds away from 0.
    raised = (value.contiguous().view(torch.int32) + bits) & ~0xFFFF
    return torch.where(value.isfinite(), raised.view(torch.float32), value).to(torch.bfloat16)


def hashed_bits(place: Tensor, step: Tensor, key: int) -> Tensor:
    """16 bits per element, by murmur3's finaliser of place, step and key; int32, wrapping."""
    mixed = place * -1640531535 + (step.to(torch.int32) * 668265263 + key)
    mixed = (mixed ^ ((mixed >> 16) & 0xFFFF)) * -2048144789
    mixed = (mixed ^ ((mixed >> 13) & 0x7FFFF)) * -1028477387
    return (mixed ^ (mixed >> 16)) & 0xFFFF


def _part(parameter: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of a parameter's local part."""
    if not isinstance(parameter, DTensor):
        return tuple(parameter.shape), (0,) * parameter.ndim
    # It reads numbers from tensors of its own: once, and not from fake ones in a plan.
    with unset_fake_temporarily():
        return compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )


def _place(parameter: Tensor, shape: tuple[int, ...], offset: tuple[int, ...]) -> Tensor:
    """Index of each local element in the full parameter, flattened; int32, wraps past 2**31."""
    full = tuple(parameter.shape)
    place = torch.zeros((), dtype=torch.int32, device=_local(parameter).device)
    stride = 1
    for dim in reversed(range(len(full))):
        along = torch.arange(shape[dim], dtype=torch.int64, device=place.device) + offset[dim]
        along = (along * stride).to(torch.int32)
        place = place + along.view(-1, *[1] * (len(full) - 1 - dim))
        stride *= full[dim]
    return place.expand(shape)


def _key(seed: int, number: int, role: int) -> int:
    """31 bits that differ between the seed's runs, parameters and roles."""
    digest = hashlib.blake2b(f"{seed}/{number}/{role}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
