"""A hang is named and ended: which rank, where, on which host; in bounded time.

Every rank has a daemon thread. It writes a heartbeat, a file of one line in the attempt's folder
(`heartbeats/<rank>`: host, process, step, phase, progress), and watches the rank's own progress.
Where one rank hangs, soon none makes progress. When a rank has made none for the time-out, it
writes the stacks of all its threads and what it waits for (`hang/rank-<n>.json`, `.txt`), looks at
what the others wrote, and the first of them writes the outcome `hung` with the ranks at fault:

    no heartbeat for a while      stopped (SIGSTOP, swapped out, a dead node), or Python blocked
    not waiting for other ranks   in Python code, in data, in a library
    all wait, or none does        those with the least progress

Then every rank that can ends itself with code 1; torchrun's agent ends the others. Where Python is
blocked (C code that keeps the interpreter's lock) or the process is stopped, no thread can: a
process beside each rank (dist.hang_watcher) writes the outcome and kills it, code 137. Time-outs
count from the moment that the attempt has its number: data, model, compilation. Before that (the
first meeting of ranks, opening the run) watch_start() ends a rank, with its stacks on stderr.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dist.drain import end_process
from dist.errors import ConfigError
from dist.hang_stacks import (
    LOADER_THREADS,
    NO_HEARTBEAT,
    at_fault,
    hang_text,
    scratch_file,
    stacks_of_threads,
    text_of,
    waits_for_others,
)
from dist.hang_watcher import STACKS_SIGNAL, start_watcher, write_place
from dist.local_files import create_exclusive, write_atomic
from dist.ranks import Ranks
from dist.run_dir import RunDir
from dist.start_watch import EXIT_HUNG, cancel_start_watch

_SAVING_FILES = ("dist/checkpoint_callback.py", "dist/checkpoint.py")


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When a run that makes no progress is ended, with the rank at fault named."""

    timeout_s: float = 600.0
    """Longest time without a finished micro-batch; 0: no watchdog."""
    factor: float = 20.0
    """At least this many median steps, if that is longer than timeout_s."""
    start_timeout_s: float = 3600.0
    """The same before the first step is done (compilation, first data), and while saving."""
    interval_s: float = 5.0
    """Seconds between heartbeats."""

    def __post_init__(self) -> None:
        if self.timeout_s < 0 or self.factor < 0 or self.interval_s <= 0:
            raise ConfigError("watchdog: interval_s must be above 0, the others not negative")
        if self.timeout_s and self.start_timeout_s < self.timeout_s:
            raise ConfigError(
                f"watchdog.start_timeout_s {self.start_timeout_s} is below timeout_s "
                f"{self.timeout_s}"
            )


