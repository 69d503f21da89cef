"""Who hangs, read from stacks and heartbeats: pure functions, for dist.watchdog and its watcher."""

from __future__ import annotations

import gc
import operator
import os
import sys
import tempfile
import threading
from itertools import accumulate, chain, repeat, takewhile, tee
from pathlib import Path
from typing import Any, BinaryIO, cast

NO_HEARTBEAT = "no heartbeat: stopped, dead, or Python blocked"
# Where a thread waits for other ranks: files of torch, and functions of ours.
_WAITING_FILES = ("torch/distributed/", "torch/autograd/", "torch/_ops.py", "torch/nn/parallel/")
_WAITING_CALLS = (("checkpoint_callback.py", "_settle"), ("checkpoint.py", "wait"))
_CHANNEL = "dist/channel.py"
_WAITS = ("/threading.py", "/queue.py", "/concurrent/futures/")
LOADER_THREADS = ("agree", "gather")
"""Of dist/loader.py, in the order in which one that does not wait for the other is to blame."""


Stack = list[tuple[str, str, int | None]]
_PLACE = operator.attrgetter("f_code.co_filename", "f_code.co_name", "f_lineno")


def stacks_of_threads() -> dict[int, Stack]:
    """(file, function, line) of each thread's calls, innermost first; by the thread's ident.

    faulthandler would not do: it walks the list of threads while C++ (autograd, gloo) adds one to
    it, and the process ends by SIGSEGV. Nor a loop in Python: where another thread goes on between
    two frames, or while a garbage collection runs finalizers, a frame's caller may be any object
    (CPython 3.11). So one call of C consumes these iterators, without collections.
    """
    found = map(operator.call, (sys._current_frames,))
    items, tops = tee(chain.from_iterable(map(dict.items, found)))
    idents = map(operator.itemgetter(0), items)
    links = map(chain, zip(map(operator.itemgetter(1), tops)), repeat(repeat("f_back")))
    calls = map(takewhile, repeat(bool), map(accumulate, links, repeat(getattr)))
    stacks = zip(idents, map(list, map(map, repeat(_PLACE), calls)), strict=True)
    collects = gc.isenabled()
    gc.disable()
    try:
        return dict(stacks)
    finally:
        if collects:
            gc.enable()


def scratch_file(name: str) -> BinaryIO:
    """A file in no folder, in memory where the system has such; gone when the last holder ends."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create(name), "w+b")
    return cast("BinaryIO", tempfile.TemporaryFile())


def text_of(stacks: dict[int, Stack]) -> str:
    """Stacks as faulthandler writes them, with the threads' names."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread 0x{ident:016x} ({names.get(ident, 'not of Python')}), innermost call first:\n"
        + "".join(f'  File "{file}", line {line} in {function}\n' for file, function, line in stack)
        for ident, stack in stacks.items()
    )


def waits_for_others(main: Stack, loaders: list[Stack]) -> tuple[bool, str]:
    """Whether a rank's stacks say that it waits for other ranks, and its innermost place.

    A main thread that waits for data stands where a loader's thread stands: the first one that does
    not itself wait for another thread to give or take something (validation data, read ahead).
    """
    stack = main
    if _at_channel(main):
        stack = ([one for one in loaders if not _at_channel(one)] or loaders or [main])[0]
    if not stack:
        return False, "no Python frame"
    # threading.wait and the like are where a place of ours waits, not where it is.
    named = [one for one in stack if not any(part in one[0] for part in _WAITS)]
    file, function, line = (named or stack)[0]
    waiting = any(part in file for part in _WAITING_FILES) or any(
        file.endswith(name) and function == call for name, call in _WAITING_CALLS
    )
    return waiting, f"{file}:{line} in {function}"


def _at_channel(stack: Stack) -> bool:
    return any(file.endswith(_CHANNEL) for file, _, _ in stack)


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
