"""The live part of `leyden check`: start dist.fabric_check on all ranks, and show what it says.

Here by torchrun, with --cluster by srun, in an allocation of its own or, inside of one, in that.
The recipe's memory is planned by `recipes.plan` in a process before, as launch has no torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist.errors import ConfigError, SetupError
from dist.fabric_rows import Row, table_text
from dist.local_files import write_atomic
from launch.cluster_config import Cluster, load_cluster
from launch.policy import EXCLUDE
from launch.processes import command_text
from launch.rooms import ROOT
from launch.torchrun import AGENT, num_gpus, torchrun_argv, torchrun_env
from launch.train import recipes, run_folder, value_of

MARK = "leyden-check "
"""As in dist.fabric_check, which launch cannot import."""
TIME_LIMIT_MIN = 15
# Values are passed by the environment and as words, so nothing is quoted twice.
_ON_NODE = """cd -- "$LEYDEN_CHECK_DIR" || exit 64
SETUP() { :
%s
}
SETUP
export PYTHONPATH="$LEYDEN_CHECK_CODE${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
exec "$LEYDEN_CHECK_PYTHON" -m dist.fabric_check "$@"
"""


@dataclass
class Asked:
    """The command line of a live check."""

    cluster: str = ""
    nodes: int = 0
    nproc: int = 0
    """Ranks of a node; 0: automatic."""
    disk_mib: int = 64
    json: bool = False
    dry_run: bool = False
    recipe: str = ""
    run: Path | None = None
    passed: list[str] = field(default_factory=list)
    """Of the recipe."""


def read_words(words: Sequence[str]) -> Asked:
    """Take our own options out; ConfigError for a number that is none."""
    asked, left = Asked(), list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if word in ("--json", "--dry-run"):
            setattr(asked, word[2:].replace("-", "_"), True)
        elif name in ("--cluster", "--nodes", "--nproc", "--disk-mib"):
            if not equals and not left:
                raise ConfigError(f"{name} needs a value; leyden check --help shows one")
            value = value if equals else left.pop(0)
            if name == "--cluster":
                asked.cluster = value
            elif value.isdigit() and int(value) > 0:
                setattr(asked, name[2:].replace("-", "_"), int(value))
            elif (name, value) != ("--nproc", "auto"):
                raise ConfigError(f"{name} {value!r} is not a number: give 1, 2, ...")
        else:
            asked.passed.append(word)
    if asked.passed and not asked.passed[0].startswith("-"):
        first = asked.passed.pop(0)
        if first in recipes() or first.endswith(".py"):
            asked.recipe = first
        else:
            asked.run = Path(first)
    elif any(not word.startswith("--data.") for word in asked.passed if word.startswith("--")):
        asked.recipe = "pretrain"  # --config and other keys without a recipe's name
    return asked


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the check is about, beside the machines."""

    run_root: str
    data: str = ""
    expected: dict[str, str] = field(default_factory=dict)
    plan_words: tuple[str, ...] = ()
    """Of recipes.plan; () to plan nothing."""
    exclude: Path | None = None
    """Where nodes to leave out are written."""


def find_target(asked: Asked, cluster: Cluster, cwd: Path) -> Target:
    """The dataset, the plan and the folders; ConfigError for a run that is not there."""
    root = value_of("--run_root", asked.passed) or cluster.run_root or "runs"
    run_root = os.path.abspath(cwd / root)
    exclude = Path(asked.cluster).with_suffix(".exclude") if asked.cluster else None
    data = value_of("--data.url", asked.passed)
    if asked.run is None:
        sized = data or value_of("--vocab_size", asked.passed)
        words = (asked.recipe, *asked.passed) if asked.recipe and sized else ()
        return Target(run_root=run_root, data=data, plan_words=words, exclude=exclude)
    run = cwd / run_folder(str(asked.run), root)
    try:
        identity = json.loads((run / "run.json").read_bytes())
    except NotADirectoryError:
        raise ConfigError(
            f"{asked.run} is a file; a script is checked by `leyden check --static {asked.run}`"
        ) from None
    except FileNotFoundError:
        raise ConfigError(
            f"{asked.run} is neither a recipe ({', '.join(recipes())}) nor a run that has started "
            f"({run} has no run.json)"
        ) from None
    recipe = str(identity["recipe"])
    words = (recipe, "--config", str(run / "config.yaml"), *asked.passed)
    return Target(
        run_root=str(run.parent), data=data or str(identity["data"]),
        expected={key: str(identity.get(key) or "") for key in ("data_digest", "tokenizer_digest")},
        plan_words=words if recipe in recipes() else (), exclude=run / EXCLUDE,
    )  # fmt: skip


