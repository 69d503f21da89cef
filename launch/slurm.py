"""The text of a Slurm job, as a pure function of what is asked for and of the cluster.

templates/train.sbatch holds everything that happens in a job; only its two marked parts are
written here: the #SBATCH lines, and settings that bash reads back byte for byte.
"""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dist.errors import ConfigError
from launch.cluster_config import Cluster
from launch.sweep import PLACE, Task, at

TEMPLATE = Path(__file__).parent / "templates" / "train.sbatch"
Chain = Literal["requeue", "singleton"]
LEAD_DEFAULT_S = 300
LEAD_LEAST_S = 60
# sbatch splits its lines at blanks, ends them at # and reads quotes in its own way.
_PLAIN = re.compile(r"[A-Za-z0-9_.,:/=@+\[\]()*&|!%-]+")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_.,:/=@+-]+")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One run as a job: what to start, where its folder is, on how many ranks."""

    target: str
    """A module (recipes.pretrain) or the path of a .py file."""
    arguments: tuple[str, ...]
    """Of the recipe, byte for byte."""
    run_dir: str
    """The run's folder, an absolute path that every node sees."""
    work_dir: str
    """Where relative paths of the arguments start."""
    code: str
    """First on PYTHONPATH: the snapshot of the rooms; several folders with `:` between."""
    python: str
    nodes: int
    nproc: int
    """Ranks of one node."""
    chain: Chain = "requeue"
    per_rank: bool = False
    """One srun task a rank instead of torchrun's agent on each node."""
    lead_s: int = LEAD_DEFAULT_S
    """Seconds before the time limit at which the job is told to stop."""
    tasks: tuple[Task, ...] = ()
    """Of a job array: each has its own run_dir and arguments; run_dir here holds {task}."""
    at_once: int = 0
    """Tasks of an array that may run at a time; 0: all."""
    prep: str = ""
    """Record of the prep job on whose commit the run trains (launch.after_prep); '' for none."""
    dependency: str = ""
    """Of the job, such as afterany:12."""


def job_name(run_dir: str) -> str:
    """One name for all jobs of a run, so that --dependency=singleton and squeue find them."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(run_dir).name).strip("-.")[:40]
    return f"leyden-{plain or 'run'}-{hashlib.sha256(run_dir.encode()).hexdigest()[:8]}"


def signal_lead_s(save_p99_s: float | None, step_p99_s: float | None) -> int:
    """Seconds that a drain needs before the time limit, with half as much again in reserve.

    Two steps until all ranks have agreed, the save that may be under way, the one of the drain,
    and 30 s to write the outcome and ask for the requeue. Without measurements: 300.
    """
    if save_p99_s is None or step_p99_s is None:
        return LEAD_DEFAULT_S
    return max(LEAD_LEAST_S, math.ceil(1.5 * (2 * step_p99_s + 2 * save_p99_s) + 30))


def p99(values: Sequence[float]) -> float | None:
    """The value that 99 % do not exceed; None of nothing."""
    ordered = sorted(values)
    return ordered[math.ceil(0.99 * len(ordered)) - 1] if ordered else None


def sbatch_text(request: Request, cluster: Cluster, template: str | None = None) -> str:
    """The whole script. ConfigError for a value that sbatch would not read as it stands."""
    text = TEMPLATE.read_text() if template is None else template
    text = replace_part(text, "request", request_lines(request, cluster))
    return replace_part(text, "settings", settings_lines(request, cluster))


def request_lines(request: Request, cluster: Cluster) -> list[str]:
    """The #SBATCH lines."""
    tasks = request.nproc if request.per_rank else 1
    options = {
        "job-name": job_name(request.run_dir),
        "partition": cluster.partition,
        "account": cluster.account,
        "nodes": request.nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": cluster.cpus_per_task * request.nproc // tasks,
        "gpus-per-node": cluster.gpus_per_node or "",
        "mem": f"{cluster.mem_gib}G" if cluster.mem_gib else "",
        "time": cluster.time_limit_min,
        "signal": f"B:USR1@{request.lead_s}",
        "exclude": ",".join(cluster.exclude),
        "array": array_range(request),
        "open-mode": "append",
        "output": log_pattern(request.run_dir) or "/dev/null",
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value != ""]
    lines += ["--requeue"] if request.chain == "requeue" else ["--no-requeue"]
    after = ["singleton"] if request.chain == "singleton" else []
    after += [request.dependency] if request.dependency else []
    lines += [f"--dependency={','.join(after)}"] if after else []
    lines += ["--exclusive"] if cluster.exclusive else []
    lines += cluster.sbatch
    return sbatch_lines(lines)


