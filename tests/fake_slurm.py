"""Slurm's commands as small scripts on PATH, with states that a test sets: no daemon needed.

    squeue      prints the lines of state/squeue whose last field is among the --name that was asked
    sbatch      logs its words, prints 101, 102, ...; state/sbatch.error makes it refuse
    scancel     logs its words
    scontrol    show hostnames: the nodes of state/nodes; show node: state/node-NAME; show config:
                state/config; requeue and update are logged
    srun        drops its options and runs the command as task 0 of node 0

state/NAME.error makes a command fail with that text; state/NAME.calls is what it was given.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_COMMON = """#!/bin/bash
name=$(basename "$0")
printf '%s\\n' "$*" >> "$FAKE_SLURM/$name.calls"
if [ -e "$FAKE_SLURM/$name.error" ]; then cat "$FAKE_SLURM/$name.error" >&2; exit 1; fi
"""
_SCRIPTS = {
    "sbatch": 'echo $((100 + $(wc -l < "$FAKE_SLURM/sbatch.calls")))\n',
    "scancel": "",
    "squeue": """
for word; do case $word in --name=*) wanted=${word#--name=} ;; esac; done
[ -e "$FAKE_SLURM/squeue" ] || exit 0
while IFS= read -r line; do
  [[ -z "${wanted:-}" || ",$wanted," == *",${line##*|},"* ]] && printf '%s\\n' "$line"
done < "$FAKE_SLURM/squeue"
exit 0
""",
    "scontrol": """
case "$1 ${2:-}" in
  "show hostnames") cat "$FAKE_SLURM/nodes" ;;
  "show node")
    IFS=, read -ra names <<< "${@: -1}"
    for name in "${names[@]}"; do cat "$FAKE_SLURM/node-$name"; done ;;
  "show config") cat "$FAKE_SLURM/config" ;;
  "show partition") cat "$FAKE_SLURM/partition" ;;
esac 2>/dev/null
exit 0
""",
    "srun": """
while [[ "${1:-}" == --* ]]; do shift; done
export SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURMD_NODENAME=r1
exec "$@"
""",
}


class FakeSlurm:
    """The state folder of the fakes."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.bin = folder / "bin"
        self.state.mkdir()
        self.bin.mkdir()
        for name, body in _SCRIPTS.items():
            (self.bin / name).write_text(_COMMON + body)
            (self.bin / name).chmod(0o755)
        (self.state / "nodes").write_text("r1\n")

    def set(self, name: str, text: str) -> None:
        """Write a file of the state."""
        (self.state / name).write_text(text)

    def calls(self, name: str) -> list[str]:
        """What a command was given, one line a call."""
        path = self.state / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def queue(self, *jobs: tuple[str, str, str, str]) -> None:
        """Jobs as (job id, state, reason, job name); they end at a fixed time."""
        lines = [f"{i}|{s}|{r}|N/A|2026-11-22T12:00:00|r[1-2]|{n}" for i, s, r, n in jobs]
        self.set("squeue", "".join(f"{line}\n" for line in lines))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put the fakes in front on PATH."""
        monkeypatch.setenv("PATH", f"{self.bin}:{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_SLURM", str(self.state))
