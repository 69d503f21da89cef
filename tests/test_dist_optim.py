"""dist/optim.py: what decays, and the learning rate at each step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dist.errors import ConfigError
from dist.optim import OptimConfig, adamw, cosine_lr


def test_only_matrices_decay() -> None:
    """Decay on norms pulls them to 0; a parameter in no group would never train."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    config = OptimConfig(lr=0.5, weight_decay=0.1)
    optimizer = adamw(model.named_parameters(), config)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, parameter in zip(before, model.parameters(), strict=True):
        factor = 1 - 0.5 * 0.1 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), old * factor)


def test_schedule_warms_up_and_ends_at_its_minimum() -> None:
    """A warm-up from 0 wastes a step; an end before or after max_steps misses the minimum."""
    factor = cosine_lr(OptimConfig(warmup_steps=4, min_lr_ratio=0.1), max_steps=20)
    assert [factor(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factor(4) == 1.0
    assert factor(19) == pytest.approx(0.1) and factor(100) == pytest.approx(0.1)
    assert all(factor(s) > factor(s + 1) for s in range(4, 19))
    short = cosine_lr(OptimConfig(warmup_steps=100), max_steps=3)
    assert all(math.isfinite(short(step)) for step in range(4))


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"lr": math.nan}, {"clip_norm": -1.0}])
def test_senseless_values_are_refused(wrong: dict[str, float]) -> None:
    """A learning rate of NaN trains to NaN an hour later."""
    with pytest.raises(ConfigError, match=r"optim"):
        OptimConfig(**wrong)
