"""A process beside each rank, for hangs in which the rank's own watchdog thread cannot run.

    python -S -m dist.hang_watcher JSON      started by dist.watchdog; ends with its rank

C code that keeps the interpreter's lock, or a stopped process, silences every Python thread: the
heartbeat stands still. When it has done so for the rank's time-out, this process asks the rank's
faulthandler for the stacks (its signal handler is C and needs no lock), writes the outcome `hung`
and kills the rank. Only the standard library; 10 MB and no CPU time to speak of.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STACKS_SIGNAL = signal.SIGUSR2
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_DUMP_S = 2.0
_PLACE_BYTES = 64


def start_watcher(
    run: Path, attempt: int, beat: Path, hang: Path, rank: int, interval_s: float, place: int
) -> subprocess.Popen[bytes]:
    """Watch this process; close the watcher's stdin to end it.

    place: file descriptor where the rank writes its step and phase at each beat, by write_place;
    the heartbeat is as old as its interval.
    """
    words = {
        "run": str(run.absolute()), "attempt": attempt, "beat": str(beat.absolute()),
        "hang": str(hang.absolute()), "rank": rank, "interval_s": interval_s, "pid": os.getpid(),
        "place": place,
    }  # fmt: skip
    root = str(Path(__file__).resolve().parent.parent)
    # A Ctrl-C or SIGTERM for the ranks is not for it.
    return subprocess.Popen(
        [sys.executable, "-S", "-m", "dist.hang_watcher", json.dumps(words)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=root, start_new_session=True,
        pass_fds=(place,), env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip


def watch(words: dict[str, Any]) -> None:
    """Until the rank has ended, or has been ended."""
    interval_s, pid, beat = float(words["interval_s"]), int(words["pid"]), Path(words["beat"])
    seen: Any = None
    limit_s = float("inf")
    since = woke = time.monotonic()
    while os.getppid() == pid:
        if select.select([0], [], [], interval_s)[0]:
            return  # closed: by the watchdog, or by the rank's end
        now = time.monotonic()
        if now - woke > 3 * interval_s:
            since += now - woke  # this process was stopped too (a suspended job)
        woke = now
        found = _read(beat)
        if found and found.get("time") != seen:
            seen, since, limit_s = found["time"], now, float(found["limit_s"])
        # The rank's own thread comes first wherever it can run.
        if now - since > limit_s + 3 * interval_s:
            end_rank(words, now - since)
            return


def end_rank(words: dict[str, Any], silent_s: float) -> None:
    """Say where the rank is blocked, write the outcome if no rank has, and kill it."""
    from dist.hang_stacks import NO_HEARTBEAT, hang_text
    from dist.local_files import create_exclusive, write_atomic
    from dist.run_dir import RunDir

    pid, rank, hang = int(words["pid"]), int(words["rank"]), Path(words["hang"])
    try:
        # First: the signal that asks for the stacks may wake what the rank is blocked in.
        beat = _read(Path(words["beat"])) or {"rank": rank}
        step_and_phase = read_place(int(words["place"]))
        where = blocked_at(pid, hang / f"rank-{rank}.txt")
        mine = {
            **beat, **step_and_phase,
            "where": f"{NO_HEARTBEAT}{where and f', at {where}'}", "waits_for_others": False,
        }  # fmt: skip
        write_atomic(hang / f"rank-{rank}.json", json.dumps(mine).encode())
        text = hang_text([mine], hang)
        print(f"error: rank {rank}: no sign of life for {silent_s:.0f} s; {text}", file=sys.stderr)
        if create_exclusive(hang / "verdict.json", json.dumps([mine]).encode()):
            RunDir(words["run"]).write_outcome(
                words["attempt"], "hung", error=text, step=mine.get("step", 0), at_fault=[mine]
            )
    except Exception as error:  # whatever happens here, the rank must end
        print(f"error: the watcher of rank {rank} failed: {error!r}", file=sys.stderr)
    if os.getppid() == pid:
        os.kill(pid, signal.SIGKILL)


def write_place(file: int, step: int, phase: str) -> None:
    """Say where this rank is; a microsecond."""
    os.pwrite(file, f"{step} {phase}".encode().ljust(_PLACE_BYTES), 0)


def read_place(file: int) -> dict[str, Any]:
    """`step` and `phase` as last written; {} before the first."""
    step, _, phase = os.pread(file, _PLACE_BYTES, 0).decode().strip().partition(" ")
    return {"step": int(step), "phase": phase} if step else {}


def blocked_at(pid: int, stacks: Path) -> str:
    """Innermost Python frame of the rank's main thread, by its faulthandler; '' if it is silent."""
    size = stacks.stat().st_size
    os.kill(pid, STACKS_SIGNAL)
    deadline = time.monotonic() + _DUMP_S
    while time.monotonic() < deadline and stacks.stat().st_size == size:
        time.sleep(0.05)
    time.sleep(0.05)
    return innermost(stacks.read_text(errors="replace")[size:])


def innermost(dump: str) -> str:
    """`file:line in function` of the main thread, which faulthandler writes last."""
    threads = re.split(r"^(?:Current t|T)hread 0x.*$", dump, flags=re.MULTILINE)
    found = _FRAME.search(threads[-1])
    return f"{found[1]}:{found[2]} in {found[3]}" if found else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}  # not there yet, or replaced as it was read (NFS)
    return record if isinstance(record, dict) else {}


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    watch(json.loads(sys.argv[1]))
