"""Every figure, one after another, in sizes that take half an hour on two cores: `make bench`.

    python -m benchmarks.run_all [--only start,loader] [--output build/benchmarks] [--data DATASET]

What a benchmark prints goes to the screen and to OUTPUT/<name>.txt, which begins with the command,
the machine, the date and the load average at the start: above the number of cores, the figures
say little. docs/benchmarks holds the files that docs/benchmarks.md cites.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURES = {
    "help": "",
    "start": "",
    "loader": "--repeat 2",
    "remote": "--mb 512 --repeat 1 --global-steps 2",
    "step": "--steps 40 --repeat 2",
    "checkpoint": "--steps 50 --repeat 3",
    "guard_meter": "--repeat 3",
    "compile": "--steps 20 --repeat 1",
    "restart": "--repeat 1",
    "plan_memory": "",
    "status": "",
    "reliability": "--trials 1",
    "prep": "--repeat 1",
    "sft": "--repeat 1",
    "gpu": "",
}
NOT_HERE = 4
"""Exit code of a benchmark that needs another machine."""
NEED_DATA = ("step", "checkpoint", "guard_meter", "compile", "restart", "plan_memory")


def machine() -> str:
    """Cores and processor."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{len(os.sched_getaffinity(0))} cores ({model or 'unknown'})"


def run(name: str, words: list[str], output: Path) -> int:
    """Run one benchmark; its exit code."""
    command = ["-m", f"benchmarks.{name}", *words]
    facts = f"{machine()}, {time.strftime('%Y-%m-%d %H:%M')}, load {os.getloadavg()[0]:.1f}"
    with open(output / f"{name}.txt", "w", encoding="utf-8") as file:

        def tell(line: str) -> None:
            print(line, end="", flush=True)
            file.write(line)

        tell(f"$ python {' '.join(command)}   # {facts}\n")
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            tell(line)
        return process.wait()


def main() -> int:
    """1 if a benchmark failed; the others run nevertheless."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(FIGURES))
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "benchmarks")
    parser.add_argument("--data", default="data/quickstart/dataset", help="for those that train")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.only.split(","):
        words = FIGURES[name].split()
        if name in NEED_DATA:
            if not (ROOT / args.data / "LATEST").is_file():
                print(f"{name}: no dataset at {args.data}; run `make quickstart`, or pass --data")
                failed.append(name)
                continue
            words += ["--data", args.data]
        code = run(name, words, args.output)
        if code == NOT_HERE:
            print(f"{name}: not run, this machine lacks what it measures")
        elif code != 0:
            failed.append(name)
    if failed:
        print(f"failed or left out: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
