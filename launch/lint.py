"""Checks of a Slurm script before it costs a night: rules L01 to L15, nothing is run.

Each rule is one way in which jobs were measured to fail (notes in docs/slurm.md). A rule reads the
script's text and, where they are known, facts of the run and of the cluster.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launch.cluster_config import Cluster
from launch.shell_text import Script, read_script
from launch.slurm import Request
from launch.snapshot import Code

EPHEMERAL = range(32768, 61000)
_NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/local", "/localscratch")
_LAUNCHER = re.compile(r"\b(torchrun|torch\.distributed\.run|launch\.agent|accelerate launch)\b")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one rule says; `error` refuses a submit, `warning` does not."""

    rule: str
    severity: str
    message: str

    def line(self) -> str:
        return f"{self.severity}: {self.rule}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known beside the script; None or '' where it is not."""

    run_dir: str = ""
    nodes: int | None = None
    nproc: int | None = None
    dirty: bool = False
    save_p99_s: float | None = None
    step_p99_s: float | None = None
    startup_s: float | None = None
    save_every_steps: int | None = None
    kill_wait_s: float | None = None
    grace_s: float | None = None
    fs_type: str = ""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a rule may read."""

    script: Script
    facts: Facts = field(default_factory=Facts)


Rule = Callable[[Context], "str | None"]


def tasks_and_processes(c: Context) -> str | None:
    """L01: N tasks a node that each start N processes."""
    tasks = c.script.option("ntasks-per-node", "1")
    launch = c.script.setting("LAUNCH")
    agent = launch == "agent" if launch else bool(_LAUNCHER.search(c.script.code))
    if agent and tasks != "1":
        return (
            f"--ntasks-per-node={tasks} and a launcher that starts all ranks of a node: that is "
            f"{tasks} times too many processes; set --ntasks-per-node=1, or start one task a rank"
        )
    nproc = c.script.setting("NPROC") or (str(c.facts.nproc) if c.facts.nproc else "")
    if launch == "srun" and nproc and tasks != nproc:
        return f"--ntasks-per-node={tasks}, but {nproc} ranks a node: set both to the same number"
    return None


def signal_without_trap(c: Context) -> str | None:
    """L02: an untrapped --signal=B:X kills the batch shell, and the job fails."""
    match = re.fullmatch(r"[BR]*B[BR]*:(?:SIG)?(\w+)(?:@\d+)?", c.script.option("signal", ""))
    if match and not re.search(rf"\btrap\b[^\n]*\b(SIG)?{match[1]}\b", c.script.shell):
        return (
            f"--signal=B:{match[1]} reaches the batch shell, which has no trap for it and would be "
            f"killed by it (JobLaunchFailure, no requeue); add: trap '...' {match[1]}"
        )
    return None


def foreground_srun(c: Context) -> str | None:
    """L03: bash runs a trap only when the foreground command has ended."""
    traps = re.search(r"^\s*trap\b[^\n]*\b(SIG)?(USR1|USR2|TERM|CONT)\b", c.script.shell, re.M)
    if traps and any(not line.rstrip().endswith("&") for line in c.script.sruns):
        return (
            "srun runs in the foreground, so the trap would run only after it has ended; end the "
            "line with & and wait for it"
        )
    return None


def ephemeral_port(c: Context) -> str | None:
    """L04: another program may hold an ephemeral port at any time."""
    for match in re.finditer(
        r"(?:MASTER_PORT|PORT|master[-_]port|rdzv[-_]endpoint)[=\s]\S*?\b(\d{4,5})\b", c.script.code
    ):
        if int(match[1]) in EPHEMERAL:
            return (
                f"port {match[1]} lies in the ephemeral range ({EPHEMERAL.start}-"
                f"{EPHEMERAL.stop - 1}), where any client may have taken it; use 20000 + job id "
                "% 10000"
            )
    return None


def early_expansion(c: Context) -> str | None:
    """L05: the batch shell's SLURM_PROCID is 0, so every node would be rank 0."""
    found = re.search(r"\$\{?(SLURM_(?:PROCID|NODEID|LOCALID))\b", c.script.expanded)
    if found:
        return (
            f"${found[1]} stands outside of single quotes: the batch shell expands it, to the "
            "first node's; put the command into single quotes: srun bash -c '...'"
        )
    return None


