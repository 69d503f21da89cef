"""A rank dies, or hangs, under every strategy: all others end by themselves, and say why.

Twenty seeds; those marked `slow` are the larger part.
"""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dist.dataset import Dataset
from dist.sharding import ParallelConfig
from tests.make_dataset import write_dataset
from tests.rank_processes import World
from tests.test_exact_resume import killed_at

ALL_GONE_WITHIN_S = 30.0
CASES: tuple[tuple[int, dict[str, Any]], ...] = (
    (4, {"strategy": "hsdp"}),
    (4, {"strategy": "fsdp", "tp": 2}),
    (2, {"strategy": "tp"}),
    (2, {"strategy": "deepspeed", "zero_stage": 2}),
    (2, {"strategy": "deepspeed", "zero_stage": 3}),
)
SEEDS = [
    pytest.param(seed, marks=[pytest.mark.all_cells] if seed >= len(CASES) else [])
    for seed in range(20)
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(
        tmp_path_factory.mktemp("data"), documents=40, num_train_shards=2, with_tokenizer=False
    )


def changes_for(parallel: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"parallel": ParallelConfig(**{**parallel, **more}), "dropout": 0.0, "max_steps": 4000,
            "save_every_steps": 5}  # fmt: skip


def wait_all_gone(world: World, victim: int, timeout_s: float) -> float:
    """Seconds from the victim's death until all others have ended."""
    deadline = time.monotonic() + timeout_s
    while world.processes[victim].exitcode is None:
        assert time.monotonic() < deadline, {r: world.said(r)[-900:] for r in (0, victim)}
        time.sleep(0.02)
    died = time.monotonic()
    world.wait(timeout_s)
    return time.monotonic() - died


@pytest.mark.parametrize("seed", SEEDS)
def test_any_rank_killed_at_any_moment(dataset: Dataset, tmp_path: Path, seed: int) -> None:
    """A rank that waits in a sub-group of ranks that are all alive, but wait themselves; an
    engine's own threads that outlive the error."""
    world_size, parallel = CASES[seed % len(CASES)]
    choose = random.Random(seed)
    victim = choose.randrange(world_size)
    moment = (victim, choose.randrange(2, 12), 0, choose.uniform(0.0, 0.05))
    arguments = (changes_for(parallel), killed_at, *moment)
    with World(dataset.storage.url, tmp_path / "run", world_size, *arguments) as world:
        seconds = wait_all_gone(world, victim, 200.0)
        codes = world.wait(1.0)
        assert codes[victim] == -signal.SIGKILL
        for rank in set(range(world_size)) - {victim}:
            assert codes[rank] == 1, world.said(rank)
            # A rank may wait in a group of its own, whose members are all alive: end_soon ends it.
            ends = ("another rank ended", "still waiting for other ranks")
            assert any(words in world.said(rank) for words in ends), world.said(rank)
            assert "Traceback" not in world.said(rank), world.said(rank)
    assert seconds < ALL_GONE_WITHIN_S


def hangs_at(rank: int, victim: int, step: int, seconds: float) -> None:
    """On the victim: stop answering in the middle of a step, the process alive."""
    if rank != victim:
        return
    from recipes import pretrain

    original = pretrain.Pretrain.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if batch.step == step:
            time.sleep(seconds)
        return original(self, batch, batch_idx)

    pretrain.Pretrain.training_step = training_step  # type: ignore[method-assign]


def test_a_rank_that_hangs_ends_the_run(dataset: Dataset, tmp_path: Path) -> None:
    """With one time-out for start-up and training, a hang costs half an hour of all ranks."""
    changes = changes_for({"strategy": "fsdp"}, start_timeout_s=300.0, step_timeout_s=3.0)
    with World(dataset.storage.url, tmp_path / "run", 2, changes, hangs_at, 1, 5, 120.0) as world:
        codes: list[int | None] = []
        deadline = time.monotonic() + 90.0
        while world.processes[0].exitcode is None:
            assert time.monotonic() < deadline, world.said(0)
            time.sleep(0.05)
        codes = [world.processes[0].exitcode]
        assert codes == [1] and "another rank ended" in world.said(0), world.said(0)
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["status"] == "failed"


def test_start_up_may_take_longer_than_a_step(dataset: Dataset, tmp_path: Path) -> None:
    """A first step compiles, loads and opens files; the short time-out would end it."""
    changes = changes_for({"strategy": "fsdp"}, start_timeout_s=120.0, step_timeout_s=3.0)
    changes["max_steps"] = 2
    with World(dataset.storage.url, tmp_path / "run", 2, changes, hangs_at, 1, 0, 5.0) as world:
        assert world.wait() == [0, 0], world.said(0)
