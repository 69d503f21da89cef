"""`leyden submit`: the same run as `leyden train`, as a Slurm job that goes on until it is done."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from dist.errors import ConfigError, SetupError
from launch.after_prep import check_data, dependency, find_prep
from launch.cli import nearest
from launch.cluster_config import Cluster, load_cluster
from launch.cluster_facts import measured
from launch.lint import check_script, script_facts
from launch.live_jobs import refuse_if_live
from launch.nodes import NodeOptions
from launch.prep_slurm import prep_root
from launch.slurm import Request, job_name, sbatch_text, signal_lead_s
from launch.snapshot import Code, take_snapshot
from launch.submit_record import Submit, add_submit, submitting
from launch.sweep import Task, at, make_tasks, name_pattern, without_run
from launch.train import find_target, fresh_name, replace_run, split_arguments, value_of

CHAINS = ("requeue", "singleton")


def help_text() -> str:
    """What `leyden submit --help` prints."""
    return (
        "usage: leyden submit RECIPE|FILE.py --cluster FILE.yaml [--nodes N] [--nproc N]\n"
        "                     [--chain requeue|singleton] [--srun-per-rank] [--fresh]\n"
        "                     [--after-prep JOB] [--dry-run] [--config NAME] [--key v ...]\n\n"
        "Submits a run to Slurm with the arguments of `leyden train`. The job drains before its\n"
        "time limit or a preemption, is requeued, and goes on exactly where it was, until the run\n"
        "is done; three attempts in a row without a new checkpoint end it (exit code 93).\n\n"
        "  --cluster FILE     partition, account, nodes, gpus_per_node, ... (docs/slurm.md)\n"
        "  --nodes N          nodes of the job, instead of the cluster file's\n"
        "  --nproc N          ranks of a node; auto (default): its GPUs, 1 without\n"
        "  --chain HOW        requeue (default): one job, requeued; singleton: several jobs,\n"
        "                     one after the other, where requeueing is switched off\n"
        "  --srun-per-rank    one srun task a rank instead of torchrun's agent on each node\n"
        "  --run NAME         the run's folder; the run is known by it, never by a job id\n"
        "  --after-prep JOB   wait for a `leyden prep --cluster` (its job id, or the dataset that\n"
        "                     it writes) and train on the version that it committed\n"
        "  --allow L09,...    submit although these checks refuse it\n"
        "  --sweep KEY=V1,V2  a job array, each task a run of its own (NAME-0, NAME-1, ..., or\n"
        "                     where NAME holds {task}); again for another key: all combinations\n"
        "  --at-once N        tasks of the array that may run at a time (all)\n"
        "  --dry-run          print the script and what the checks say; submit nothing\n"
        "  --                 everything after it goes to the recipe, even the names above\n\n"
        "examples:\n"
        "  leyden submit pretrain --config 1b --data.url DATA --run first --cluster cluster.yaml\n"
        "  leyden submit pretrain --config 1b --run first --cluster cluster.yaml --dry-run\n"
        "  leyden submit pretrain --config 1b --run a --cluster cluster.yaml --sweep seed=0,1,2\n"
    )


@dataclass
class Options:
    """submit's own options, and the words that are left."""

    cluster: str = ""
    nodes: int = 0
    chain: str = "requeue"
    per_rank: bool = False
    allow: tuple[str, ...] = ()
    """Rules of the linter that only warn."""
    sweeps: list[str] = field(default_factory=list)
    at_once: int = 0
    after_prep: str = ""
    """Job id, record or dataset of a prep job to wait for."""
    rest: list[str] = field(default_factory=list)


