"""dist/optim.py: what decays, and the learning rate at each step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dist.errors import ConfigError
from dist.optim import OptimConfig, adamw, lr_schedule


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


def test_cosine_warms_up_and_ends_at_its_minimum() -> None:
    """A warm-up from 0 wastes a step; an end before or after max_steps misses the minimum. Old
    runs go on with the numbers that they had."""
    factor = lr_schedule(OptimConfig(warmup_steps=4, min_lr_ratio=0.1), max_steps=20)
    assert [factor(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factor(4) == 1.0
    assert factor(19) == pytest.approx(0.1) and factor(100) == pytest.approx(0.1)
    assert all(factor(s) > factor(s + 1) for s in range(4, 19))
    assert factor(10) == 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 6 / 15))


def test_wsd_stays_then_decays_by_one_minus_sqrt() -> None:
    """A decay of the wrong length or form trains, and ends higher."""
    config = OptimConfig(schedule="wsd", warmup_steps=3, decay_steps=4, min_lr_ratio=0.0)
    factor = lr_schedule(config, max_steps=20)
    assert [factor(step) for step in range(3, 16)] == [1.0] * 13
    assert [factor(step) for step in range(16, 20)] == pytest.approx(
        [1 - math.sqrt(q / 4) for q in (1, 2, 3, 4)]
    )
    by_share = lr_schedule(OptimConfig(schedule="wsd", warmup_steps=3, decay_share=0.2), 20)
    assert by_share(15) == 1.0 and by_share(16) < 1.0 and by_share(19) == pytest.approx(0.1)


def test_linear_and_constant() -> None:
    """Names that all meant the cosine would be noticed by nobody for days."""
    linear = lr_schedule(OptimConfig(schedule="linear", warmup_steps=0, min_lr_ratio=0.0), 11)
    assert [linear(s) for s in (0, 5, 10, 12)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    constant = lr_schedule(OptimConfig(schedule="constant", warmup_steps=1), 11)
    assert [constant(s) for s in (0, 1, 10)] == [0.5, 1.0, 1.0]


def test_warmup_in_tokens_is_in_steps_of_the_batch() -> None:
    """Another global batch must not change how many tokens warm up."""
    config = OptimConfig(warmup_tokens=1000, warmup_steps=7)
    in_steps = lr_schedule(OptimConfig(warmup_steps=4), 50)
    in_tokens = lr_schedule(config, 50, tokens_per_step=256)
    assert [in_tokens(s) for s in range(50)] == [in_steps(s) for s in range(50)]


@settings(max_examples=200, deadline=None)
@given(
    schedule=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    warmup=st.integers(0, 40),
    max_steps=st.integers(1, 60),
    decay=st.integers(0, 80),
    least=st.floats(0.0, 1.0),
)
def test_any_schedule_stays_between_0_and_the_peak(
    schedule: str, warmup: int, max_steps: int, decay: int, least: float
) -> None:
    """Warm-ups and decays longer than the run must not divide by 0, pass the peak or go up."""
    config = OptimConfig(
        schedule=schedule,  # type: ignore[arg-type]
        warmup_steps=warmup,
        decay_steps=decay,
        min_lr_ratio=least,
    )
    factor = lr_schedule(config, max_steps)
    values = [factor(step) for step in range(max(max_steps, warmup) + 5)]
    assert all(0.0 <= value <= 1.0 for value in values)
    after = values[warmup:]
    assert all(one >= other for one, other in zip(after, after[1:], strict=False))


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0}, {"lr": math.nan}, {"clip_norm": -1.0}, {"decay_share": 0.0},
        {"warmup_tokens": -1},
    ],
)  # fmt: skip
def test_senseless_values_are_refused(wrong: dict[str, float]) -> None:
    """A learning rate of NaN trains to NaN an hour later."""
    with pytest.raises(ConfigError, match=r"optim"):
        OptimConfig(**wrong)  # type: ignore[arg-type]