class Watchdog:
    """Heartbeats and the watch over one rank's progress; `beat` is called by the training loop."""

    def __init__(
        self, run: RunDir, attempt: int, config: WatchdogConfig, *, rank: int, world_size: int
    ) -> None:
        self._run, self._attempt, self._config = run, attempt, config
        self._rank, self._world_size = rank, world_size
        folder = run.attempt_dir(attempt)
        self._beats, self._hang = folder / "heartbeats", folder / "hang"
        self._progress, self.step, self._phase = 0, 0, "start"
        self._since = time.monotonic()
        self._step_since: float | None = None
        self._steps_s: deque[float] = deque(maxlen=50)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._main = threading.main_thread().ident
        self._stacks: Any = None
        self._place: BinaryIO | None = None
        self._watcher: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start to watch; does nothing if the watchdog is off or watches already."""
        cancel_start_watch()
        if not self._config.timeout_s or self._thread is not None:
            return
        for folder in (self._beats, self._hang):
            folder.mkdir(parents=True, exist_ok=True)
        self._stacks = open(self._hang / f"rank-{self._rank}.txt", "w")  # noqa: SIM115
        self._since = time.monotonic()
        self._write_beat(0.0)  # a rank that is stopped before its first interval has a host too
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        self._place = scratch_file("place")
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True, chain=False)
        self._watcher = start_watcher(
            self._run.path, self._attempt, self._beats / str(self._rank), self._hang, self._rank,
            self._config.interval_s, self._place.fileno(),
        )  # fmt: skip

    def close(self) -> None:
        """Stop to watch."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * self._config.interval_s)
            if self._watcher is not None and self._watcher.stdin is not None:
                self._watcher.stdin.close()
                self._watcher.wait(10.0)
            faulthandler.unregister(STACKS_SIGNAL)
            self._stacks.close()
            if self._place is not None:
                self._place.close()
            self._thread = self._watcher = self._place = None

    def beat(self, step: int, phase: str) -> None:
        """The rank goes on: it enters a phase of a step."""
        self._progress += 1
        self.step, self._phase, self._since = step, phase, time.monotonic()
        if self._place is not None:
            write_place(self._place.fileno(), step, phase)

    def start_over(self) -> None:
        """Start-up is over: what is timed from here on are steps."""
        self._since = time.monotonic()

    def step_done(self) -> None:
        """An optimizer step has ended; its time sets the time-out of slow models."""
        now = time.monotonic()
        if self._step_since is not None:
            self._steps_s.append(now - self._step_since)
        self._step_since = now

    def timeout_s(self, *, saving: bool = False) -> float:
        """How long no progress is no hang, now."""
        if saving or len(self._steps_s) < 1:
            return self._config.start_timeout_s
        return max(self._config.timeout_s, self._config.factor * statistics.median(self._steps_s))

    def _watch(self) -> None:
        interval_s, woke = self._config.interval_s, time.monotonic()
        while not self._closed.wait(interval_s):
            now = time.monotonic()
            if now - woke > 3 * interval_s:
                self._since += now - woke  # the whole process was stopped (a suspended job)
            woke = now
            idle_s = now - self._since
            try:
                self._write_beat(idle_s)
                is_over = idle_s > self.timeout_s()
                is_over = is_over and idle_s > self.timeout_s(saving=self._saving())
            except Exception as error:  # without a watchdog the run would pass for a dead one
                print(f"warning: the watchdog could not look: {error!r}", file=sys.stderr)
                continue
            if is_over:
                self._end(idle_s)

    def _write_beat(self, idle_s: float) -> None:
        limit_s = self.timeout_s(saving=self._saving())
        beat = {**self._describe(idle_s), "time": time.time(), "limit_s": limit_s}
        path = self._beats / str(self._rank)
        try:
            # Whole, or a rank that is stopped as it writes has no host; not synced: soon replaced.
            path.with_name(f".{path.name}.tmp").write_text(json.dumps(beat))
            os.replace(path.with_name(f".{path.name}.tmp"), path)
        except OSError as error:
            print(f"warning: the watchdog cannot write: {error}", file=sys.stderr)

    def _saving(self) -> bool:
        stack = stacks_of_threads().get(self._main or -1, [])
        return any(where.endswith(_SAVING_FILES) for where, _, _ in stack)

    def _end(self, idle_s: float) -> None:
        """Say where this rank is, find who is at fault, and end the process."""
        try:
            mine = self._describe(idle_s)
            write_atomic(self._hang / f"rank-{self._rank}.json", json.dumps(mine).encode())
            self._stacks.write(text_of(stacks_of_threads()))
            self._stacks.flush()
            before = self._read_beats()
            # The others' time-outs end about now; their threads look every interval.
            self._wait_for_others(4 * self._config.interval_s)
            guilty = at_fault(self._reports(), before, self._read_beats(), self._world_size)
            self._conclude(guilty, mine, idle_s)
        except Exception as error:  # whatever happens here, the process must end
            print(f"error: the watchdog failed: {error!r}", file=sys.stderr)
        end_process(EXIT_HUNG)

    def _describe(self, idle_s: float) -> dict[str, Any]:
        stacks = stacks_of_threads()
        in_loaders = [
            stacks.get(thread.ident or -1, [])
            for name in LOADER_THREADS
            for thread in threading.enumerate()
            if thread.name == name
        ]
        waiting, where = waits_for_others(stacks.get(self._main or -1, []), in_loaders)
        return {
            "rank": self._rank, "host": socket.gethostname(), "pid": os.getpid(),
            "step": self.step, "phase": self._phase, "progress": self._progress,
            "idle_s": idle_s, "waits_for_others": waiting, "where": where,
        }  # fmt: skip

    def _wait_for_others(self, grace_s: float) -> None:
        deadline = time.monotonic() + grace_s
        while len(self._reports()) < self._world_size and time.monotonic() < deadline:
            time.sleep(0.1)

    def _reports(self) -> dict[int, dict[str, Any]]:
        return _read_all(self._hang.glob("rank-*.json"))

    def _read_beats(self) -> dict[int, dict[str, Any]]:
        return _read_all(self._beats.glob("[0-9]*"))

    def _conclude(self, guilty: list[dict[str, Any]], mine: dict[str, Any], idle_s: float) -> None:
        text = hang_text(guilty, self._hang)
        print(f"error: rank {self._rank}: no progress for {idle_s:.0f} s in step {mine['step']} "
              f"({mine['where']}); {text}", file=sys.stderr)  # fmt: skip
        if create_exclusive(self._hang / "verdict.json", json.dumps(guilty).encode()):
            self._run.write_outcome(
                self._attempt, "hung", error=text, step=mine["step"], at_fault=guilty
            )
        for one in guilty:
            if one["where"].startswith(NO_HEARTBEAT) and one.get("host") == mine["host"]:
                kill_sibling(int(one["pid"]))


def kill_sibling(pid: int) -> bool:
    """SIGKILL to a rank of the same launcher: stopped, it would keep torchrun waiting for 30 s."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if pid == os.getpid() or parent != os.getppid():
            return False
        os.kill(pid, signal.SIGKILL)
    except (OSError, ValueError, IndexError):
        return False
    return True


def watch_run(
    run: RunDir, attempt: int, config: WatchdogConfig, ranks: Ranks, stack: ExitStack
) -> Watchdog:
    """A watchdog that has begun, over the rest of the start too; closed with `stack`."""
    watchdog = Watchdog(run, attempt, config, rank=ranks.rank, world_size=ranks.world_size)
    stack.callback(watchdog.close)
    watchdog.start()
    return watchdog


def _read_all(paths: Any) -> dict[int, dict[str, Any]]:
    found = {}
    for path in paths:
        try:
            record = json.loads(path.read_text())
            found[int(record["rank"])] = record
        except (OSError, ValueError, KeyError):
            continue  # not there yet, or replaced as it was read (NFS)
    return found
