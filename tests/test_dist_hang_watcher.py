"""Hangs that the watchdog's own thread cannot end, and those before the first step."""

from __future__ import annotations

import ctypes
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist.dataset import Dataset
from dist.hang_watcher import innermost
from dist.watchdog import WatchdogConfig
from tests.make_dataset import write_dataset
from tests.rank_processes import ENDS_WITHIN_S, World, processes_of, train

HANG_STEP = 3
# Start-up on busy cores takes seconds; its time-out holds until the first step is done.
QUICK = WatchdogConfig(timeout_s=3.0, factor=5.0, start_timeout_s=10.0, interval_s=0.2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), documents=60, with_tokenizer=False)


def hold_the_lock() -> None:
    """C code that keeps the interpreter's lock: no thread of Python runs any more, and no signal
    ends it (one would end a sleep)."""
    mutex = ctypes.create_string_buffer(256)
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)


def sleep_in_python() -> None:
    time.sleep(10_000)


def hang_in(rank: int, victim: int, where: str, how: str) -> None:
    """One rank never comes back from a place."""
    import dist.start
    from recipes import llama, pretrain

    if rank != victim:
        return
    hang = {"lock": hold_the_lock, "sleep": sleep_in_python}[how]
    forward = llama.PackedDecoder.forward

    def endless(self: Any, batch: Any) -> Any:
        if batch.step == HANG_STEP:
            hang()
        return forward(self, batch)

    if where == "step":
        llama.PackedDecoder.forward = endless  # type: ignore[method-assign]
    if where == "model":
        pretrain.materialise = lambda *_: hang()
    if where == "loader":
        pretrain.training_loader = lambda *_: hang()
    if where == "data":
        dist.start.verify_full = lambda *_: hang()  # type: ignore[assignment]


def changes(watchdog: WatchdogConfig = QUICK) -> dict[str, Any]:
    return {"strategy": "ddp", "watchdog": watchdog, "max_steps": 10_000, "save_every_steps": 2}


CASES = [
    # (ranks, where, how, exit code of the rank, its place)
    (1, "step", "lock", -9, "hold_the_lock"),
    (1, "step", "sleep", 1, "sleep_in_python"),
    (1, "loader", "lock", -9, "hold_the_lock"),
    (2, "model", "sleep", 1, "sleep_in_python"),
    (1, "data", "sleep", 1, "sleep_in_python"),
]


@pytest.mark.parametrize(
    ("ranks", "where", "how", "code", "place"),
    CASES,
    ids=["-".join(map(str, c[:3])) for c in CASES],
)
def test_a_rank_that_hangs_alone_is_ended(
    dataset: Dataset, tmp_path: Path, ranks: int, where: str, how: str, code: int, place: str
) -> None:
    """A job of one rank, or one that has not begun, holds its node until the time limit; and where
    Python is blocked, nobody says where, or says the step of the last heartbeat, long past."""
    folder, victim = tmp_path / "run", ranks - 1
    args = (hang_in, victim, where, how)
    rarely = changes(replace(QUICK, interval_s=1.0) if how == "lock" else QUICK)
    with World(dataset.storage.url, folder, ranks, rarely, *args) as world:
        codes = world.wait()
        said = world.said(victim)
    assert codes[victim] == code, said
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["status"] == "hung" and outcome["attempt"] == 0
    (guilty,) = outcome["at_fault"]
    assert guilty["rank"] == victim and guilty["host"]
    assert place in guilty["where"] and f"rank {victim} on {guilty['host']}" in outcome["error"]
    assert f"rank {victim} on" in said and "Traceback" not in said
    if where == "step":
        assert (guilty["step"], guilty["phase"]) == (HANG_STEP, "forward")


def watchers_become(folder: Path, count: int) -> bool:
    """Whether so many processes name the run's folder, as of all here only watchers do, in time."""
    deadline = time.monotonic() + ENDS_WITHIN_S
    while len(processes_of(str(folder))) != count and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(processes_of(str(folder))) == count


def test_the_watcher_ends_with_its_rank(dataset: Dataset, tmp_path: Path) -> None:
    """One process more on the node for every attempt, or one that holds a run's end up."""
    folder = tmp_path / "run"
    quick = {**changes(), "max_steps": 4}
    assert train(dataset.storage.url, folder, 2, quick) == [0, 0]
    assert watchers_become(folder, 0)
    with World(dataset.storage.url, folder, 2, changes()) as world:
        assert watchers_become(folder, 2), world.said(0)  # one that is being made has no name yet
        world.signal(0, 9)
        world.signal(1, 9)
        world.wait()
    assert watchers_become(folder, 0)


def test_the_main_thread_is_the_last_of_a_dump() -> None:
    """The place of another thread (the loader's, the pool's) sends a person to the wrong code."""
    dump = (
        'Thread 0x00007f (most recent call first):\n  File "/x/loader.py", line 3 in _run\n\n'
        'Current thread 0x00008a (most recent call first):\n  File "/x/mine.py", line 7 in slow\n'
        '  File "/x/main.py", line 1 in <module>\n'
    )
    assert innermost(dump) == "/x/mine.py:7 in slow"
    assert innermost("") == "" and innermost("Thread 0x1 (most recent call first):\n") == ""
