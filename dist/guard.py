"""Bad steps: non-finite values and spikes are found on the device, and their update is suppressed.

The verdict on a step is computed from all-reduced values, so it is the same on all ranks, and
fused AdamW obeys it on the device (`found_inf`): in the step itself, with nothing waiting. The
host learns of it by a copy that it reads one step later. Other optimizers are asked through the
host, one wait a step. A suppressed step changes neither weights nor optimizer state, Adam's own
step count included; the learning rate and the data go on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor

from dist.batch import Batch
from dist.errors import ConfigError, LeydenError

HISTORY_STEPS = 64
"""Accepted steps that the running median is taken of."""
MIN_HISTORY = 16
"""Fewer accepted steps than this set no limit."""
REASONS = ("loss is not finite", "gradient norm is not finite", "loss spike", "gradient norm spike")


class GuardTripped(LeydenError):
    """A bad step that the policy does not pass over. The same restart would meet it again."""

    exit_code = 93


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens at a step whose loss or gradient norm is not finite, or far above its median."""

    policy: Literal["off", "raise", "skip", "rollback"] = "raise"
    """raise: end the run; skip: go on without the update; rollback: go back to the newest
    checkpoint and leave the step's rows out; off: no guard."""
    spike_factor: float = 0.0
    """A gradient norm above this many times its running median is a spike; 0: none is."""
    loss_spike_factor: float = 0.0
    """A loss above this many times its running median is a spike; 0: none is."""
    max_skips: int = 5
    """Skipped steps among the last `window_steps` that are too many: the run ends."""
    window_steps: int = 100
    """Steps in which max_skips counts."""
    max_rollbacks: int = 3
    """Times that a run goes back; then it ends."""
    rollback_skip_steps: int = 1
    """Steps whose rows a rollback leaves out, from the bad one on."""
    check_replicas_every: int = 100
    """Steps between comparisons of the replicas' weights, bit for bit (ddp, hsdp, tp); 0: none."""

    def __post_init__(self) -> None:
        for name in ("spike_factor", "loss_spike_factor"):
            value = getattr(self, name)
            if not (value == 0 or (math.isfinite(value) and value > 1)):
                raise ConfigError(f"guard.{name} is {value}; it must be above 1, or 0 for off")
        for name in ("max_skips", "window_steps", "rollback_skip_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"guard.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_rollbacks", "check_replicas_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"guard.{name} is {getattr(self, name)}; it must be 0 or more")


def check_guard(config: GuardConfig, strategy: str) -> None:
    """ConfigError where a policy cannot work with a strategy."""
    if config.policy == "skip" and strategy == "deepspeed":
        raise ConfigError(
            "guard.policy skip under parallel.strategy deepspeed: its engine applies the update "
            "itself and cannot be told to leave one out; use raise or rollback, or fsdp"
        )


@dataclass(frozen=True, kw_only=True)
class BadStep:
    """A step whose update was suppressed; the same on all ranks but for `losses`."""

    step: int
    reasons: tuple[str, ...]
    loss: float
    """Mean over the step's targets, nats."""
    grad_norm: float
    """Global norm before clipping."""
    loss_limit: float
    """Above it a loss is a spike; inf: no limit."""
    grad_norm_limit: float
    losses: tuple[float, ...]
    """Loss sum of each micro-batch of this rank, nats."""

    @property
    def text(self) -> str:
        limits = [
            f"{name} {limit:.4g}"
            for name, limit in (("loss", self.loss_limit), ("norm", self.grad_norm_limit))
            if math.isfinite(limit)
        ]
        return (
            f"step {self.step}: {', '.join(self.reasons)} (loss {self.loss:.4g}, gradient norm "
            f"{self.grad_norm:.4g}{'; limits: ' + ', '.join(limits) if limits else ''})"
        )


