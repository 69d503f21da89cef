"""Who hangs, read from stacks and heartbeats: pure functions, for dist.watchdog and its watcher."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import FrameType
from typing import Any

NO_HEARTBEAT = "no heartbeat: stopped, dead, or Python blocked"
# Where a thread waits for other ranks: files of torch, and functions of ours.
_WAITING_FILES = ("torch/distributed/", "torch/autograd/", "torch/_ops.py", "torch/nn/parallel/")
_WAITING_CALLS = (("checkpoint_callback.py", "_settle"), ("checkpoint.py", "wait"))
_LOADER = "dist/loader.py"
_FULL = ("put", "wait_begun")


def stack_of(frame: FrameType | None) -> list[tuple[str, str, int]]:
    """(file, function, line) of a frame and its callers, innermost first."""
    if frame is None:
        return []
    walked = traceback.walk_stack(frame)
    return [(one.f_code.co_filename, one.f_code.co_name, line) for one, line in walked]


def waits_for_others(
    main: list[tuple[str, str, int]], loaders: list[list[tuple[str, str, int]]]
) -> tuple[bool, str]:
    """Whether a rank's stacks say that it waits for other ranks, and its innermost place.

    A main thread that waits for data stands where a loader's thread stands: one that does not
    itself wait for the main thread to take what it has (validation data, read ahead).
    """
    stack = main
    if any(f.endswith(_LOADER) and name == "get" for f, name, _ in main):
        empty = [one for one in loaders if not any(name in _FULL for _, name, _ in one)]
        stack = (empty or loaders or [main])[0]
    if not stack:
        return False, "no Python frame"
    # threading.wait and the like are where a place of ours waits, not where it is.
    named = [one for one in stack if "/threading.py" not in one[0] and "/queue.py" not in one[0]]
    file, function, line = (named or stack)[0]
    waiting = any(part in file for part in _WAITING_FILES) or any(
        file.endswith(name) and function == call for name, call in _WAITING_CALLS
    )
    return waiting, f"{file}:{line} in {function}"


def at_fault(
    reports: dict[int, dict[str, Any]], before: dict[int, dict[str, Any]],
    after: dict[int, dict[str, Any]], world_size: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """The ranks that hang: without a heartbeat, else not waiting for others, else behind.

    reports: what ranks wrote at their time-out; before, after: heartbeats some intervals apart.
    """
    silent = [
        {**after.get(rank, {"rank": rank}), "where": NO_HEARTBEAT}
        for rank in range(world_size)
        if rank not in reports
        and before.get(rank, {}).get("time") == after.get(rank, {}).get("time")
    ]
    if silent:
        return silent
    known = [one for _, one in sorted({**after, **reports}.items())]
    busy = [one for one in known if not one["waits_for_others"]]
    if busy and (len(busy) < len(known) or world_size == 1):
        return busy
    least = min(one["progress"] for one in known)
    return [one for one in known if one["progress"] == least]


def hang_text(guilty: list[dict[str, Any]], folder: Path) -> str:
    """Who hangs, in one line."""
    named = "; ".join(
        f"rank {one['rank']} on {one.get('host', 'an unknown host')} hangs in step "
        f"{one.get('step', '?')}, {one.get('phase', 'start')} ({one['where']})"
        for one in guilty[:4]
    )
    more = f" and {len(guilty) - 4} more ranks" if len(guilty) > 4 else ""
    then = "the same command goes on from the newest checkpoint"
    return f"{named}{more}; stacks are in {folder}; {then}"
