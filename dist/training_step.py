"""One optimizer step, as every recipe's LightningModule takes it; nothing here knows Lightning."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor, nn

from dist.batch import Batch
from dist.gradient_scaler import GradientScaler
from dist.guard import Guard
from dist.loss import loss_scale
from dist.mesh import Layout
from dist.sharding import clip_grad_norm


class StepModule(Protocol):
    """What these functions read and set of a recipe's module."""

    config: Any
    layout: Layout
    guard: Guard
    scaler: GradientScaler | None
    grad_norm: Any
    net: nn.Module


def scaled_loss(
    module: StepModule, batch: Batch, loss_sum: Tensor, num_micro: int
) -> dict[str, Tensor]:
    """What training_step returns: `loss` to call backward on, and the detached `loss_sum`.

    num_micro: by what Lightning divides, also in a last short step of fewer micro-batches.
    """
    module.guard.saw(batch, loss_sum)
    loss = loss_sum * loss_scale(batch.step_targets, module.layout.dp_size, num_micro)
    loss = loss * module.scaler.scale if module.scaler is not None else loss
    return {"loss": loss, "loss_sum": loss_sum.detach()}


def clip_and_judge(module: StepModule, optimizer: Any, device: torch.device) -> None:
    """Before the optimizer's step: clip by the global norm, and suppress a bad step's update."""
    if module.config.parallel.strategy == "deepspeed":
        module.guard.check(None, torch.zeros((), device=device))  # it clips in its engine
        return
    if module.scaler is not None:
        module.scaler.unscale(module.net.parameters())
    norm = clip_grad_norm(module.net.parameters(), module.config.optim.clip_norm)
    module.grad_norm = norm
    # An overflow in fp16 is the scale's business.
    judged = norm if module.scaler is None else norm.nan_to_num(0.0, posinf=0.0)
    bad = module.guard.check(optimizer, judged)
    if module.scaler is not None:
        module.scaler.skip(optimizer, norm, bad)


class ValidationLoss:
    """Mean loss over the valid targets of all ranks, nats a token."""

    def __init__(self, device: torch.device, counts: bool) -> None:
        """counts: of ranks that share rows one counts."""
        # Sums over this rank's rows: loss, valid targets.
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._counts = counts

    def add(self, loss_sum: Tensor, batch: Batch) -> None:
        """A micro-batch's."""
        self._sums += torch.stack((loss_sum.double(), batch.valid.sum().double())) * self._counts

    def mean(self, world_size: int) -> tuple[float, int]:
        """(loss, targets); all ranks call it."""
        if world_size > 1:
            torch.distributed.all_reduce(self._sums)
        loss, targets = self._sums.tolist()
        return loss / max(targets, 1.0), int(targets)
