"""`leyden prep JOB --cluster F`: the same Spark job on the nodes of a Slurm allocation.

The text of the batch script is a pure function of what is asked for (templates/prep.sbatch). The
record of each such job, RUN_ROOT/prep/<id>/, is what `leyden submit --after-prep` looks up.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist.errors import ConfigError
from dist.local_files import write_atomic
from launch.cluster_config import Cluster, load_cluster
from launch.rooms import ROOT
from launch.slurm import job_name, log_pattern, quote, quoted_lines, replace_part, sbatch_lines
from launch.snapshot import take_snapshot
from launch.train import value_of

TEMPLATE = Path(__file__).parent / "templates" / "prep.sbatch"
RECORD = "prep.json"
LEAD_S = 120
"""Seconds before the time limit at which a job is ended, so that nothing of it is killed."""


@dataclass(frozen=True, kw_only=True)
class PrepRequest:
    """One Spark job as a Slurm job."""

    module: str
    """spark_jobs.tokenize_text, ..."""
    arguments: tuple[str, ...]
    """Of the job, byte for byte; --master is added."""
    prep_dir: str
    """Its record, an absolute path that every node sees."""
    work_dir: str
    """Where relative paths of the arguments start."""
    code: str
    """First on PYTHONPATH: the snapshot of the rooms."""
    python: str
    nodes: int


def prep_text(request: PrepRequest, cluster: Cluster, template: str | None = None) -> str:
    """The whole script. ConfigError for a value that sbatch would not read as it stands."""
    text = TEMPLATE.read_text() if template is None else template
    text = replace_part(text, "request", _request_lines(request, cluster))
    return replace_part(text, "settings", _settings_lines(request, cluster))


def _request_lines(request: PrepRequest, cluster: Cluster) -> list[str]:
    limit_s = cluster.time_limit_min * 60
    options = {
        "job-name": job_name(request.prep_dir),
        "partition": cluster.partition,
        "account": cluster.account,
        "nodes": request.nodes,
        "ntasks-per-node": 1,
        # The cores of all ranks of a node; GPUs are not asked for.
        "cpus-per-task": cluster.cpus_per_task * max(1, cluster.gpus_per_node),
        "mem": f"{cluster.mem_gib}G" if cluster.mem_gib else "",
        "time": cluster.time_limit_min,
        "signal": f"B:USR1@{min(LEAD_S, limit_s // 2)}",
        "exclude": ",".join(cluster.exclude),
        "open-mode": "append",
        "output": log_pattern(request.prep_dir) or "/dev/null",
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value != ""]
    # A node failure: nothing is published twice, so Slurm may start it again.
    lines += ["--requeue", *(["--exclusive"] if cluster.exclusive else []), *cluster.sbatch]
    return sbatch_lines(lines)


def _settings_lines(request: PrepRequest, cluster: Cluster) -> list[str]:
    settings = {
        "PREP_DIR": request.prep_dir,
        "WORK_DIR": request.work_dir,
        "CODE": request.code,
        "PYTHON": request.python,
        "SCRATCH_DIR": cluster.scratch,
        "JOIN_TIMEOUT_S": str(cluster.join_timeout_s),
    }
    lines = [f"{name}={quote(value)}" for name, value in settings.items()]
    if log_pattern(request.prep_dir):
        lines.append("LOG=")
    else:
        lines.append(f'LOG={quote(request.prep_dir + "/slurm-")}"$SLURM_JOB_ID.out"')
    lines += [f"MODULE={quote(request.module)}", "ARGUMENTS=("]
    lines += [f"  {words}" for words in quoted_lines(request.arguments)]
    lines += [")", "SETUP() {", "  :"]
    return [*lines, *(line for one in cluster.setup for line in one.splitlines()), "}"]


def split_cluster(words: list[str]) -> tuple[str, int, list[str]]:
    """(--cluster's file, --nodes or 0, the words that are left) of a `leyden prep`."""
    cluster, nodes, rest, left = "", 0, [], list(words)
    while left:
        name, equals, value = left[0].partition("=")
        if name not in ("--cluster", "--nodes"):
            rest.append(left.pop(0))
            continue
        left.pop(0)
        if not equals and not left:
            raise ConfigError(f"{name} needs a value; leyden prep --help shows one")
        value = value if equals else left.pop(0)
        if name == "--cluster":
            cluster = value
        elif value.isdigit() and int(value) > 0:
            nodes = int(value)
        else:
            raise ConfigError(f"--nodes {value!r} is not a number of nodes: give 1, 2, ...")
    return cluster, nodes, rest


def submit_prep(module: str, cluster_file: str, nodes: int, words: list[str], cwd: Path) -> int:
    """Submit, or with --dry-run print the script; prints the job id and where its record is."""
    from launch.submit import sbatch

    source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    if "\n    master: str" not in source:
        raise ConfigError(f"{module} runs without Spark, on one machine; leave --cluster out")
    if any(word.partition("=")[0] == "--master" for word in words):
        raise ConfigError("--master cannot be given with --cluster, which starts one; leave it out")
    dry = "--dry-run" in words
    words = [word for word in words if word != "--dry-run"]
    cluster = load_cluster(Path(cluster_file))
    name = f"{module.rpartition('.')[2]}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    folder = prep_root(cluster, cwd) / name
    if ":" in str(folder):
        raise ConfigError(f"run_root cannot hold a colon, which PYTHONPATH splits at: {folder}")
    code = take_snapshot(folder, None)
    request = PrepRequest(
        module=module, arguments=tuple(words), prep_dir=str(folder), work_dir=str(cwd),
        code=code.path, python=cluster.python or sys.executable, nodes=nodes or cluster.nodes,
    )  # fmt: skip
    text = prep_text(request, cluster)
    if dry:
        print(text, end="")
        return 0
    folder.mkdir(parents=True)
    code.write()
    script = folder / "job.sbatch"
    write_atomic(script, text.encode())
    record = {
        "job": module.rpartition(".")[2], "time": time.time(), "arguments": words,
        "cwd": str(cwd), "output": output_of(words, cwd), "code": code.path,
        "commit": code.commit, "dirty": code.dirty, "user": getpass.getuser(),
        "host": socket.gethostname(),
    }  # fmt: skip
    job_id = sbatch(script, cwd)
    write_atomic(
        folder / RECORD,
        (json.dumps({**record, "job_id": job_id}, indent=1, sort_keys=True) + "\n").encode(),
    )
    print(f"submitted {module.rpartition('.')[2]} as job {job_id}; its record: {folder}")
    print(f"train on what it commits: leyden submit RECIPE --after-prep {job_id} ...")
    return 0


def prep_root(cluster: Cluster, cwd: Path) -> Path:
    """Where the records of prep jobs lie: beside the runs."""
    return Path(os.path.abspath(cwd / (cluster.run_root or "runs"))) / "prep"


def output_of(words: list[str], cwd: Path) -> str:
    """The dataset that a job's words name, as a URL or an absolute path; '' if not known here."""
    given = value_of("--output", words)
    config = value_of("--config", words)
    if not given and config.endswith((".yaml", ".yml")) and (cwd / config).is_file():
        import yaml

        try:
            record = yaml.safe_load((cwd / config).read_text())
        except yaml.YAMLError:
            return ""  # the job itself says what is wrong with it
        given = str(record.get("output", "")) if isinstance(record, dict) else ""
    return given and absolute(given, cwd)


def absolute(reference: str, cwd: Path) -> str:
    """A URL as it is, a path from the root."""
    return reference.rstrip("/") if "://" in reference else os.path.abspath(cwd / reference)


def read_prep(folder: Path) -> dict[str, Any]:
    """The record of a prep job and what it said when it ran; {} where there is none."""
    found: dict[str, Any] = {}
    for name in (RECORD, "job.json"):
        try:
            found |= json.loads((folder / name).read_bytes())
        except (OSError, ValueError):
            if name == RECORD:
                return {}
    try:
        found["ended"] = (folder / "ended").read_text().strip()
    except OSError:
        pass
    return found