class Guard:
    """Judges every step on the device. All ranks make the same calls."""

    def __init__(
        self, config: GuardConfig, device: torch.device, *, world_size: int, counts: bool = True,
        lag: int | None = None,
    ) -> None:  # fmt: skip
        """counts: whether this rank's losses enter the sum (one rank of each tensor-parallel
        group); lag: steps after which the host looks at a verdict (None: 1 beside a GPU, else 0).
        """
        self.config = config
        self.enabled = config.policy != "off"
        self._device, self._world_size, self._counts = device, world_size, counts
        self._lag = lag if lag is not None else int(device.type == "cuda")
        # recent: (2, HISTORY_STEPS) loss and norm of accepted steps, a ring; NaN where empty.
        self._recent = torch.full((2, HISTORY_STEPS), math.nan, device=device)
        self._accepted = torch.zeros((), dtype=torch.int64, device=device)
        factors = [config.loss_spike_factor or math.inf, config.spike_factor or math.inf]
        self._factors = torch.tensor(factors, device=device)
        self._losses: list[Tensor] = []
        self._step, self._step_targets = 0, 0
        self._pending: deque[_Report] = deque()

    def saw(self, batch: Batch, loss_sum: Tensor) -> None:
        """A micro-batch and its loss sum on this rank, nats; a scalar on the device."""
        self._step, self._step_targets = batch.step, batch.step_targets
        if batch.micro == 0:
            self._losses = []  # of a step that was left, or of a trial
        if self.enabled:
            self._losses.append(loss_sum.detach())

    @torch.no_grad()
    def check(self, optimizer: torch.optim.Optimizer | None, grad_norm: Tensor) -> Tensor | None:
        """Judge a step between its last backward and optimizer.step(); suppress a bad one.

        grad_norm: the global norm, a scalar, equal on all ranks. Without an optimizer the step is
        judged only. Returns 1 for a bad step and 0 for a good one, on the device; None if off.
        """
        if not self.enabled:
            return None
        losses = torch.stack(self._losses).float()
        self._losses = []
        # values: (2,) mean loss and norm. The norm is equal on all ranks; its mean is taken so
        # that the verdict is one number, even where one rank computes another norm.
        loss = losses.sum() * self._counts / max(self._step_targets, 1)
        norm = grad_norm.detach().to(losses) / self._world_size
        values = torch.stack((loss, norm))
        if self._world_size > 1:
            torch.distributed.all_reduce(values)
        limits = self._limits()
        causes = torch.cat((~torch.isfinite(values), values > limits))
        bad = causes.any()
        self._remember(values, bad)
        report = torch.cat((causes.float(), values, limits))
        self._pending.append(
            _Report(self._step, report, losses, on_gpu=self._device.type == "cuda")
        )
        if optimizer is not None and obeys_found_inf(optimizer):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        elif optimizer is not None and bad.item():
            drop_gradients(optimizer)
        return bad.float()

    def poll(self, *, wait: bool = False) -> list[BadStep]:
        """Bad steps that the host may know of by now, the same on all ranks; `wait`: all."""
        found = []
        while len(self._pending) > (0 if wait else self._lag):
            bad = self._pending.popleft().read()
            if bad is not None:
                found.append(bad)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge alike; JSON. Waits for the device."""
        return {"recent": _jsonable(self._recent.tolist()), "accepted": int(self._accepted)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from state_dict()."""
        rows = [[math.nan if x is None else x for x in row] for row in state["recent"]]
        self._recent.copy_(torch.tensor(rows))
        self._accepted.fill_(state["accepted"])

    def _limits(self) -> Tensor:
        limits = self._recent.nanmedian(dim=1).values * self._factors
        return torch.where(self._accepted >= MIN_HISTORY, limits, math.inf)

    def _remember(self, values: Tensor, bad: Tensor) -> None:
        """A bad step must not move the median that judges the next ones."""
        place = (self._accepted % HISTORY_STEPS).view(1)
        kept = self._recent.index_select(1, place)
        self._recent.index_copy_(1, place, torch.where(bad, kept, values.unsqueeze(1)))
        self._accepted += (~bad).long()


class _Report:
    """A verdict on its way to the host."""

    def __init__(self, step: int, report: Tensor, losses: Tensor, *, on_gpu: bool) -> None:
        # (8,) causes, values, limits; (micro,) losses. One copy brings both.
        values = torch.cat((report, losses))
        self._step, self._event = step, None
        if on_gpu:
            self._values = torch.empty(len(values), pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values

    def read(self) -> BadStep | None:
        """The bad step; None for a good one. Waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        numbers = self._values.tolist()
        causes, (loss, norm, loss_limit, norm_limit) = numbers[:4], numbers[4:8]
        if not any(causes):
            return None
        return BadStep(
            step=self._step,
            reasons=tuple(r for r, yes in zip(REASONS, causes, strict=True) if yes),
            loss=loss, grad_norm=norm, loss_limit=loss_limit, grad_norm_limit=norm_limit,
            losses=tuple(numbers[8:]),
        )  # fmt: skip


def obeys_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer leaves everything as it is, on the device, where `found_inf` is 1."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Leave the optimizer nothing to do: torch's optimizers pass over parameters without .grad."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def too_many(steps: Iterable[int], config: GuardConfig) -> bool:
    """Whether the newest of these skipped steps ends the run."""
    skipped = sorted(steps)
    recent = [step for step in skipped if step > skipped[-1] - config.window_steps]
    return len(recent) >= config.max_skips


def _jsonable(rows: list[list[float]]) -> list[list[float | None]]:
    return [[x if math.isfinite(x) else None for x in row] for row in rows]