def split_options(words: list[str]) -> Options:
    """Take submit's own options out; every other word stays as it was typed."""
    options, left = Options(), list(words)
    while left:
        word = left.pop(0)
        if word == "--":
            options.rest += [word, *left]
            break
        if word == "--srun-per-rank":
            options.per_rank = True
            continue
        name, equals, value = word.partition("=")
        if name not in (
            *("--cluster", "--nodes", "--chain", "--allow", "--after-prep"),
            *("--sweep", "--at-once"),
        ):
            options.rest.append(word)
            continue
        if not equals and not left:
            raise ConfigError(f"{name} needs a value; leyden submit --help shows one")
        value = value if equals else left.pop(0)
        if name == "--cluster":
            options.cluster = value
        elif name == "--nodes":
            if not value.isdigit() or int(value) < 1:
                raise ConfigError(f"--nodes {value!r} is not a number of nodes: give 1, 2, ...")
            options.nodes = int(value)
        elif name == "--allow":
            options.allow = tuple(value.split(","))
        elif name == "--sweep":
            options.sweeps.append(value)
        elif name == "--at-once":
            options.at_once = _positive("--at-once", value, "tasks")
        elif name == "--after-prep":
            options.after_prep = value
        elif value not in CHAINS:
            raise ConfigError(
                f"--chain {value!r} is neither of {', '.join(CHAINS)}{nearest(value, CHAINS)}"
            )
        else:
            options.chain = value
    return options


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a command line of `leyden submit` comes to, before anything is written."""

    request: Request
    cluster: Cluster
    code: Code
    dry_run: bool
    allow: tuple[str, ...] = ()


def make_plan(words: list[str], cwd: Path) -> Plan:
    """Read the command line and the cluster file; ConfigError says what cannot be meant."""
    target = find_target(words[0])
    options = split_options(words[1:])
    if not options.cluster:
        raise ConfigError(
            "--cluster FILE.yaml is missing: it names the partition, the nodes and their GPUs; "
            "leyden submit --help and docs/slurm.md show one"
        )
    cluster = load_cluster(Path(options.cluster))
    asked = split_arguments(options.rest)
    if asked.nodes != NodeOptions() or asked.max_restarts:
        raise ConfigError(
            "--nnodes, --rdzv, ... and --max-restarts are leyden train's: here --nodes N says how "
            "many, and the job finds its nodes and its restarts by itself"
        )
    passed = list(asked.passed)
    is_file = target.endswith(".py")
    root = asked.run_root
    if cluster.run_root and "--run_root" not in {word.partition("=")[0] for word in passed}:
        root = cluster.run_root
        passed += [] if is_file else ["--run_root", root]
    name = asked.run
    if not name:
        name = default_name(target)
        passed += [] if is_file else ["--run", name]
    if asked.fresh:
        new = fresh_name(name, Path(".") if "/" in name else Path(root))
        passed, name = replace_run(passed, name, new), new
    if ":" in name + root:
        raise ConfigError(f"a run's path cannot hold a colon, which PYTHONPATH splits at: {name}")
    tasks: tuple[Task, ...] = ()
    if options.sweeps:
        if asked.fresh or options.chain == "singleton":
            raise ConfigError("--sweep goes with neither --fresh nor --chain singleton")
        passed, tasks = array_of(options.sweeps, passed, name, cwd, root)
        name = name_pattern(name)
    run_dir = Path(folder_of(cwd, root, name))
    nproc = cluster.gpus_per_node or 1
    if asked.nproc != "auto":
        nproc = _positive("--nproc", asked.nproc)
    prep, after = "", ""
    if options.after_prep:
        found = find_prep(options.after_prep, prep_root(cluster, cwd), cwd)
        check_data(found, value_of("--data.url", passed), cwd)
        prep, after = str(found), dependency(found)
    # The tasks of an array share one snapshot, in a folder beside theirs.
    code = take_snapshot(Path(at(str(run_dir), "all")), Path(target) if is_file else None)
    times = measured(run_dir)
    request = Request(
        target=code.target or target,
        arguments=tuple(passed),
        run_dir=str(run_dir),
        work_dir=str(cwd),
        code=code.path,
        python=cluster.python or sys.executable,
        nodes=options.nodes or cluster.nodes,
        nproc=nproc,
        chain="singleton" if options.chain == "singleton" else "requeue",
        per_rank=options.per_rank,
        lead_s=cluster.lead_s or signal_lead_s(times["save_p99_s"], times["step_p99_s"]),
        tasks=tasks,
        at_once=options.at_once,
        prep=prep, dependency=after,
    )  # fmt: skip
    return Plan(
        request=request, cluster=cluster, code=code, dry_run=asked.dry_run,
        allow=options.allow,
    )  # fmt: skip


def array_of(
    sweeps: list[str], passed: list[str], name: str, cwd: Path, root: str
) -> tuple[list[str], tuple[Task, ...]]:
    """The arguments that all tasks of a sweep share, and the tasks."""
    pattern = name_pattern(name)
    given = "--run" in {word.partition("=")[0] for word in passed}
    shared = without_run(passed, name)
    tasks = make_tasks(
        sweeps, run_dir=folder_of(cwd, root, pattern), arguments=shared,
        run_words=["--run", pattern] if given else [],
    )  # fmt: skip
    return shared, tasks


def folder_of(cwd: Path, root: str, name: str) -> str:
    """Absolute folder of a run, as the recipes find it."""
    return os.path.abspath(cwd / (name if "/" in name else f"{root}/{name}"))


def default_name(target: str) -> str:
    """A name for a run that was given none."""
    import time

    stem = Path(target).stem if target.endswith(".py") else target.rpartition(".")[2]
    return f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def _positive(flag: str, text: str, what: str = "ranks") -> int:
    if not text.isdigit() or int(text) < 1:
        auto = " or auto" if what == "ranks" else ""
        raise ConfigError(f"{flag} {text!r} is not a number of {what}: give 1, 2, ...{auto}")
    return int(text)


def sbatch(script: Path, cwd: Path) -> str:
    """Hand a script to Slurm; returns the job id."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)], cwd=cwd, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise SetupError("no sbatch on PATH: run this on a login node of the cluster") from None
    if done.returncode != 0:
        raise SetupError(f"sbatch refused {script}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def submit(plan: Plan, text: str, words: list[str]) -> list[str]:
    """Write the snapshot, the script and the records, and submit; returns the job ids.

    Of an array there is one id, and task k's run has ID_k.
    """
    request = plan.request
    name = job_name(request.run_dir) if request.tasks else ""
    record = Submit.new(words=words, cwd=request.work_dir, code=plan.code, text=text, job_name=name)
    records = {Path(task.run_dir): replace(record, values=task.values) for task in request.tasks}
    records = records or {Path(request.run_dir): record}
    with ExitStack() as stack:
        for run_dir in records:
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(submitting(run_dir))
            refuse_if_live(run_dir)
        plan.code.write()
        scripts = [add_submit(run_dir, one, text) for run_dir, one in records.items()]
        count = plan.cluster.chain_jobs if request.chain == "singleton" else 1
        ids: list[str] = []
        try:
            for _ in range(count):
                ids.append(sbatch(scripts[0], Path(request.work_dir)))
        finally:
            # Also when the second of a chain is refused: the first one runs.
            for number, (run_dir, one) in enumerate(records.items()):
                own = [f"{job}_{number}" for job in ids] if request.tasks else ids
                add_submit(run_dir, replace(one, job_ids=tuple(own)), text)
    return ids


def main(arguments: list[str]) -> int:
    """Submit a run, or print what would be submitted."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text(), end="")
        return 0 if arguments else 2
    cwd = Path.cwd()
    plan = make_plan(arguments, cwd)
    text = sbatch_text(plan.request, plan.cluster)
    findings = check_script(text, script_facts(plan.request, plan.cluster, plan.code))
    for finding in findings:
        print(finding.line(), file=sys.stderr)
    refused = [f for f in findings if f.severity == "error" and f.rule not in plan.allow]
    if refused:
        raise ConfigError(
            f"{len(refused)} of the checks refuse this job ({', '.join(f.rule for f in refused)}, "
            "above); nothing was submitted (--allow RULE submits all the same)"
        )
    if plan.dry_run:
        print(text, end="")
        return 0
    ids = submit(plan, text, arguments)
    name = job_name(plan.request.run_dir)
    if plan.request.tasks:
        print(f"submitted {len(plan.request.tasks)} runs as job {ids[0]} ({name})")
        for task in plan.request.tasks:
            print(f"  {task.run_dir}: {', '.join(task.values)}")
        print(f"see: leyden status    leyden status {plan.request.tasks[0].run_dir}")
        return 0
    print(f"submitted {plan.request.run_dir} as job {', '.join(ids)} ({name})")
    print(f"see: leyden status {plan.request.run_dir}    leyden logs {plan.request.run_dir}")
    return 0


if __name__ == "__main__":
    from dist.errors import run_main

    run_main(lambda: main(sys.argv[1:]))