def plan_record(words: Sequence[str], ranks: int, device: str) -> dict[str, Any]:
    """What `recipes.plan` says of one rank, or {"error"}."""
    argv = [sys.executable, "-m", "recipes.plan", *words]
    argv += ["--ranks", str(ranks), "--device", device, "--json"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": _path(str(ROOT))}
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    try:
        said = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": lines[-1].removeprefix("error: ")}
    names = ("needed_gib", "checkpoint_bytes", "ranks", "strategy", "keep")
    return {name: said[name] for name in names}


def _path(first: str) -> str:
    return f"{first}:{os.environ['PYTHONPATH']}" if os.environ.get("PYTHONPATH") else first


def srun_argv(cluster: Cluster, nodes: int, nproc: int, words: Sequence[str]) -> list[str]:
    """The srun command: one task a rank, in this allocation if there is one."""
    options: dict[str, Any] = {
        "nodes": nodes, "ntasks": nodes * nproc, "ntasks-per-node": nproc,
        "cpus-per-task": cluster.cpus_per_task, "gpus-per-node": cluster.gpus_per_node or "",
        "partition": cluster.partition, "account": cluster.account,
        "exclude": ",".join(cluster.exclude), "time": TIME_LIMIT_MIN,
        "mem": f"{cluster.mem_gib}G" if cluster.mem_gib else "",
        "job-name": "leyden-check", "kill-on-bad-exit": 1, "wait": 60, "export": "ALL",
    }  # fmt: skip
    argv = [f"--{name}={value}" for name, value in options.items() if value != ""]
    inside = "SLURM_JOB_ID" in os.environ
    argv += ["--overlap"] if inside else [*cluster.sbatch]
    argv += ["--exclusive"] if cluster.exclusive and not inside else []
    setup = "\n".join(cluster.setup)
    return ["srun", *argv, "bash", "-c", _ON_NODE % setup, "bash", *words]


def check(arguments: list[str], cwd: Path) -> int:
    """Measure, print the table, write what to leave out; 0, or 1 if a row says fail."""
    asked = read_words(arguments)
    cluster = load_cluster(Path(asked.cluster)) if asked.cluster else Cluster()
    target = find_target(asked, cluster, cwd)
    gpus = cluster.gpus_per_node if asked.cluster else num_gpus()
    nproc = asked.nproc or gpus or 2
    nodes = (asked.nodes or cluster.nodes) if asked.cluster else 1
    plan: dict[str, Any] = {}
    if target.plan_words and not asked.dry_run:
        print("planning the recipe's memory ...", file=sys.stderr, flush=True)
        plan = plan_record(target.plan_words, nodes * nproc, "h100" if gpus else "cpu")
    words = [
        "--run-root", target.run_root, "--scratch", cluster.scratch, "--data", target.data,
        "--expected", json.dumps(target.expected), "--plan", json.dumps(plan),
        "--disk-mib", str(asked.disk_mib), "--join-timeout-s", str(cluster.join_timeout_s),
        "--json",
    ]  # fmt: skip
    env = {
        "LEYDEN_CHECK_DIR": str(cwd), "LEYDEN_CHECK_CODE": str(ROOT),
        "LEYDEN_CHECK_PYTHON": cluster.python or sys.executable,
        "SRUN_CPUS_PER_TASK": str(cluster.cpus_per_task),
    }  # fmt: skip
    if asked.cluster:
        argv = srun_argv(cluster, nodes, nproc, words)
    else:
        env = torchrun_env(nproc, os.environ, len(os.sched_getaffinity(0)))
        env |= {"PYTHONPATH": _path(str(ROOT))}
        argv = torchrun_argv("dist.fabric_check", words, nproc=nproc, launcher=AGENT)
    if asked.dry_run:
        print(command_text(argv, env))
        return 0
    record = _run(argv, env)
    if asked.json:
        print(json.dumps(record, indent=1))
    else:
        rows = [Row(**{**row, "nodes": tuple(row["nodes"])}) for row in record["rows"]]
        print(f"{len(record['nodes'])} nodes, {nodes * nproc} ranks\n{table_text(rows)}")
    _leave_out(target.exclude, record["exclude"])
    return 0 if record["ok"] else 1


def _run(argv: list[str], env: dict[str, str]) -> dict[str, Any]:
    """The record that rank 0 printed; SetupError where none did."""
    try:
        done = subprocess.run(argv, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise SetupError(
            f"no {argv[0]} on PATH: run this on a login node, or leave --cluster out"
        ) from None
    for line in done.stdout.splitlines():
        # srun --label and torchrun may put something before it.
        _, found, text = line.partition(MARK)
        if found:
            return dict(json.loads(text))
    raise SetupError(
        f"the check ended with code {done.returncode} and said no result; what the ranks said is "
        "above"
    )


def _leave_out(path: Path | None, nodes: Sequence[str]) -> None:
    """Add nodes, one a line, to the file that submits read."""
    if path is None or not nodes:
        return
    known = path.read_text().split() if path.exists() else []
    new = [node for node in nodes if node not in known]
    if new:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, ("\n".join([*known, *new]) + "\n").encode())
    print(
        f"left out of the next submit: {', '.join(nodes)} ({path}; delete a line to allow it)",
        file=sys.stderr,
    )
