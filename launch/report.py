"""`leyden report RUN`: one HTML file on a run, its charts, attempts, data and environment."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Write the report and say where it is."""
    parser = argparse.ArgumentParser(
        prog="leyden report",
        description="Write a run's report: one HTML file that needs nothing else, with the loss, "
        "throughput, data wait, attempts and goodput, the data's lineage and the environment.",
        epilog="examples: leyden report quickstart    leyden report runs/mine --output mine.html",
    )
    parser.add_argument("run", metavar="RUN", help="a run's name (runs/RUN) or its folder")
    parser.add_argument("--output", metavar="FILE", help="where to write it (RUN/report.html)")
    options = parser.parse_args(arguments)
    from dist.report import write_report
    from dist.run_history import find_run

    run = find_run(options.run)
    path, said = write_report(run, Path(options.output) if options.output else None)
    print(f"{run.path}: {said}")
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    from dist.errors import run_main

    run_main(lambda: main(sys.argv[1:]))
