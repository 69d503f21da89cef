"""dist/watchdog.py: a hanging rank is named, and the run ends in bounded time."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dist import watchdog as watchdog_module
from dist.dataset import Dataset
from dist.errors import ConfigError
from dist.hang_stacks import at_fault, stacks_of_threads, waits_for_others
from dist.run_dir import RunDir
from dist.watchdog import Watchdog, WatchdogConfig
from tests.make_dataset import write_dataset
from tests.rank_processes import ENDS_WITHIN_S, World

ROOT = Path(__file__).resolve().parent.parent
HANG_STEP = 6
# On two busy cores a step may take a second; a hang is told in a few.
QUICK = WatchdogConfig(timeout_s=4.0, factor=5.0, start_timeout_s=60.0, interval_s=0.2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), documents=200, with_tokenizer=False)


def hang_in(rank: int, victim: int, where: str) -> None:
    """One rank never comes back: from its model, or from reading its data."""
    from dist import step_gather
    from recipes import llama

    if rank != victim:
        return
    step_gather.STEPS_TOGETHER = 1  # or it reads dozens of steps ahead of the one that hangs it
    forward, gather_rows = llama.PackedDecoder.forward, step_gather.gather_rows
    steps = [0]

    def endless_forward(self: Any, batch: Any) -> Any:
        steps[0] = batch.step
        while where == "python" and batch.step == HANG_STEP:
            sum(range(1000))
        return forward(self, batch)

    def endless_read(*args: Any) -> Any:
        while where == "data" and steps[0] >= HANG_STEP:
            time.sleep(0.01)
        return gather_rows(*args)

    llama.PackedDecoder.forward = endless_forward  # type: ignore[method-assign]
    step_gather.gather_rows = endless_read


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
        assert world.wait() == [1, 1], world.said(0)
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


CHANNEL, LOADER = "/x/dist/channel.py", "/x/dist/loader.py"


def test_a_rank_waits_where_its_stack_says() -> None:
    """Main threads that wait for the loader look alike on all ranks; the loader's threads tell."""
    collective = [("/x/torch/distributed/distributed_c10d.py", "all_reduce", 7)]
    own = [("/x/mine.py", "slow", 3), ("/x/recipes/pretrain.py", "training_step", 1)]
    data = [("/usr/threading.py", "wait", 1), (CHANNEL, "get", 2), (LOADER, "_deliver", 9)]
    assert waits_for_others(collective, []) == (True, f"{collective[0][0]}:7 in all_reduce")
    assert waits_for_others(own, [collective]) == (False, "/x/mine.py:3 in slow")
    # The validation loader's thread is full and waits for its turn.
    full = [("/usr/threading.py", "wait", 1), (CHANNEL, "put", 3), (LOADER, "_gather", 8)]
    assert waits_for_others(data, [full, own])[0] is False
    assert waits_for_others(data, [full, collective])[0] is True
    # The thread that agrees has nothing to agree on, as its own gatherer does not come back.
    reads = [("/x/dist/open_shards.py", "get", 4), (LOADER, "_gather", 8)]
    assert waits_for_others(data, [data, full, reads])[0] is False
    # Others are slow, while this rank's gatherer happens to read further ahead.
    assert waits_for_others(data, [collective, reads])[0] is True
    assert waits_for_others([], []) == (False, "no Python frame")


def test_stacks_are_those_of_each_thread() -> None:
    """A main thread that is taken for another, or read from its outermost call: the wrong place is
    named, and a long save passes for a hang."""
    inside, leave = threading.Event(), threading.Event()

    def innermost() -> None:
        inside.set()
        leave.wait(30)

    def outer() -> None:
        innermost()

    thread = threading.Thread(target=outer)
    thread.start()
    assert inside.wait(30)
    stacks = stacks_of_threads()
    leave.set()
    thread.join()
    assert thread.ident is not None
    own = [(name, function) for name, function, _ in stacks[thread.ident] if name == __file__]
    assert own == [(__file__, "innermost"), (__file__, "outer")]
    mine = [one for one in stacks[threading.get_ident()] if one[0] == __file__]
    line = test_stacks_are_those_of_each_thread.__code__.co_firstlineno
    assert [one[1] for one in mine] == ["test_stacks_are_those_of_each_thread"]
    assert line < mine[0][2] < line + 25


