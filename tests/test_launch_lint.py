"""Rules L01-L15: one script that each must refuse, and the same script mended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from launch import cli
from launch.cluster_facts import file_system, slurm_waits
from launch.lint import RULES, Facts, check_script, minutes
from launch.shell_text import read_script
from launch.slurm import TEMPLATE
from tests.fake_slurm import FakeSlurm

HEAD = "#!/bin/bash\n#SBATCH --nodes=2\n"
SRUN = "srun --kill-on-bad-exit=1 --wait=60"
FINE = f"{SRUN} python x.py &\nwait $!\n"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A script that a rule refuses, and one that it does not."""

    bad: str
    good: str
    bad_facts: Facts = Facts()
    good_facts: Facts = Facts()


SAVES = {"save_p99_s": 100.0, "step_p99_s": 2.0}
TIMED = HEAD + "#SBATCH --time={}\n#SBATCH --signal=USR1@300\n" + FINE
CASES = {
    # pytorch and Lightning users: 8 tasks of 8 processes, "Duplicate GPU detected".
    "L01": Case(
        bad=HEAD + "#SBATCH --ntasks-per-node=8\n" + f"{SRUN} torchrun --nproc-per-node=8 x.py\n",
        good=HEAD + "#SBATCH --ntasks-per-node=1\n" + f"{SRUN} torchrun --nproc-per-node=8 x.py\n",
    ),
    "L02": Case(
        bad=HEAD + "#SBATCH --signal=B:USR1@300\n" + FINE,
        good=HEAD + "#SBATCH --signal=B:USR1@300\ntrap 'touch stop' USR1\n" + FINE,
    ),
    "L03": Case(
        bad=HEAD + f"trap 'touch stop' USR1\n{SRUN} \\\n  python x.py\n",
        good=HEAD + f"trap 'touch stop' USR1\n{SRUN} \\\n  python x.py &\nwait $!\n",
    ),
    "L04": Case(
        bad=HEAD + "export MASTER_PORT=45000\n" + FINE,
        good=HEAD + "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))\n" + FINE,
    ),
    # accelerate's example: every node was rank 0.
    "L05": Case(
        bad=HEAD + f'{SRUN} bash -c "torchrun --node-rank=$SLURM_NODEID x.py" &\nwait $!\n',
        good=HEAD + f"{SRUN} bash -c 'torchrun --node-rank=$SLURM_NODEID x.py' &\nwait $!\n",
    ),
    "L06": Case(
        bad=HEAD + f"{SRUN} --export=ALL,HOSTS=a,b python x.py &\nwait $!\n",
        good=HEAD + f"export HOSTS=a,b\n{SRUN} --export=ALL python x.py &\nwait $!\n",
    ),
    "L07": Case(
        bad=HEAD + "#SBATCH -c 12\n" + FINE,
        good=HEAD + '#SBATCH -c 12\nexport SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"\n' + FINE,
    ),
    "L08": Case(bad=HEAD + "srun python x.py &\nwait $!\n", good=HEAD + FINE),
    "L09": Case(
        bad=HEAD + "RUN_DIR=/tmp/runs/first\n" + FINE,
        good=HEAD + "RUN_DIR=/shared/runs/first\n" + FINE,
    ),
    "L10": Case(
        bad=TIMED.format("10"), good=TIMED.format("1-00:00:00"),
        bad_facts=Facts(startup_s=120.0, save_every_steps=100, step_p99_s=2.0),
        good_facts=Facts(startup_s=120.0, save_every_steps=100, step_p99_s=2.0),
    ),
    "L11": Case(
        bad=HEAD + FINE, good=HEAD + FINE,
        bad_facts=Facts(kill_wait_s=30.0, grace_s=None, **SAVES),
        good_facts=Facts(kill_wait_s=300.0, grace_s=300.0, **SAVES),
    ),
    "L12": Case(bad=HEAD + FINE, good=HEAD + FINE, bad_facts=Facts(dirty=True)),
    # accelerate's submit_multicpu.sh: an unclosed quote.
    "L13": Case(bad=HEAD + FINE + "echo 'never closed\n", good=HEAD + FINE),
    "L14": Case(
        bad=HEAD + "HEAD=$(scontrol show hostnames | head -n1 || echo localhost)\n" + FINE,
        good=HEAD + "HEAD=$(scontrol show hostnames | head -n1)\n" + FINE,
    ),
    # NeMo-Run's group jobs: a failed group reported success.
    "L15": Case(
        bad=HEAD + f"{SRUN} python x.py &\nwait\nexit $?\n",
        good=HEAD + f"{SRUN} python x.py &\nwait $!\nexit $?\n",
    ),
}  # fmt: skip


def test_every_rule_has_a_case() -> None:
    """A rule that nothing shows to work."""
    assert list(CASES) == list(RULES) == [f"L{i:02}" for i in range(1, 16)]


