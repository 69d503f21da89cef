"""What a profiler's trace says: which operators and kernels cost most, and where the host waited.

Reads the Chrome trace that dist.profiling writes; names as torch's profiler (Kineto) gives them.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist.errors import ConfigError

# The host asks for a value, or stands still until the device has done all of a stream.
_WAITS = {
    *("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"),
    *("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
}
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One name's part of a trace."""

    name: str
    calls: int
    seconds: float
    """Of the device for kernels; of the thread for operators, without those that they call."""
    share: float
    """Of all seconds of its kind."""


def read_trace(path: Path | str) -> list[dict[str, Any]]:
    """The complete events of a trace: name, cat, ts and dur (microseconds), pid, tid."""
    try:
        events = json.loads(Path(path).read_text())["traceEvents"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} is no trace of torch's profiler ({error})") from None
    return [event for event in events if event.get("ph") == "X"]


def host_waits(events: list[dict[str, Any]]) -> dict[str, int]:
    """How often the host waited for the device, by name; {} for a device that is never waited for.

    A copy to pinned memory is asynchronous and does not count; the profiler's own last
    cudaDeviceSynchronize neither.
    """
    found: Counter[str] = Counter()
    for event in events:
        name = str(event["name"])
        to_pageable = "DtoH" in name and "Pinned" not in name
        if name in _WAITS or to_pageable:
            found[name] += 1
    return dict(found)


def top_costs(events: list[dict[str, Any]], count: int = 10) -> list[Cost]:
    """The costliest kernels, or, in a trace without a device, the costliest operators."""
    kernels = [one for one in events if one.get("cat") in _KERNELS]
    spent = [(one["name"], float(one["dur"])) for one in kernels] or _own_times(events)
    total = sum(microseconds for _, microseconds in spent) or 1.0
    calls: Counter[str] = Counter(name for name, _ in spent)
    sums: dict[str, float] = {}
    for name, microseconds in spent:
        sums[name] = sums.get(name, 0.0) + microseconds
    dearest = sorted(sums.items(), key=lambda one: -one[1])[:count]
    return [
        Cost(name=name, calls=calls[name], seconds=cost / 1e6, share=cost / total)
        for name, cost in dearest
    ]


def _own_times(events: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """(name, microseconds) of each CPU operator without those that it called."""
    threads: dict[Any, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "cpu_op":
            threads.setdefault((event.get("pid"), event.get("tid")), []).append(event)
    found = []
    for thread in threads.values():
        own = [float(event["dur"]) for event in thread]
        # By start, the longer first: an operator comes after the one that called it.
        order = sorted(range(len(thread)), key=lambda i: (thread[i]["ts"], -thread[i]["dur"]))
        open_: list[int] = []
        for i in order:
            start, length = float(thread[i]["ts"]), float(thread[i]["dur"])
            while open_ and _end(thread[open_[-1]]) <= start:
                open_.pop()
            if open_:
                own[open_[-1]] -= length
            open_.append(i)
        found += [(thread[i]["name"], max(own[i], 0.0)) for i in order]
    return found


def _end(event: dict[str, Any]) -> float:
    return float(event["ts"]) + float(event["dur"])
