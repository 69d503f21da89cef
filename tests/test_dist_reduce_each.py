"""parallel.reduce_each: when FSDP2 adds a micro-batch's gradients to its shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist.errors import ConfigError
from dist.sharding import ParallelConfig
from tests.make_dataset import write_dataset
from tests.run_ranks import run_ranks
from tests.strategy_runs import Job, at_step, losses, play, tensors


def worlds(root: Path) -> dict[int, list[Job]]:
    """Six steps of two micro-batches, reduced once and each time; the latter also resumed."""
    made: dict[int, list[Job]] = {}
    for ranks, strategy in ((2, "fsdp"), (4, "hsdp")):
        jobs: list[Job] = []
        for each in ("step", "micro_batch"):
            changes: dict[str, Any] = {
                "parallel": {"strategy": strategy, "reduce_each": each}, "max_steps": 6,
                "save_every_steps": 3, "micro_batch": 4 // ranks,
            }  # fmt: skip
            jobs.append(("train", str(root / f"{strategy}-{each}"), "", changes))
        whole = str(root / f"{strategy}-micro_batch")
        jobs.append(("resume", f"{whole}-cut", whole, changes))
        made[ranks] = jobs
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    url = write_dataset(
        root / "data", documents=40, num_train_shards=2, with_tokenizer=False
    ).storage.url
    for ranks, jobs in worlds(root).items():
        assert run_ranks(play, ranks, 200, url, jobs) == [[0, 0, 0]] * ranks
    return root


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
def test_both_ways_are_one_sum(runs: Path, strategy: str) -> None:
    """Gradients of an earlier micro-batch overwritten, averaged twice, or lost between replicas:
    the same losses, but for the order of sums, and the same weights."""
    once, each = runs / f"{strategy}-step", runs / f"{strategy}-micro_batch"
    assert len(losses(once)) == 6
    assert losses(each) == pytest.approx(losses(once), rel=1e-5)
    one, other = tensors(at_step(each, 6)), tensors(at_step(once, 6))
    for name, value in one.items():
        if name.startswith("model."):
            assert (value - other[name]).norm() <= 1e-4 * other[name].norm(), name


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
def test_resumed_is_uninterrupted(runs: Path, strategy: str) -> None:
    """A gradient left in the shards over a save would be counted once more after it."""
    whole, cut = runs / f"{strategy}-micro_batch", runs / f"{strategy}-micro_batch-cut"
    assert losses(cut) == losses(whole)
    one, other = tensors(at_step(cut, 6)), tensors(at_step(whole, 6))
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("strategy", ["ddp", "tp", "deepspeed"])
def test_it_is_refused_where_it_means_nothing(strategy: Any) -> None:
    """A person who believes that it saves memory there."""
    with pytest.raises(ConfigError, match=f"strategy {strategy}: it saves memory only where FSDP2"):
        ParallelConfig(strategy=strategy, reduce_each="micro_batch")
    with pytest.raises(ConfigError, match="it must be step or micro_batch"):
        ParallelConfig(reduce_each="never")  # type: ignore[arg-type]
