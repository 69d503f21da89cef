"""The loss scale of fp16-mixed, as a module, so that checkpoints hold it like any buffer.

torch.amp.GradScaler keeps its scale outside the model, looks for infinities with one all-reduce
per mesh, and waits for the answer on the host every step. Here the global gradient norm, which
clipping computes anyway and which is equal on all ranks, says whether a gradient overflowed; the
fused optimizer skips the update on the device, and the host learns nothing and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# The values of torch.amp.GradScaler: halve after an overflow, double after 2,000 steps without.
FIRST_SCALE, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000


class GradientScaler(nn.Module):
    """Scale the loss, undo it on the gradients, then skip() an overflowed update and adapt.

    A skipped update moves neither parameters nor moments; the learning rate's step and the data
    go on.
    """

    scale: Tensor
    growth_tracker: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((), FIRST_SCALE, device=device))
        # Steps since the last change of the scale.
        self.register_buffer("growth_tracker", torch.zeros((), dtype=torch.int32, device=device))

    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide the gradients by the scale, in place; call it before clipping."""
        grads = [p.grad for p in parameters if p.grad is not None]
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        if local:
            torch._foreach_mul_(local, self.scale.reciprocal())

    def skip(self, optimizer: Any, norm: Tensor, bad: Tensor | None = None) -> None:
        """Tell a fused optimizer whether to leave this update out; then adapt the scale.

        norm: global norm of the unscaled gradients, equal on all ranks; bad: 1 where the guard
        leaves the update out for a reason of its own.
        """
        found_inf = (~torch.isfinite(norm)).to(torch.float32)
        optimizer.found_inf = found_inf if bad is None else torch.maximum(found_inf, bad)
        torch._amp_update_scale_(
            self.scale, self.growth_tracker, found_inf, GROWTH, BACKOFF, GROWTH_INTERVAL
        )
