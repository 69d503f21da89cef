"""Runs of the real recipe on the test cluster: submitted by the command, watched, injured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dist.config import to_yaml
from tests.rank_processes import config, watches
from tests.slurm_cluster import Cluster, wait_for

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVE_EVERY = 120, 10
CHANGES: dict[str, Any] = {"max_steps": STEPS, "save_every_steps": SAVE_EVERY, "keep": 3}
GONE_WITHIN_S = 15.0
# Starting four ranks takes 15 s on two quiet cores, and a minute while others compute.
STARTS_WITHIN_S = 150.0


class SlurmRun:
    """One run: its folder `runs/NAME` in `work`, its job, its processes."""

    def __init__(
        self, cluster: Cluster, work: Path, url: str, name: str = "run", *, steps: int = STEPS
    ) -> None:  # fmt: skip
        self.cluster, self.work, self.name = cluster, work, name
        self.folder = work / "runs" / name
        work.mkdir(parents=True, exist_ok=True)
        (work / "cluster.yaml").write_text("nodes: 2\ncpus_per_task: 1\ntime_limit_min: 20\n")
        (work / "small.yaml").write_text(
            to_yaml(config(url, Path("x"), **{**CHANGES, "max_steps": steps}))
        )
        self.job = ""

    def leyden(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the command where the run was submitted from."""
        return subprocess.run(
            [sys.executable, "-m", "launch.cli", *words],
            cwd=self.work,
            env={**os.environ, **self.cluster.env, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def submit(self, target: str = "pretrain", *words: str, recipe: bool = True) -> str:
        """Submit the run; returns the job id."""
        done = self.try_submit(target, *words, recipe=recipe)
        assert done.returncode == 0, done.stderr
        self.job = done.stdout.split(" as job ")[1].split()[0].rstrip(",")
        return self.job

    def try_submit(
        self, target: str, *words: str, recipe: bool = True
    ) -> subprocess.CompletedProcess[str]:
        own = ["--config", "small.yaml"] if recipe else []
        own += ["--run", self.name, "--cluster", "cluster.yaml", "--allow", "L09"]
        nproc = [] if "--nproc" in words else ["--nproc", "2"]
        return self.leyden("submit", target, *own, *nproc, *words)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Whole records of a log of the run."""
        try:
            text = (self.folder / name).read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.split("\n")[:-1] if line]

    def read(self, name: str) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / name).read_text()))
        except FileNotFoundError:
            return {}

    def steps_of(self, attempt: int) -> list[int]:
        """Steps that an attempt completed."""
        return [x["step"] for x in self.lines("consumed.jsonl") if x["attempt"] == attempt]

    def wait_steps(self, attempt: int, count: int) -> None:
        """Wait until an attempt has completed `count` steps."""

        def there() -> bool:
            if self.cluster.ended(self.job):
                raise AssertionError(f"{self.job} ended: {self.said()}")
            return len(self.steps_of(attempt)) >= count

        wait_for(there, STARTS_WITHIN_S, f"{count} steps of attempt {attempt}: {self.said()}")

    def wait_ended(self, state: str, timeout_s: float = STARTS_WITHIN_S) -> None:
        """Wait until the job is over, in this state."""
        try:
            wait_for(lambda: self.cluster.ended(self.job), timeout_s, "end of the job")
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {self.said()}") from None
        assert self.cluster.state(self.job) == state, self.said()

    def said(self) -> str:
        """The end of the jobs' logs."""
        return "\n".join(p.read_text()[-3000:] for p in sorted(self.folder.glob("slurm-*.out")))

    def processes(self, **settings: str) -> list[int]:
        """Live processes of this run whose environment also holds these settings."""
        wanted = {"LEYDEN_RUN_DIR": str(self.folder), **settings}
        words = [f"{name}={value}".encode() for name, value in wanted.items()]
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                environ = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue  # ended meanwhile
            if all(word in environ for word in words):
                found.append(int(entry.name))
        return found

    def rank(self, rank: int) -> int:
        """Process id of a rank."""
        (pid,) = [pid for pid in self.processes(RANK=str(rank)) if not watches(pid)]
        return pid

    def agent(self, node: str) -> int:
        """Process id of torchrun's agent on a node."""
        (pid,) = [
            pid
            for pid in self.processes(SLURMD_NODENAME=node)
            if b"launch.agent" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        ]
        return pid

    def batch_shell(self) -> int:
        """Process id of the job's script."""
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                environ = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            is_script = len(words) > 1 and words[1].endswith(b"/slurm_script")
            if is_script and f"SLURM_JOB_ID={self.job}".encode() in environ:
                return int(entry.name)
        raise AssertionError(f"no batch shell of job {self.job}")

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def assert_gone(self, attempt: int) -> float:
        """No process of an attempt is left after 15 s; returns the seconds that it took."""
        since = time.monotonic()
        wait_for(
            lambda: not self.processes(LEYDEN_ATTEMPT=str(attempt)), GONE_WITHIN_S,
            f"processes of attempt {attempt} to end: {self.processes(LEYDEN_ATTEMPT=str(attempt))}",
        )  # fmt: skip
        return time.monotonic() - since
