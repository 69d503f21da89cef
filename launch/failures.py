"""Which rank failed first, and what it said: attempts/<n>/failures/<node>.json.

Written by the agent of each node when its ranks have ended (launch/agent.py). Ranks whose peer is
gone fail too, seconds later; they say so, and they are not the first.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist.local_files import write_atomic

FOLDER = "failures"
TRACEBACK = "Traceback (most recent call last)"
MAX_LINES = 60
# dist/drain.py (PeerLost) and torch.
_SECONDARY = ("another rank ended without a word", "Connection closed by peer")


def how(code: int, out_of_memory: int = 0) -> str:
    """An exit code in words; a negative one is a death by that signal.

    out_of_memory: processes of this node that the kernel has killed for memory meanwhile.
    """
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if code == -signal.SIGKILL and out_of_memory:
        name += "; the node ran out of memory: oom_kill"
    return f"killed by {name}"


def oom_kills(vmstat: Path = Path("/proc/vmstat"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """How many processes the kernel has killed for memory: in this container, or on this node."""
    paths = [cgroups / "memory.events", vmstat]
    try:
        # 0::/system.slice/... is this process's group under cgroup v2.
        own = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip().lstrip("/")
        paths.insert(0, cgroups / own / "memory.events")
    except OSError:
        pass
    most = 0
    for path in paths:
        try:
            words = path.read_text().split()
        except OSError:
            continue
        pairs = zip(words[::2], words[1::2], strict=False)
        most = max(most, *(int(n) for name, n in pairs if name == "oom_kill"), 0)
    return most


def last_words(text: str) -> list[str]:
    """The last traceback of a log, to its end; without one, the last lines."""
    lines = text.splitlines()
    begins = [i for i, line in enumerate(lines) if TRACEBACK in line]
    return lines[begins[-1] :][:MAX_LINES] if begins else [line for line in lines if line][-3:]


def describe_ranks(
    codes: Mapping[int, int], logs: Mapping[int, Path], out_of_memory: int = 0
) -> list[dict[str, Any]]:
    """One record a failed rank, the first to fail in front."""
    records = []
    for rank, code in codes.items():
        log = logs.get(rank)
        try:
            said = log.read_text(errors="replace")[-20000:] if log else ""
        except OSError:
            said = ""
        secondary = any(word in said for word in _SECONDARY) or code == -signal.SIGTERM
        records.append(
            {"rank": rank, "code": code, "how": how(code, out_of_memory), "said": last_words(said),
             "log": str(log or ""), "secondary": secondary}
        )  # fmt: skip
    # Of those that are no consequence, a death by signal: a lost peer may not have been noticed.
    return sorted(records, key=lambda one: (one["secondary"], one["code"] >= 0, one["rank"]))


def write_failures(attempt: Path, node: str, records: list[dict[str, Any]]) -> None:
    """Keep what one node's ranks ended with."""
    data = json.dumps([{**one, "node": node} for one in records], indent=1) + "\n"
    name = node.replace("/", "_") or "node"
    write_atomic(attempt / FOLDER / f"{name}.json", data.encode())


def first_failure(attempt: Path) -> dict[str, Any] | None:
    """The rank of all nodes that failed first; None where no agent said anything."""
    records: list[dict[str, Any]] = []
    for path in sorted((attempt / FOLDER).glob("*.json")):
        try:
            records += json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
    order = sorted(records, key=lambda one: (one["secondary"], one["code"] >= 0, one["rank"]))
    return order[0] if order else None


def failure_line(record: Mapping[str, Any]) -> str:
    """Who failed first and its last line."""
    said = record["said"][-1] if record["said"] else ""
    return f"rank {record['rank']} failed first ({record['how']})" + (f": {said}" if said else "")
