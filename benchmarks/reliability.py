"""What a fault costs a run under `leyden train`: seconds until it is told, until training goes on,
steps lost, processes left.

    python -m benchmarks.reliability [--trials 3] [--nproc 2] [--save-every 5]

A small model (34k parameters) trains on gloo, saves every --save-every steps and is hit at a step
drawn at random: SIGKILL to a rank, to rank 0, to torchrun's agent; a rank that stops to work; a
request to stop. Reported over the trials: median and worst. `told`: from the fault to the line that
names the rank; `again`: to the first new step of the next attempt, which is mostly the start of the
processes; `lost`: steps that were done twice. Rows of docs/reliability.md; those that need Slurm
are measured by tests/test_slurm_runs.py and tests/test_slurm_long.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist.config import to_yaml
from tests.make_dataset import write_dataset
from tests.rank_processes import config, processes_of

ROOT = Path(__file__).resolve().parent.parent
GOES_ON_WITHIN_S = 240.0


def wait_for(true: Callable[[], Any], what: str) -> float:
    """Seconds on the clock when `true()` first holds."""
    until = time.monotonic() + GOES_ON_WITHIN_S
    while not true():
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {GOES_ON_WITHIN_S:.0f} s")
        time.sleep(0.01)
    return time.monotonic()


class Run:
    """One run under `leyden train`, hit once."""

    def __init__(self, work: Path, name: str, nproc: int, *more: str) -> None:
        self.folder, self.log = work / "runs" / name, work / f"{name}.log"
        words = ["train", "pretrain", "--nproc", str(nproc), "--config", "small.yaml"]
        with open(self.log, "wb") as log:
            self.front = subprocess.Popen(
                [sys.executable, "-m", "launch.cli", *words, "--run", name, *more],
                cwd=work, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def steps(self, attempt: int) -> list[int]:
        """Steps that an attempt has completed."""
        try:
            lines = (self.folder / "consumed.jsonl").read_text().split("\n")[:-1]
        except FileNotFoundError:
            return []
        records = [json.loads(line) for line in lines if line]
        return [one["step"] for one in records if one["attempt"] == attempt]

    def pid(self, who: str) -> int:
        """Process of a rank ("0", "1", ...) or of torchrun's agent ("agent")."""
        for pid in processes_of(str(self.folder)):
            try:
                environ = Path(f"/proc/{pid}/environ").read_text().split("\0")
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            except OSError:
                continue
            is_rank = any(item.startswith("RANK=") for item in environ)
            if f"RANK={who}" in environ or (
                who == "agent" and not is_rank and "launch.agent" in words
            ):
                return pid
        raise ProcessLookupError(who)

    def end(self) -> None:
        """End what is left of it."""
        self.front.kill()
        self.front.wait()
        for pid in processes_of(str(self.folder)):
            os.kill(pid, signal.SIGKILL)


def hit(work: Path, name: str, nproc: int, who: str, signum: int, at: int) -> dict[str, float]:
    """Hit one run when it has done `at` steps; what that cost."""
    stopping = signum == signal.SIGTERM
    run = Run(work, name, nproc, *(["--max-restarts", "0"] if who == "agent" else []))
    try:
        wait_for(lambda: len(run.steps(0)) >= at, f"step {at}")
        victim = run.front.pid if who == "front" else run.pid(who)
        old = set(processes_of(str(run.folder))) - {run.front.pid}  # all of this attempt
        since = time.monotonic()
        os.kill(victim, signum)
        if stopping or who == "agent":
            told = wait_for(lambda: run.front.poll() is not None, "the end") - since
            left = len(processes_of(str(run.folder)))
            if stopping:
                outcome = json.loads((run.folder / "outcome.json").read_text())
                return {"told": told, "lost": run.steps(0)[-1] + 1 - outcome["step"], "left": left}
            return {"told": told, "left": left}
        said = wait_for(lambda: "failed first" in run.log.read_text(), "who failed first")
        again = wait_for(lambda: run.steps(1), "the next attempt's first step")
        return {
            "told": said - since, "again": again - since,
            "lost": run.steps(0)[-1] + 1 - run.steps(1)[0],
            "left": len(old & set(processes_of(str(run.folder)))),
        }  # fmt: skip
    finally:
        run.end()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=5)
    options = parser.parse_args()
    cases = {
        "SIGKILL of the last rank": (str(options.nproc - 1), signal.SIGKILL),
        "SIGKILL of rank 0": ("0", signal.SIGKILL),
        "SIGSTOP of the last rank (watchdog 10 s)": (str(options.nproc - 1), signal.SIGSTOP),
        "SIGKILL of the agent": ("agent", signal.SIGKILL),
        "stop on request (SIGTERM)": ("front", signal.SIGTERM),
    }
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        url = write_dataset(
            work / "data", documents=40, num_train_shards=2, with_tokenizer=False
        ).storage.url
        made = config(url, Path("x"), max_steps=100_000, save_every_steps=options.save_every)
        text = to_yaml(made)
        watch = "watchdog:\n  timeout_s: 10.0\n  factor: 0.0\n  interval_s: 1.0\n"
        head, _, tail = text.partition("watchdog:\n")
        rest = tail.split("\n")
        while rest and rest[0].startswith(" "):
            rest.pop(0)
        (work / "small.yaml").write_text(head + watch + "\n".join(rest))
        print(f"{options.trials} trials each, {options.nproc} ranks, a save every "
              f"{options.save_every} steps, load {os.getloadavg()[0]:.1f}")  # fmt: skip
        print(f"{'fault':<42} {'told s':>12} {'again s':>12} {'lost steps':>12} {'left':>6}")
        for number, (case, (who, signum)) in enumerate(cases.items()):
            found = [
                hit(work, f"case-{number}-{trial}", options.nproc, who, signum,
                    options.save_every + draw.randrange(1, 2 * options.save_every))
                for trial in range(options.trials)
            ]  # fmt: skip
            cells = [f"{case:<42}"]
            for name, width in (("told", 12), ("again", 12), ("lost", 12), ("left", 6)):
                values = [one[name] for one in found if name in one]
                shown = "-"
                if values:
                    shown = f"{statistics.median(values):.3g} ({max(values):.3g})"
                cells.append(shown.rjust(width))
            print(" ".join(cells), flush=True)


if __name__ == "__main__":
    main()
