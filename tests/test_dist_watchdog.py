"""dist/watchdog.py: a hanging rank is named, and the run ends in bounded time."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dist.dataset import Dataset
from dist.errors import ConfigError
from dist.hang_stacks import at_fault, waits_for_others
from dist.run_dir import RunDir
from dist.watchdog import Watchdog, WatchdogConfig
from tests.make_dataset import write_dataset
from tests.rank_processes import World

HANG_STEP = 6
# On two busy cores a step may take a second; a hang is told in a few.
QUICK = WatchdogConfig(timeout_s=4.0, factor=5.0, start_timeout_s=60.0, interval_s=0.2)
ENDS_WITHIN_S = 60.0


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), documents=200, with_tokenizer=False)


def hang_in(rank: int, victim: int, where: str) -> None:
    """One rank never comes back: from its model, or from reading its data."""
    from dist.shard_file import PackedShard
    from recipes import llama

    if rank != victim:
        return
    forward, read_row = llama.PackedDecoder.forward, PackedShard.read_row
    steps = [0]

    def endless_forward(self: Any, batch: Any) -> Any:
        steps[0] = batch.step
        while where == "python" and batch.step == HANG_STEP:
            sum(range(1000))
        return forward(self, batch)

    def endless_read(self: Any, *args: Any) -> Any:
        while where == "data" and steps[0] >= HANG_STEP:
            time.sleep(0.01)
        return read_row(self, *args)

    llama.PackedDecoder.forward = endless_forward  # type: ignore[method-assign]
    PackedShard.read_row = endless_read  # type: ignore[method-assign]


def changes(strategy: str) -> dict[str, Any]:
    return {"strategy": strategy, "watchdog": QUICK, "max_steps": 10_000, "save_every_steps": 0}


def assert_named(folder: Path, rank: int, *places: str) -> None:
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["status"] == "hung", outcome
    assert [one["rank"] for one in outcome["at_fault"]] == [rank], outcome
    assert any(place in outcome["error"] for place in places), outcome["error"]
    assert outcome["at_fault"][0].get("host") and f"rank {rank}" in outcome["error"]


@pytest.mark.parametrize(
    ("strategy", "where", "places"),
    [("ddp", "python", ["endless_forward"]), ("fsdp", "data", ["endless_read"])],
)
def test_a_rank_in_an_endless_loop_is_named(
    dataset: Dataset, tmp_path: Path, strategy: str, where: str, places: list[str]
) -> None:
    """Without it all ranks wait for half an hour, and then say only that a collective timed out."""
    folder = tmp_path / "run"
    args = (hang_in, 1, where)
    with World(dataset.storage.url, folder, 2, changes(strategy), *args) as world:
        assert world.wait(ENDS_WITHIN_S) == [1, 1], world.said(0)
        assert f"rank 1 on" in world.said(0) and "Traceback" not in world.said(0)  # noqa: F541
    assert_named(folder, 1, *places)
    stacks = (folder / "attempts" / "0" / "hang" / "rank-1.txt").read_text()
    assert places[0] in stacks


def test_a_stopped_rank_is_named_by_the_others(dataset: Dataset, tmp_path: Path) -> None:
    """A rank that is stopped (SIGSTOP, a frozen node) closes no connection: nobody hears of it."""
    folder = tmp_path / "run"
    with World(dataset.storage.url, folder, 2, changes("ddp")) as world:
        deadline = time.monotonic() + ENDS_WITHIN_S
        # Until it has timed a step, a time-out is that of a start.
        while len(RunDir(folder).read_lines("consumed.jsonl")) < HANG_STEP:
            assert time.monotonic() < deadline, world.said(0)
            time.sleep(0.05)
        world.signal(1, signal.SIGSTOP)
        world.processes[0].join(ENDS_WITHIN_S)
        assert world.processes[0].exitcode == 1, world.said(0)
        # Left stopped, it would not end by torchrun's SIGTERM, which waits 30 s for it.
        world.processes[1].join(10.0)
        assert world.processes[1].exitcode == -signal.SIGKILL
    assert_named(folder, 1, "no heartbeat")


LOADER = "/x/dist/loader.py"


def test_a_rank_waits_where_its_stack_says() -> None:
    """Main threads that wait for the loader look alike on all ranks; the loader's thread tells."""
    collective = [("/x/torch/distributed/distributed_c10d.py", "all_reduce", 7)]
    own = [("/x/mine.py", "slow", 3), ("/x/recipes/pretrain.py", "training_step", 1)]
    data = [("/usr/threading.py", "wait", 1), (LOADER, "get", 2)]
    assert waits_for_others(collective, []) == (True, f"{collective[0][0]}:7 in all_reduce")
    assert waits_for_others(own, [collective]) == (False, "/x/mine.py:3 in slow")
    # The validation loader's thread is full and waits for its turn.
    full = [("/usr/threading.py", "wait", 1), (LOADER, "put", 3)]
    assert waits_for_others(data, [full, own])[0] is False
    assert waits_for_others(data, [full, collective])[0] is True
    assert waits_for_others([], []) == (False, "no Python frame")


def report(rank: int, progress: int, waits: bool, time_: float = 0.0) -> dict[str, Any]:
    facts = {"progress": progress, "waits_for_others": waits, "time": time_}
    return {"rank": rank, "where": "somewhere", "step": 1, "phase": "data", **facts}


def test_the_rank_at_fault_is_not_one_that_waits_for_it() -> None:
    """Naming all ranks, or the one that noticed, sends a person to the wrong node."""
    both = {0: report(0, 5, True), 1: report(1, 5, False)}
    assert [one["rank"] for one in at_fault(both, both, both, 2)] == [1]
    # No one is seen outside of a collective: the one with the least progress.
    behind = {0: report(0, 9, True), 1: report(1, 8, True)}
    assert [one["rank"] for one in at_fault(behind, behind, behind, 2)] == [1]
    # Rank 2 wrote nothing and its heartbeat stands still; rank 1 wrote nothing but is alive.
    before = {rank: report(rank, 5, True, 1.0) for rank in range(3)}
    after = {**before, 1: report(1, 5, True, 2.0)}
    assert [one["rank"] for one in at_fault({0: before[0]}, before, after, 3)] == [2]
    # A rank that never had a heartbeat.
    assert [one["rank"] for one in at_fault({0: before[0]}, {}, {}, 2)] == [1]


def test_the_timeout_follows_the_steps(tmp_path: Path) -> None:
    """Steps of a minute must not be hangs by a time-out made for seconds."""
    config = WatchdogConfig(timeout_s=0.01, factor=1000.0, start_timeout_s=50.0)
    dog = Watchdog(RunDir(tmp_path), 0, config, rank=0, world_size=1)
    assert dog.timeout_s() == 50.0
    dog.step_done()
    time.sleep(0.01)
    dog.step_done()
    assert dog.timeout_s() > 9.0 and dog.timeout_s(saving=True) == 50.0
    with pytest.raises(ConfigError, match="start_timeout_s"):
        WatchdogConfig(timeout_s=100, start_timeout_s=10)
