"""A rank that hangs before its attempt has a number: meeting the others, opening the run."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
from pathlib import Path

from dist.drain import end_process
from dist.hang_stacks import stacks_of_threads, text_of, waits_for_others
from dist.local_files import create_exclusive
from dist.ranks import Ranks
from dist.run_dir import RunDir, launched_attempt

EXIT_HUNG = 1
_GRACE_S = 30.0
"""For Python to end itself; then C's own thread does."""
_start_watch: list[threading.Timer] = []


def watch_start(limit_s: float, ranks: Ranks, run: Path | None) -> None:
    """End this rank after limit_s (0: never) unless cancelled, as a Watchdog does that starts.

    Its stacks go to stderr. Rank 0 writes the outcome where the attempt's number is known: taken
    by a Slurm job, or by this process. run: the run's folder; None if it has no name yet.
    """
    cancel_start_watch()
    if not limit_s:
        return
    timer = threading.Timer(limit_s, _end_start, (ranks, run, limit_s))
    timer.daemon = True
    timer.start()
    _start_watch.append(timer)
    # C's own thread, where Python is blocked.
    faulthandler.dump_traceback_later(limit_s + _GRACE_S, exit=True)


def cancel_start_watch() -> None:
    """The attempt has begun, or there is none to begin."""
    while _start_watch:
        _start_watch.pop().cancel()
        faulthandler.cancel_dump_traceback_later()


def _end_start(ranks: Ranks, path: Path | None, limit_s: float) -> None:
    stacks = stacks_of_threads()
    waiting, where = waits_for_others(stacks.get(threading.main_thread().ident or -1, []), [])
    host = socket.gethostname()
    text = (
        f"rank {ranks.rank} on {host} hangs before the run began ({where}): nothing for "
        f"{limit_s:.0f} s (watchdog.start_timeout_s); the same command tries again"
    )
    print(f"error: {text}\n{text_of(stacks)}", file=sys.stderr)
    try:
        run = RunDir(path) if path is not None else None
        attempt = _own_attempt(run.path) if run is not None else None
        if run is not None and attempt is not None and (ranks.is_first or not waiting):
            mine = {"rank": ranks.rank, "host": host, "where": where, "phase": "start"}
            hang = run.attempt_dir(attempt) / "hang"
            hang.mkdir(exist_ok=True)
            if create_exclusive(hang / "verdict.json", json.dumps([mine]).encode()):
                run.write_outcome(attempt, "hung", error=text, step=0, at_fault=[mine])
    except Exception as error:  # whatever happens here, the process must end
        print(f"error: the watchdog failed: {error!r}", file=sys.stderr)
    end_process(EXIT_HUNG)


def _own_attempt(run: Path) -> int | None:
    """The attempt that a Slurm job took, or else this process."""
    taken = launched_attempt(run)
    if taken is not None:
        return taken
    for path in run.glob("attempts/*/env.json"):
        record = json.loads(path.read_text())
        if (record["pid"], record["host"]) == (os.getpid(), socket.gethostname()):
            return int(path.parent.name)
    return None
