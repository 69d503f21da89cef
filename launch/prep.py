"""`leyden prep JOB`: run one Spark job as a process of its own."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

from dist.errors import ConfigError
from launch.cli import nearest
from launch.processes import command_text, run_child
from launch.rooms import ROOT


def jobs() -> dict[str, str]:
    """Job name -> first line of its docstring: the files of spark_jobs that define a main."""
    found = {}
    for path in sorted((ROOT / "spark_jobs").glob("*.py")):
        tree = ast.parse(path.read_text())
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if "main" in names:
            summary = (ast.get_docstring(tree) or "").strip().splitlines()[:1]
            found[path.stem.replace("_", "-")] = summary[0] if summary else ""
    return found


def help_text() -> str:
    """What `leyden prep --help` prints."""
    known = jobs()
    lines = "\n".join(f"  {name:<18} {what}" for name, what in known.items())
    return (
        "usage: leyden prep JOB [--dry-run] [--config FILE] [--key value ...]\n"
        "       leyden prep JOB --cluster FILE.yaml [--nodes N] [--dry-run] [--key value ...]\n\n"
        "Runs a Spark job: on this machine, or where `--master` says; with --cluster, on a Spark\n"
        "of its own on N nodes of a Slurm job. Every key of the job's config is a flag;\n"
        "`leyden prep JOB --help` lists them.\n\n"
        f"jobs:\n{lines}\n\n"
        "examples:\n"
        "  leyden prep train-tokenizer --input data/raw --output data/tokenizer"
        " --vocab_size 32000\n"
        "  leyden prep tokenize-text --input data/raw --output data/corpus"
        " --tokenizer data/tokenizer\n"
        "  leyden prep chat --input data/chats --tokenizer models/base --output data/sft\n"
        "  leyden prep tokenize-text --config corpus.yaml --dry-run\n"
    )


def prep_argv(job: str, arguments: Sequence[str], python: str = sys.executable) -> list[str]:
    """The words of the command that runs `job`."""
    return [python, "-m", f"spark_jobs.{job.replace('-', '_')}", *arguments]


def main(arguments: list[str], title: str = "") -> int:
    """Run the job and return its exit code; `title` asks for a sign of life on no terminal."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text(), end="")
        return 0 if arguments else 2
    job, rest = arguments[0], arguments[1:]
    known = jobs()
    if job not in known:
        raise ConfigError(
            f"{job!r} is not a job{nearest(job, list(known))} (jobs: {', '.join(known)})"
        )
    if any(word.partition("=")[0] == "--cluster" for word in rest):
        from launch.prep_slurm import split_cluster, submit_prep

        cluster, nodes, words = split_cluster(rest)
        return submit_prep(f"spark_jobs.{job.replace('-', '_')}", cluster, nodes, words, Path.cwd())
    dry = "--dry-run" in rest
    argv = prep_argv(job, [word for word in rest if word != "--dry-run"])
    if dry:
        print(command_text(argv))
        return 0
    return run_child(argv, title=title)