def export_values(c: Context) -> str | None:
    """L06: a comma ends a value of --export, and the rest of it is lost."""
    for words in [f"--export={c.script.option('export', '')}", *c.script.sruns]:
        found = re.search(r"--export[= ]\S*?(\w+)=", words)
        if found:
            return (
                f"--export sets {found[1]}: a comma in its value would end it silently; write "
                f"`export {found[1]}=...` above and leave --export=ALL"
            )
    return None


def cpus_not_inherited(c: Context) -> str | None:
    """L07: since Slurm 22.05 srun does not take --cpus-per-task from the job."""
    if c.script.option("cpus-per-task", "1") == "1" or "SRUN_CPUS_PER_TASK" in c.script.code:
        return None
    if any(not re.search(r"\s(--cpus-per-task|-c)\b", line) for line in c.script.sruns):
        return (
            f"--cpus-per-task={c.script.option('cpus-per-task', '')} does not reach srun (Slurm "
            "22.05 and newer): its tasks get one core; export SRUN_CPUS_PER_TASK="
            '"$SLURM_CPUS_PER_TASK"'
        )
    return None


def survivors_wait(c: Context) -> str | None:
    """L08: KillOnBadExit is 0 by default: one rank dies, the others hang for hours."""
    for line in c.script.sruns:
        lacks = []
        # An explicit 0 was meant: Spark's workers do without one of them.
        if not re.search(r"\s(--kill-on-bad-exit(=[01])?|-K[01]?)(\s|$)", line):
            lacks.append("--kill-on-bad-exit=1")
        if not re.search(r"\s(--wait[= ]\d+|-W ?\d+)(\s|$)", line):
            lacks.append("--wait=60")
        if lacks:
            return f"srun lacks {' and '.join(lacks)}: when one node fails the others wait for it"
    return None


def node_local_run(c: Context) -> str | None:
    """L09: other nodes, and the next job, do not see it."""
    run_dir = c.facts.run_dir or c.script.setting("RUN_DIR")
    path = Path(run_dir) if run_dir.startswith("/") else None
    local = path is not None and any(path.is_relative_to(folder) for folder in _NODE_LOCAL)
    if local or c.facts.fs_type in ("tmpfs", "ramfs"):
        return (
            f"the run's folder {run_dir} lies on one node only: other nodes and the next job would "
            "not find its checkpoints; set run_root to a shared file system"
        )
    return None


def walltime(c: Context) -> str | None:
    """L10: a job must last for its start and one checkpoint, or the run never moves."""
    limit_s = minutes(c.script.option("time", "")) * 60
    lead = re.search(r"@(\d+)", c.script.option("signal", ""))
    if not limit_s or not lead:
        return None
    start_s, f = c.facts.startup_s or 0.0, c.facts
    interval_s = (f.save_every_steps or 0) * (f.step_p99_s or 0.0)
    left_s = limit_s - int(lead[1]) - start_s
    if left_s <= interval_s or limit_s <= int(lead[1]):
        return (
            f"{limit_s / 60:.0f} min of wall time less {lead[1]} s for the drain leave "
            f"{max(left_s, 0):.0f} s after a start of {start_s:.0f} s, where one checkpoint "
            f"interval takes {interval_s:.0f} s; raise time_limit_min or lower save_every_steps"
        )
    return None


def kill_wait(c: Context) -> str | None:
    """L11: without the user signal a save has only this time between SIGTERM and SIGKILL."""
    f = c.facts
    if f.save_p99_s is None or f.step_p99_s is None:
        return None
    need_s = 2 * f.step_p99_s + f.save_p99_s
    short = {"KillWait": f.kill_wait_s, "GraceTime": f.grace_s}
    named = [f"{name} ({s:.0f} s)" for name, s in short.items() if s is not None and s < need_s]
    if named:
        return (
            f"{' and '.join(named)} end a preempted job before its checkpoint is durable "
            f"({need_s:.0f} s): up to one interval is lost then; ask the administrator for "
            "preempt_send_user_signal, or save more often"
        )
    return None


def dirty_tree(c: Context) -> str | None:
    """L12: the commit does not tell what ran (the snapshot does)."""
    if c.facts.dirty:
        return "the code differs from its commit; the run keeps a copy of it as it is now (code/)"
    return None