def sbatch_lines(options: Sequence[str]) -> list[str]:
    """#SBATCH lines; ConfigError for an option that sbatch would misread."""
    for line in options:
        if not line.startswith("-") or not _PLAIN.fullmatch(line):
            raise ConfigError(
                f"sbatch cannot be given {line!r} in a script: an option is one word without "
                "blanks, quotes, # or $; use another name, or put it into `setup:`"
            )
    return [f"#SBATCH {line}" for line in options]


def array_range(request: Request) -> str:
    """--array of the job; '' for a single run."""
    last = len(request.tasks) - 1
    limit = f"%{request.at_once}" if request.at_once else ""
    return f"0-{last}{limit}" if request.tasks else ""


def log_pattern(run_dir: str) -> str:
    """--output of the job; '' where Slurm would read the path differently (blanks, %, ...)."""
    plain = _PLAIN_PATH.fullmatch(run_dir.replace(PLACE, ""))
    return f"{at(run_dir, '%a')}/slurm-%j.out" if plain else ""


def settings_lines(request: Request, cluster: Cluster) -> list[str]:
    """Assignments and the SETUP function, quoted for bash."""
    module = not request.target.endswith(".py")
    settings = {
        "RUN_DIR": request.run_dir,
        "WORK_DIR": request.work_dir,
        "CODE": request.code,
        "PYTHON": request.python,
        "LAUNCH": "srun" if request.per_rank else "agent",
        "CHAIN": request.chain,
        "NPROC": str(request.nproc),
        "CORES_PER_RANK": str(cluster.cpus_per_task),
        "JOIN_TIMEOUT_S": str(cluster.join_timeout_s),
        "PREP": request.prep,
    }
    if request.tasks:
        del settings["RUN_DIR"]
    lines = [f"{name}={quote(value)}" for name, value in settings.items()]
    lines += [] if request.tasks else [_log_line(request, request.run_dir)]
    lines += [f"MODULE={'1' if module else ''}", f"TARGET={quote(request.target)}"]
    lines += _task_lines(request) if request.tasks else _argument_lines(request.arguments)
    lines += ["SETUP() {", "  :"]
    # Not indented: a here-document among them would change.
    lines += [line for one in cluster.setup for line in one.splitlines()]
    return [*lines, "}"]


def _log_line(request: Request, run_dir: str) -> str:
    log = quote(run_dir + "/slurm-") + '"$SLURM_JOB_ID.out"'
    return "LOG=" + ("" if log_pattern(request.run_dir) else log)


def _argument_lines(arguments: Sequence[str]) -> list[str]:
    return ["ARGUMENTS=(", *(f"  {words}" for words in quoted_lines(arguments)), ")"]


def _task_lines(request: Request) -> list[str]:
    """RUN_DIR, LOG and ARGUMENTS of each task of an array."""
    lines = ["case ${SLURM_ARRAY_TASK_ID:-none} in"]
    for task in request.tasks:
        lines += [f"{task.number})", f"RUN_DIR={quote(task.run_dir)}"]
        lines += [_log_line(request, task.run_dir), *_argument_lines(task.arguments), ";;"]
    return [*lines, '*) echo "error: no task $SLURM_ARRAY_TASK_ID in this array" >&2; exit 64 ;;',
            "esac"]  # fmt: skip


def quote(text: str) -> str:
    """`text` as one word of bash; ConfigError for the one byte that no argument can hold."""
    if "\0" in text:
        raise ConfigError(f"a NUL byte cannot be passed to a program: {text!r}")
    return shlex.quote(text)


def quoted_lines(words: Sequence[str]) -> list[str]:
    """Quoted words, an option and its value on one line."""
    lines: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not lines or len(lines[-1]) > 1:
            lines.append([])
        lines[-1].append(quote(word))
    return [" ".join(line) for line in lines]


def replace_part(text: str, part: str, lines: Sequence[str]) -> str:
    """The text with the lines of a marked part replaced; its markers go."""
    before, _, rest = text.partition(f"# >>> {part}\n")
    _, found, after = rest.partition(f"# <<< {part}\n")
    if not found:
        raise ValueError(f"the template has no part {part!r}")
    return before + "\n".join(lines) + "\n" + after
