"""End what a killed `leyden train` left behind: processes that carry its run in their environment.

Only this user's own, only those that `leyden train` started (both names are set), never this
process or one that it descends from. The front holds the run's lock when it asks, so nobody who
works on the run is among them.
"""

from __future__ import annotations

import os
from pathlib import Path

from launch.processes import TAG, end_processes

RUN, NODE = "LEYDEN_RUN", "LEYDEN_NODE"
GRACE_S = 15.0


def leftovers(run: str, node: str = "") -> dict[int, str]:
    """Process id -> command of what earlier launches of a run left on this machine.

    With `node` those of another node of the same run are left alone (nodes may share a machine).
    """
    found = {}
    spared = ancestors()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in spared:
            continue
        try:
            if entry.stat().st_uid != os.getuid():
                continue
            words = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            continue  # ended meanwhile
        settings = dict(word.split(b"=", 1) for word in words if b"=" in word)
        other = node and settings.get(NODE.encode(), os.fsencode(node)) != os.fsencode(node)
        ours = settings.get(RUN.encode()) == os.fsencode(run) and TAG.encode() in settings
        if ours and not other:
            found[int(entry.name)] = os.fsdecode(command).strip()
    return found


def ancestors() -> set[int]:
    """This process, its parent, and so on up."""
    found: set[int] = set()
    pid = os.getpid()
    while pid > 0 and pid not in found:
        found.add(pid)
        try:
            # The command, in brackets, may hold blanks and brackets itself.
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
    return found


def end_leftovers_of(run: str, node: str = "", grace_s: float = GRACE_S) -> list[str]:
    """SIGTERM, which ranks answer with a checkpoint, then SIGKILL; what it ended, one line each."""
    commands: dict[int, str] = {}

    def find() -> set[int]:
        left = leftovers(run, node)
        commands.update(left)
        return set(left)

    end_processes(find, grace_s)
    return [f"process {pid} ({command[:100]})" for pid, command in commands.items()]