def syntax(c: Context) -> str | None:
    """L13: what bash or sbatch would not read as it was meant."""
    if not c.script.text.startswith("#!"):
        return "the first line is no #!: sbatch refuses the script; begin it with #!/bin/bash"
    if "\r\n" in c.script.text:
        return "lines end with CR LF; convert them (sed -i 's/\\r$//')"
    if c.script.late_options:
        late = c.script.late_options[0]
        return f"{late!r} stands after the first command, where sbatch ignores it; move it up"
    try:
        done = subprocess.run(
            ["bash", "-n"], input=c.script.text.encode(), capture_output=True, timeout=20
        )
    except FileNotFoundError:
        return None
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return f"bash cannot parse it: {said[0]}" if done.returncode != 0 and said else None


def head_node(c: Context) -> str | None:
    """L14: N worlds of one node, each believing to be the whole."""
    found = re.search(
        r"\|\|\s*echo\s+['\"]?(localhost|127\.0\.0\.1)|hostname\s+(-i\b|--ip-address)"
        r"|MASTER_ADDR=['\"]?(localhost|127\.\d)|rdzv[-_]endpoint[= ]['\"]?(localhost|127\.\d)",
        c.script.code,
    )
    if found and c.script.option("nodes", "1") != "1":
        return (
            f"{found[0]!r} makes each of {c.script.option('nodes', '1')} nodes its own head; take "
            "the first of `scontrol show hostnames` and end the job if there is none"
        )
    return None


def hidden_exit_code(c: Context) -> str | None:
    """L15: `wait` without a process is always 0, and $! of a pipe is its last command."""
    if c.script.sruns and re.search(r"^\s*wait\s*(;|$)", c.script.shell, re.M):
        return '`wait` without a process id returns 0 whatever failed; write: wait "$SRUN"'
    if any(re.search(r"(?<!\|)\|(?!\|)\s*\w+", line) for line in c.script.sruns):
        return "srun is piped, so $! and the exit code are the last command's; use srun --output"
    return None


RULES: dict[str, tuple[str, Rule]] = {
    "L01": ("error", tasks_and_processes),
    "L02": ("error", signal_without_trap),
    "L03": ("error", foreground_srun),
    "L04": ("error", ephemeral_port),
    "L05": ("error", early_expansion),
    "L06": ("error", export_values),
    "L07": ("error", cpus_not_inherited),
    "L08": ("error", survivors_wait),
    "L09": ("error", node_local_run),
    "L10": ("error", walltime),
    "L11": ("warning", kill_wait),
    "L12": ("warning", dirty_tree),
    "L13": ("error", syntax),
    "L14": ("error", head_node),
    "L15": ("error", hidden_exit_code),
}


def check_script(text: str, facts: Facts | None = None) -> list[Finding]:
    """What the rules say of a script, in their order."""
    context = Context(script=read_script(text), facts=facts or Facts())
    findings = []
    for name, (severity, rule) in RULES.items():
        message = rule(context)
        if message:
            findings.append(Finding(rule=name, severity=severity, message=message))
    return findings


def minutes(text: str) -> float:
    """Minutes of Slurm's time formats (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S); 0 if not one."""
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        return 0.0
    numbers = [int(part) for part in parts]
    if dash:
        hours, mins, secs = [*numbers, 0, 0][:3]
        return int(days) * 1440 + hours * 60 + mins + secs / 60
    if len(numbers) == 3:
        return numbers[0] * 60 + numbers[1] + numbers[2] / 60
    return numbers[0] + (numbers[1] / 60 if len(numbers) == 2 else 0)


def script_facts(request: Request, cluster: Cluster, code: Code) -> Facts:
    """Facts of a submit: what the run has measured, what Slurm says of its waits."""
    from launch.cluster_facts import file_system, measured, slurm_waits

    kill_wait_s, grace_s = slurm_waits(cluster.partition)
    run = Path(request.run_dir)
    return Facts(
        run_dir=request.run_dir, nodes=request.nodes, nproc=request.nproc, dirty=code.dirty,
        kill_wait_s=kill_wait_s, grace_s=grace_s, fs_type=file_system(run), **measured(run),
    )  # fmt: skip