def test_stacks_are_read_while_other_libraries_make_threads() -> None:
    """A look that meets a thread which C++ is just making known to Python: a healthy rank ends by
    SIGSEGV, without a word, and the others wait for it."""
    program = """
import ctypes, threading
from dist.hang_stacks import stacks_of_threads

libc, number, done = ctypes.CDLL(None), ctypes.c_ulong(), threading.Event()
called = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: None)

def make():
    while not done.wait(0.0001):
        libc.pthread_create(ctypes.byref(number), None, called, None)
        libc.pthread_detach(number)

makers = [threading.Thread(target=make) for _ in range(2)]
for maker in makers:
    maker.start()
for _ in range(60000):
    stacks_of_threads()
done.set()
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=ENDS_WITHIN_S)
    assert ended.returncode == 0


def test_no_collection_runs_while_stacks_are_read() -> None:
    """Finalizers in the midst of a walk let other threads go on: callers that are other objects."""
    collections, calls, thresholds = [0], 400, gc.get_threshold()

    def count(phase: str, _: Any) -> None:
        collections[0] += sys._getframe(1).f_code is stacks_of_threads.__code__

    def deep(left: int) -> int:
        return deep(left - 1) if left else len(stacks_of_threads()[threading.get_ident()])

    gc.callbacks.append(count)
    gc.set_threshold(1)
    try:
        assert deep(calls) > calls and gc.isenabled()
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(count)
    # Only while the iterators are made; each call is a frame to allocate.
    assert collections[0] < calls / 10


def test_a_look_that_fails_does_not_end_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A watchdog's thread that dies: a healthy rank without a heartbeat, which the others kill."""
    calls, real = [0], watchdog_module.stacks_of_threads

    def fails_twice() -> Any:
        calls[0] += 1
        if calls[0] in (4, 5):
            raise AttributeError("no f_lineno")
        return real()

    monkeypatch.setattr(watchdog_module, "stacks_of_threads", fails_twice)
    run = RunDir(tmp_path / "run")
    run.attempt_dir(0).mkdir(parents=True)
    watchdog = Watchdog(run, 0, QUICK, rank=0, world_size=1)
    watchdog.start()
    try:
        beat, deadline = run.attempt_dir(0) / "heartbeats" / "0", time.monotonic() + 30
        while calls[0] < 12 and time.monotonic() < deadline:
            watchdog.beat(1, "forward")
            time.sleep(0.05)
        assert calls[0] >= 12 and json.loads(beat.read_text())["phase"] == "forward"
    finally:
        watchdog.close()
    assert "warning: the watchdog could not look: AttributeError" in capsys.readouterr().err


def test_a_heartbeat_is_never_seen_half_written(tmp_path: Path) -> None:
    """A rank stopped as it writes: an empty file, and nobody can say on which host it hangs."""
    run = RunDir(tmp_path / "run")
    watchdog = Watchdog(run, 0, QUICK, rank=0, world_size=1)
    beat = run.attempt_dir(0) / "heartbeats" / "0"
    beat.parent.mkdir(parents=True)
    done = threading.Event()

    def write_on() -> None:
        while not done.is_set():
            watchdog._write_beat(0.0)

    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        deadline = time.monotonic() + 30
        while not beat.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        hosts = {json.loads(beat.read_text())["host"] for _ in range(3000)}
    finally:
        done.set()
        writer.join()
    assert len(hosts) == 1 and [path.name for path in beat.parent.glob("[!.]*")] == ["0"]


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
