"""AdamW with no-decay groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from dist.errors import ConfigError
from dist.stochastic_adamw import StochasticAdamW

ScheduleName = Literal["cosine", "linear", "wsd", "constant"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule: a linear warm-up, then what `schedule` says."""

    lr: float = 3e-4
    """Peak learning rate."""
    schedule: ScheduleName = "cosine"
    """After the warm-up: cosine or linear down to min_lr_ratio at max_steps; wsd: constant, then
    down by 1 - sqrt in the last decay steps; constant."""
    min_lr_ratio: float = 0.1
    """Last learning rate over the peak; constant has no use for it."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    warmup_tokens: int = 0
    """Tokens of linear warm-up, instead of warmup_steps; 0: as warmup_steps says."""
    decay_steps: int = 0
    """Of wsd: last steps that decay; 0: as decay_share says."""
    decay_share: float = 0.2
    """Of wsd: share of max_steps that decays."""
    weight_decay: float = 0.1
    """On matrices only; norms, biases and other vectors do not decay."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of AdamW's moments; bf16 halves their memory, stored with stochastic rounding."""
    stochastic_rounding: bool = False
    """Round bf16 parameters stochastically; precision bf16-true needs it."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"optim.lr is {self.lr}; it must be a number above 0")
        if min(self.warmup_steps, self.clip_norm, self.weight_decay) < 0:
            raise ConfigError(
                "optim: warmup_steps, clip_norm and weight_decay must not be negative"
            )
        if min(self.warmup_tokens, self.decay_steps) < 0 or not 0.0 < self.decay_share <= 1.0:
            raise ConfigError(
                f"optim: warmup_tokens {self.warmup_tokens} and decay_steps {self.decay_steps} "
                f"must not be negative, decay_share {self.decay_share} must be in (0, 1]"
            )


def adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, seed: int = 0
) -> torch.optim.Optimizer:
    """AdamW in two groups: matrices with weight decay, vectors without; fused where it can be.

    `seed` is for the noise of stochastic rounding, if there is any.
    """
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    matrices = [p for _, p in named if p.ndim >= 2]
    vectors = [p for _, p in named if p.ndim < 2]
    both = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in both if group["params"]]
    betas = (config.beta1, config.beta2)
    if config.stochastic_rounding or config.state_dtype != "fp32":
        dtype = torch.bfloat16 if config.state_dtype == "bf16" else torch.float32
        return StochasticAdamW(
            groups, lr=config.lr, betas=betas, eps=config.eps, state_dtype=dtype, seed=seed
        )
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=betas,
        eps=config.eps,
        fused=all(p.is_floating_point() for _, p in named),
    )


def lr_schedule(
    config: OptimConfig, max_steps: int, tokens_per_step: int = 0
) -> Callable[[int], float]:
    """Factor on the peak learning rate at step s (0-based), of `max_steps` steps.

    With w steps of warm-up, m = min_lr_ratio and T = max_steps - 1, the last step:
      s < w      (s + 1) / (w + 1)
      cosine     m + (1 - m) (1 + cos(pi p)) / 2,  p = (s - w) / (T - w)
                 (Loshchilov and Hutter, arXiv 1608.03983, one period)
      linear     1 - (1 - m) p
      constant   1
      wsd        1 while s <= T - d, then m + (1 - m) (1 - sqrt(q)), q = (s - (T - d)) / d over
                 the last d steps (warm-up, stable, decay: Hu et al., arXiv 2404.06395; the form
                 1 - sqrt: Hagele et al., arXiv 2405.18392)
    tokens_per_step turns warmup_tokens into steps. Later steps than the last stay at its factor.
    """
    warmup, last, least = _warmup_steps(config, tokens_per_step), max_steps - 1, config.min_lr_ratio
    decay = config.decay_steps or round(config.decay_share * max_steps)
    decay = max(1, min(decay, last - warmup))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.schedule == "constant":
            return 1.0
        if config.schedule == "wsd":
            share = min(1.0, max(0.0, (step - (last - decay)) / decay))
            return least + (1.0 - least) * (1.0 - math.sqrt(share))
        progress = min(1.0, (step - warmup) / max(1, last - warmup))
        if config.schedule == "linear":
            return 1.0 - (1.0 - least) * progress
        return least + (1.0 - least) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def _warmup_steps(config: OptimConfig, tokens_per_step: int) -> int:
    if not config.warmup_tokens:
        return config.warmup_steps
    if tokens_per_step < 1:
        raise ValueError("optim.warmup_tokens needs the tokens of a step")
    return math.ceil(config.warmup_tokens / tokens_per_step)
