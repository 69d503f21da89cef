"""dist/guard.py: verdicts on the device, and optimizers that obey them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from dist.errors import ConfigError
from dist.guard import MIN_HISTORY, Guard, GuardConfig, obeys_found_inf, too_many
from tests.run_ranks import run_ranks

CPU = torch.device("cpu")


class Micro:
    """What the guard reads of a batch."""

    def __init__(self, step: int, step_targets: int = 1) -> None:
        self.step, self.step_targets, self.micro = step, step_targets, 0


def optimizer_of(kind: str) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    parameter = torch.nn.Parameter(torch.ones(3))
    if kind == "sgd":
        return parameter, torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=0.1)
    return parameter, torch.optim.AdamW([parameter], lr=0.1, fused=kind == "fused")


def judge(guard: Guard, optimizer: Any, step: int, loss: float, norm: float) -> list[Any]:
    guard.saw(Micro(step), torch.tensor(loss))  # type: ignore[arg-type]
    guard.check(optimizer, torch.tensor(norm))
    return guard.poll()


@pytest.mark.parametrize("kind", ["fused", "foreach", "sgd"])
def test_a_suppressed_step_changes_nothing(kind: str) -> None:
    """Weight decay, momentum or Adam's step count that still move: the run then differs from one
    that never applied the update."""
    parameter, optimizer = optimizer_of(kind)
    guard = Guard(GuardConfig(policy="skip"), CPU, world_size=1)
    assert obeys_found_inf(optimizer) == (kind == "fused")
    states = []
    for step, loss in enumerate((1.0, math.nan, 1.0)):
        parameter.grad = torch.full((3,), loss)
        found = judge(guard, optimizer, step, loss, 1.0)
        assert [bad.step for bad in found] == ([1] if step == 1 else [])
        optimizer.step()
        optimizer.zero_grad()
        kept = {k: v.clone() for k, v in optimizer.state[parameter].items()}
        states.append({"weight": parameter.detach().clone(), **kept})
    same = [torch.equal(states[0][k], states[1][k]) for k in states[0]]
    assert all(same) and not torch.equal(states[1]["weight"], states[2]["weight"])


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["loss", "norm"])
def test_every_kind_of_non_finite_value_is_found(loss: float, place: str) -> None:
    """NaN > x is False: a guard by threshold alone lets NaN through."""
    guard = Guard(GuardConfig(), CPU, world_size=1)
    _, optimizer = optimizer_of("fused")
    values = (loss, 1.0) if place == "loss" else (1.0, loss)
    (bad,) = judge(guard, optimizer, 3, *values)
    assert bad.reasons == ("loss is not finite" if place == "loss" else
                           "gradient norm is not finite",)  # fmt: skip
    assert bad.losses == (pytest.approx(values[0], nan_ok=True),)
    assert "step 3" in bad.text


def test_spikes_are_judged_by_a_median_that_spikes_do_not_move() -> None:
    """With the spike in its own history, a second and a third one pass as normal."""
    guard = Guard(GuardConfig(spike_factor=3.0, loss_spike_factor=2.0), CPU, world_size=1)
    _, optimizer = optimizer_of("fused")
    for step in range(MIN_HISTORY):
        # A wild first step sets no limit, and is found by none.
        assert judge(guard, optimizer, step, 5.0, 100.0 if step == 0 else 1.0) == []
    for step in range(20, 60):
        (bad,) = judge(guard, optimizer, step, 5.0, 3.1)
        assert bad.reasons == ("gradient norm spike",) and bad.grad_norm_limit == 3.0
    (bad,) = judge(guard, optimizer, 60, 10.1, 1.0)
    assert bad.reasons == ("loss spike",) and bad.loss_limit == 10.0
    assert judge(guard, optimizer, 61, 9.9, 2.9) == []


def test_the_state_judges_as_if_nothing_had_happened() -> None:
    """A resumed run with an empty history lets the first spikes pass."""
    config = GuardConfig(spike_factor=1.5)
    one, again = (Guard(config, CPU, world_size=1) for _ in range(2))
    _, optimizer = optimizer_of("fused")
    values = torch.rand(200, generator=torch.Generator().manual_seed(0)) + 0.5
    found: dict[str, list[int]] = {"one": [], "again": []}
    for step, norm in enumerate(values.tolist()):
        found["one"] += [bad.step for bad in judge(one, optimizer, step, 1.0, norm)]
        if step == 99:
            again.load_state_dict(json.loads(json.dumps(one.state_dict())))
        if step > 99:
            found["again"] += [bad.step for bad in judge(again, optimizer, step, 1.0, norm)]
    assert found["again"] and found["again"] == [step for step in found["one"] if step > 99]


def test_the_host_hears_one_step_later_beside_a_gpu() -> None:
    """A verdict read in its own step would make the host wait for the device."""
    guard = Guard(GuardConfig(policy="skip"), CPU, world_size=1, lag=1)
    _, optimizer = optimizer_of("fused")
    heard = [len(judge(guard, optimizer, step, math.nan, 1.0)) for step in range(3)]
    assert heard == [0, 1, 1]
    assert [bad.step for bad in guard.poll(wait=True)] == [2]
    assert guard.poll(wait=True) == []


def _judged_by_ranks() -> Any:
    rank = torch.distributed.get_rank()
    guard = Guard(GuardConfig(spike_factor=2.0), CPU, world_size=2)
    _, optimizer = optimizer_of("fused")
    found = []
    for step in range(30):
        # Rank 1 alone is bad: NaN in 5, and in 25 a norm that rank 0 does not see.
        mine = rank == 1
        loss = math.nan if mine and step == 5 else 1.0 + rank
        found += judge(guard, optimizer, step, loss, 9.0 if mine and step == 25 else 1.0)
    return [(bad.step, bad.reasons) for bad in found], json.dumps(guard.state_dict())


def test_all_ranks_judge_alike() -> None:
    """A skip that one rank decides alone: weights drift apart, or the ranks hang."""
    one, other = run_ranks(_judged_by_ranks, 2, 240)
    assert one == other
    assert [step for step, _ in one[0]] == [5, 25]


def test_too_many_counts_a_window() -> None:
    """Skips of long ago must not end a run; five in a row must."""
    config = GuardConfig(max_skips=3, window_steps=10)
    assert not too_many([1, 11, 21, 31], config)
    assert not too_many([1, 2, 12], config)
    assert too_many([1, 8, 9, 10], config)


@pytest.mark.parametrize(
    ("field", "value"), [("spike_factor", 0.5), ("loss_spike_factor", math.nan), ("max_skips", 0)]
)
def test_settings_that_cannot_be_meant(field: str, value: float) -> None:
    """A factor below 1 calls half of all steps spikes."""
    with pytest.raises(ConfigError, match=field):
        GuardConfig(**{field: value})  # type: ignore[arg-type]
