"""Replicas compared bit for bit: what shows, who is named, and that a sound run is quiet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist.dataset import Dataset
from dist.errors import ConfigError
from dist.guard import GuardConfig
from dist.mesh import Layout
from dist.replica_check import bits_sum, odd_ones
from tests.make_dataset import write_dataset
from tests.rank_processes import World, train


@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8]),
    where=st.integers(0, 2**30), bit=st.integers(0, 63), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_flipped_bit_shows(dtype: torch.dtype, where: int, bit: int, seed: int) -> None:
    """A sum of values: blind to the low bits of a small weight, or NaN for ever."""
    draw = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(size, generator=draw).mul(50).to(dtype) for size in ((3, 5), (7,), (2,))]
    before = int(bits_sum(tensors))
    tensor = tensors[where % 3]
    flat = tensor.view(torch.uint8).view(-1)
    flat[where % len(flat)] ^= 1 << (bit % 8)
    assert int(bits_sum(tensors)) != before
    # Two tensors that have changed places are a difference too, unless their sums are equal.
    if int(bits_sum(tensors[:1])) != int(bits_sum(tensors[2:])):
        assert int(bits_sum(tensors[::-1])) != int(bits_sum(tensors))


@pytest.mark.parametrize(
    ("layout", "sums", "found", "certain"),
    [
        (Layout(replicas=4), [7, 7, 7, 7], [], True),
        (Layout(replicas=4), [7, 7, 9, 7], [2], True),
        (Layout(replicas=2), [7, 9], [0, 1], False),
        (Layout(replicas=4), [7, 7, 9, 9], [0, 1, 2, 3], False),
        # hsdp: ranks 0, 2, 4 hold one part, 1, 3, 5 the other.
        (Layout(replicas=3, shards=2), [1, 5, 1, 5, 1, 5], [], True),
        (Layout(replicas=3, shards=2), [1, 5, 1, 6, 1, 5], [3], True),
        # Replicas of tensor parallelism: 0, 2, 4 and 1, 3, 5 again.
        (Layout(replicas=3, tp=2), [1, 5, 4, 5, 1, 8], [2, 5], True),
    ],
)
def test_who_is_named(layout: Layout, sums: list[int], found: list[int], certain: bool) -> None:
    """Ranks of other parts compared with each other; the sound ones named for the odd one."""
    assert odd_ones(sums, layout) == (found, certain)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), documents=200)


def flip(rank: int, victim: int, at_step: int) -> None:
    """One bit of a weight of one rank, as a cosmic ray would, after an update."""
    original = torch.optim.AdamW.step
    count = [0]

    def step(self: Any, closure: Any = None) -> Any:
        made = original(self, closure)
        count[0] += 1
        if rank == victim and count[0] == at_step:
            weight = self.param_groups[0]["params"][0].detach()
            weight = getattr(weight, "_local_tensor", weight)
            weight.view(torch.int32).view(-1)[3] ^= 1 << 12  # in the middle of a mantissa
        return made

    torch.optim.AdamW.step = step  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("strategy", "ranks", "victim"), [("ddp", 3, 1), ("hsdp", 4, 2)], ids=["ddp", "hsdp"]
)
def test_a_flipped_bit_ends_the_attempt_before_the_save(
    dataset: Dataset, tmp_path: Path, strategy: str, ranks: int, victim: int
) -> None:
    """One rank drifts for weeks; or the check comes after the save that it should have stopped."""
    guard = GuardConfig(check_replicas_every=3)
    changes = {
        "strategy": strategy, "guard": guard, "max_steps": 9, "save_every_steps": 5,
        "global_batch": 12,
    }  # fmt: skip
    folder = tmp_path / "run"
    with World(dataset.storage.url, folder, ranks, changes, flip, victim, 4) as world:
        assert world.wait() == [1] * ranks, world.said(0)
        said = world.said(0)
    # Flipped in step 4: the save of step 5 was the next look.
    assert "replicas are no longer equal after step 5" in said and "Traceback" not in said
    events = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    (event,) = [one for one in events if one["event"] == "replicas_differ"]
    # Of two replicas none has a majority.
    assert (event["ranks"], event["certain"]) == (
        ([victim], True) if strategy == "ddp" else ([0, 2], False)
    )
    assert not list((folder / "checkpoints").glob("step-*/COMMIT.json"))


@pytest.mark.parametrize("strategy", ["ddp", "hsdp"])
def test_sound_replicas_are_equal_at_every_step(
    dataset: Dataset, tmp_path: Path, strategy: str
) -> None:
    """An alarm for nothing: replicas that are equal only nearly end every run."""
    changes = {"strategy": strategy, "guard": GuardConfig(check_replicas_every=1), "max_steps": 8}
    ranks = 4 if strategy == "hsdp" else 2
    assert train(dataset.storage.url, tmp_path / "run", ranks, changes) == [0] * ranks


def test_a_negative_interval_is_refused() -> None:
    """A modulo of a negative number, at step one."""
    with pytest.raises(ConfigError, match="check_replicas_every is -1"):
        GuardConfig(check_replicas_every=-1)