@pytest.mark.parametrize("rule", list(CASES))
def test_rules(rule: str) -> None:
    """A rule that never speaks, or speaks about what is right. The mended script is clean of all
    rules."""
    case = CASES[rule]
    assert rule in [one.rule for one in check_script(case.bad, case.bad_facts)]
    assert check_script(case.good, case.good_facts) == []


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("L01", HEAD + "LAUNCH=srun\nNPROC=8\n#SBATCH --x\n" + FINE),
        ("L03", HEAD + f"trap : TERM\n{SRUN} python x.py | tee log\n"),
        ("L06", HEAD + "#SBATCH --export=A=x,B=y\n" + FINE),
        ("L07", HEAD + "#SBATCH --cpus-per-task 4\n" + FINE),
        ("L08", HEAD + "srun -K python x.py &\nwait $!\n"),
        ("L09", HEAD + "RUN_DIR='/dev/shm/x'\n" + FINE),
        ("L10", HEAD + "#SBATCH -t 5\n#SBATCH --signal=USR1@300\n" + FINE),
        ("L13", HEAD + "echo x\n#SBATCH --time=5\n" + FINE),
        ("L13", "echo x\n"),
        ("L13", HEAD.replace("\n", "\r\n") + FINE),
        ("L14", HEAD + "export MASTER_ADDR=localhost\n" + FINE),
        ("L14", HEAD + "ADDR=$(hostname --ip-address)\n" + FINE),
        ("L15", HEAD + f"{SRUN} python x.py | tee log &\nwait $!\n"),
    ],
)
def test_other_shapes_of_the_same_faults(rule: str, text: str) -> None:
    """A rule that knows one spelling only."""
    assert rule in [one.rule for one in check_script(text)]


@pytest.mark.parametrize(
    "text",
    [
        HEAD + "# srun python x.py | tee: not a command\n" + FINE,
        HEAD + "echo 'srun x'\n" + FINE,
        HEAD + "echo \"it's\" # it's $SLURM_PROCID\n" + FINE,
        HEAD + "echo \\$SLURM_PROCID\n" + FINE,
        HEAD + f"if true; then {SRUN} python x.py & wait $!; fi\n",
        "#!/bin/bash\nexport MASTER_ADDR=localhost\n",
    ],
)
def test_what_only_looks_like_a_fault(text: str) -> None:
    """False alarms teach people to ignore the linter."""
    assert check_script(text) == []


def test_our_template_passes() -> None:
    """A linter that its own house fails."""
    assert check_script(TEMPLATE.read_text()) == []


@pytest.mark.parametrize("text", ["", "#!", "'", '"\\', "#SBATCH", "#SBATCH --x='", "\0", "a\\"])
def test_any_text_is_read(text: str) -> None:
    """A traceback for a file that is no script."""
    read_script(text)
    check_script(text)


def test_time_limits() -> None:
    """`1-0` read as one minute: the walltime rule would be silent."""
    known = {
        "30": 30,
        "30:30": 30.5,
        "2:00:00": 120,
        "1-0": 1440,
        "1-2:30": 1590,
        "1-0:0:30": 1440.5,
    }
    assert {text: minutes(text) for text in known} == known
    assert minutes("UNLIMITED") == minutes("") == 0


def test_waits_are_asked_from_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KillWait of another cluster, or the grace of another partition."""
    fake = FakeSlurm(tmp_path)
    fake.install(monkeypatch)
    assert slurm_waits("") == (None, None)
    fake.set("config", "Foo = 1\nKillWait                = 30 sec\n")
    fake.set(
        "partition",
        "PartitionName=a Default=NO GraceTime=7\nPartitionName=b Default=YES GraceTime=120\n",
    )
    assert slurm_waits("") == (30.0, 120.0)


def test_file_systems_are_told(tmp_path: Path) -> None:
    """A memory disk that is mounted on a shared path."""
    mounts = tmp_path / "mounts"
    mounts.write_text("x / ext4 rw\nx /a tmpfs rw\nx /a/b\\040c nfs4 rw\n")
    assert file_system(Path("/a/x"), mounts) == "tmpfs"
    assert file_system(Path("/a/b c/x"), mounts) == "nfs4"
    assert file_system(Path("/ab"), mounts) == "ext4"
    finding = check_script(HEAD + FINE, Facts(run_dir="/a/x", fs_type="tmpfs"))
    assert [one.rule for one in finding] == ["L09"]


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fault that is printed and then answered with exit code 0."""
    script = tmp_path / "job.sbatch"
    script.write_text(CASES["L05"].bad)
    assert cli.main(["check", "--static", str(script)]) == 2
    out = capsys.readouterr().out
    assert "error: L05: $SLURM_NODEID stands outside of single quotes" in out
    assert "15 rules: 1 errors, 0 warnings" in out
    script.write_text(CASES["L05"].good)
    assert cli.main(["check", "--static", str(script)]) == 0
    assert cli.main(["check", str(script)]) == 2
    assert cli.main(["check", "--static", str(tmp_path / "none")]) == 2
    capsys.readouterr()
