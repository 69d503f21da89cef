"""The batch script: golden text, what bash makes of hostile values, what sbatch would misread."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist.errors import ConfigError
from launch.cluster_config import Cluster
from launch.slurm import TEMPLATE, Chain, Request, job_name, p99, sbatch_text, signal_lead_s
from tests.fake_slurm import FakeSlurm

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
REQUEST = Request(
    target="recipes.pretrain",
    arguments=("--config", "1b", "--data.url", "/shared/data", "--run", "first", "--max_steps=9"),
    run_dir="/shared/runs/first",
    work_dir="/shared/work",
    code="/shared/runs/first/code/0123456789abcdef",
    python="/shared/venv/bin/python",
    nodes=4,
    nproc=8,
)
CLUSTER = Cluster(
    partition="gpu", account="lab", gpus_per_node=8, cpus_per_task=12, mem_gib=900,
    time_limit_min=1440, exclusive=True, exclude=("n13", "n[20-21]"), sbatch=("--qos=high",),
    setup=("module load cuda", "export NCCL_DEBUG=WARN"),
)  # fmt: skip
CASES = {
    "agent_requeue": REQUEST,
    "srun_singleton": replace(REQUEST, per_rank=True, chain="singleton"),
}


@pytest.mark.parametrize("name", list(CASES))
def test_golden_script(name: str) -> None:
    """A change of what users submit, seen as a diff. LEYDEN_UPDATE_GOLDEN=1 if it was meant."""
    path = GOLDEN / f"sbatch_{name}.txt"
    text = sbatch_text(CASES[name], CLUSTER)
    if os.environ.get("LEYDEN_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("text", [TEMPLATE.read_text(), sbatch_text(REQUEST, CLUSTER)])
def test_bash_parses_it(text: str) -> None:
    """An unclosed quote in a script that nobody ran (accelerate shipped one for years)."""
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_options_come_before_the_first_command() -> None:
    """sbatch stops to read its lines at the first command: the rest would be ignored."""
    lines = sbatch_text(REQUEST, CLUSTER).splitlines()
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert len(options) >= 12 and max(options) < first


@pytest.mark.parametrize(
    "option", ["--comment=two words", "--comment='x'", "--qos=a#b", "--qos=$(id)", "high", "--a=\n"]
)
def test_options_that_sbatch_would_misread_are_refused(option: str) -> None:
    """sbatch splits at blanks and cuts at #: the job would run with half an option."""
    with pytest.raises(ConfigError, match="sbatch cannot be given"):
        sbatch_text(REQUEST, Cluster(sbatch=(option,)))


def test_tasks_and_cores() -> None:
    """Cores that are given to one rank instead of to all of a node, or N x N processes."""
    agent = sbatch_text(REQUEST, CLUSTER)
    assert "#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=96\n" in agent
    ranks = sbatch_text(replace(REQUEST, per_rank=True), CLUSTER)
    assert "#SBATCH --ntasks-per-node=8\n#SBATCH --cpus-per-task=12\n" in ranks


def test_job_names_tell_runs_apart() -> None:
    """Two runs of one name in two folders would wait for each other (singleton)."""
    assert job_name("/a/first") != job_name("/b/first")
    assert job_name("/a/first") == job_name("/a/first")
    assert job_name("/a/x y$(z)\n").replace("leyden-x-y-z-", "").isalnum()


def test_lead_is_computed_from_what_was_measured() -> None:
    """A lead shorter than the save loses what it was meant to keep; the first submit has 300 s."""
    assert signal_lead_s(None, 1.0) == signal_lead_s(1.0, None) == 300
    assert signal_lead_s(0.1, 0.1) == 60
    assert signal_lead_s(100.0, 10.0) == 1.5 * 220 + 30
    assert p99([]) is None
    assert p99([3.0, 1.0, 2.0]) == 3.0
    assert p99([float(i) for i in range(1, 1001)]) == 990.0


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = FakeSlurm(tmp_path_factory.mktemp("fake"))
    # Stands for the interpreter: writes down its words, each followed by a NUL.
    python = made.bin / "python"
    python.write_text(
        "#!/bin/bash\n"
        '[ "$2" = launch.policy ] && exit 0\n'
        'printf "%s\\0" "$@" > "$FAKE_SLURM/words"\n'
        'printf "%s\\0" "$PWD" "$LEYDEN_RUN_DIR" "$PYTHONPATH" > "$FAKE_SLURM/seen"\n'
    )
    python.chmod(0o755)
    return made


def run_script(fake: FakeSlurm, text: str, cwd: Path, **env: str) -> None:
    """Run a whole rendered script with the fakes in place of Slurm."""
    done = subprocess.run(
        ["bash", "-c", text, "script"],
        cwd=cwd,
        env={
            "PATH": f"{fake.bin}:/usr/bin:/bin", "FAKE_SLURM": str(fake.state), "HOME": str(cwd),
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "r1", "SLURM_NNODES": "1",
            "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "x", **env,
        },
        capture_output=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()


def words_of(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\0")[:-1]


HOSTILE = st.text(
    alphabet=st.one_of(
        st.sampled_from(list(" \t\n'\"`$(){}[]<>|&;#,\\*?~!%=:-")),
        st.characters(exclude_categories=("Cs",), exclude_characters="\0"),
    ),
    max_size=12,
) | st.sampled_from(
    ["$(touch canary)", "`touch canary`", "'; touch canary; '", '"; touch canary; "', "a b", "",
     "#x", "--run", "-", "\n", "$HOME", "${PATH}", "*", "a,b,c", "!!", "\\", "naïve-雪", "x\ny z"]
)  # fmt: skip
FOLDER = HOSTILE.map(
    lambda text: "f" + text.replace("/", "").replace(":", "")
).filter(lambda text: len(text.encode()) < 100)  # fmt: skip


@pytest.mark.parametrize("per_rank", [False, True])
@settings(
    max_examples=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(words=st.lists(HOSTILE, max_size=4), folder=FOLDER)
def test_hostile_values_arrive_byte_for_byte(
    fake: FakeSlurm, per_rank: bool, words: list[str], folder: str
) -> None:
    """A blank splits, a quote ends, `$(...)` runs: every launcher that pastes strings has one."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / folder
        root.mkdir()
        run, code = root / "runs" / folder, root / "code"
        run.mkdir(parents=True)
        request = Request(
            target="recipes.pretrain", arguments=tuple(words), run_dir=str(run),
            work_dir=str(root), code=str(code), python=str(fake.bin / "python"), nodes=1,
            nproc=1, per_rank=per_rank,
        )  # fmt: skip
        run_script(fake, sbatch_text(request, Cluster()), Path(place))
        given = words_of(fake.state / "words")
        marker = [b"-u", b"-m", b"recipes.pretrain"] if per_rank else [b"--", b"recipes.pretrain"]
        at = next(i for i in range(len(given)) if given[i : i + len(marker)] == marker)
        assert given[at + len(marker) :] == [word.encode() for word in words]
        seen = words_of(fake.state / "seen")
        assert seen[:2] == [str(root).encode(), str(run).encode()]
        assert seen[2] == str(code).encode()
        assert not list(Path(place).rglob("canary")), "a value was executed"
        assert (run / "attempts" / "0" / "ended" / "0").read_text() == "0\n"


def test_a_file_of_the_user_is_started_as_a_file(fake: FakeSlurm, tmp_path: Path) -> None:
    """`-m` before a path, or none before a module."""
    request = replace(
        REQUEST, target="/x/mine.py", run_dir=str(tmp_path / "run"), work_dir=str(tmp_path),
        python=str(fake.bin / "python"), arguments=("a",),
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    run_script(fake, sbatch_text(replace(request, nproc=1), Cluster()), tmp_path)
    assert words_of(fake.state / "words")[-3:] == [b"--", b"/x/mine.py", b"a"]
    run_script(fake, sbatch_text(replace(request, per_rank=True, nproc=1), Cluster()), tmp_path)
    assert words_of(fake.state / "words") == [b"-u", b"/x/mine.py", b"a"]
    assert (tmp_path / "run" / "attempts" / "1").is_dir(), "the second start is attempt 1"


def test_the_head_node_is_never_a_guess(fake: FakeSlurm, tmp_path: Path) -> None:
    """Without scontrol's answer `localhost` would make a world of each node."""
    request = replace(
        REQUEST, run_dir=str(tmp_path / "run"), work_dir=str(tmp_path),
        python=str(fake.bin / "python"),
    )  # fmt: skip
    nodes = fake.state / "nodes"
    before = nodes.read_text()
    nodes.write_text("")
    try:
        with pytest.raises(AssertionError, match="scontrol show hostnames gave no node"):
            run_script(fake, sbatch_text(request, Cluster()), tmp_path)
    finally:
        nodes.write_text(before)


def test_the_template_works_alone(fake: FakeSlurm, tmp_path: Path) -> None:
    """A template that only our renderer can read is no template."""
    text = TEMPLATE.read_text().replace("PYTHON=$PWD/.venv/bin/python", f"PYTHON={fake.bin}/python")
    run_script(fake, text, tmp_path)
    given = words_of(fake.state / "words")
    assert b"--nproc-per-node=8" in given and given[-2:] == [b"--run", b"first"]
    assert (tmp_path / "runs" / "first" / "attempts" / "0").is_dir()


def test_setup_lines_run_before_the_ranks(fake: FakeSlurm, tmp_path: Path) -> None:
    """An export of `setup:` that stays in the batch shell."""
    request = replace(
        REQUEST, run_dir=str(tmp_path / "run"), work_dir=str(tmp_path), nproc=1,
        python=str(fake.bin / "python"),
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    cluster = Cluster(setup=('export PYTHONPATH="extra dir"',))
    run_script(fake, sbatch_text(request, cluster), tmp_path)
    code, _, rest = words_of(fake.state / "seen")[2].partition(b":")
    assert (code, rest) == (request.code.encode(), b"extra dir"), "the snapshot goes first"


def test_a_node_that_cannot_join_says_so() -> None:
    """A port that a firewall closes: a traceback through torch, or a wait of minutes."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can answer there
        words = [
            sys.executable, "-m", "launch.agent", "--nnodes=2", "--nproc-per-node=1",
            "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{taken.getsockname()[1]}",
            "--rdzv-conf=is_host=0,read_timeout=2,join_timeout=2", "x.py",
        ]  # fmt: skip
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: this node cannot join the others")
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("chain", ["requeue", "singleton"])
def test_a_bad_node_is_left_to_the_next_start(tmp_path: Path, chain: Chain) -> None:
    """A job that starts on an excluded node and trains on it, or a chain whose other jobs land
    there one after the other."""
    fake = FakeSlurm(tmp_path)
    python = fake.bin / "python"
    python.write_text('#!/bin/bash\n[ "$3" = --start ] && exit 75\nexit 0\n')
    python.chmod(0o755)
    (fake.bin / "sleep").write_text("#!/bin/bash\n")  # after a requeue the shell waits to be ended
    (fake.bin / "sleep").chmod(0o755)
    run = tmp_path / "run"
    (run / "control").mkdir(parents=True)
    (run / "control" / "exclude").write_text("r1\nr7\n")
    request = replace(
        REQUEST, run_dir=str(run), work_dir=str(tmp_path), python=str(python), chain=chain
    )
    fake.set("squeue", "8|x\n9|x\n")
    with pytest.raises(AssertionError):
        run_script(fake, sbatch_text(request, Cluster()), tmp_path)
    assert fake.calls("srun") == []
    calls = [line for line in fake.calls("scontrol") if not line.startswith("show")]
    if chain == "requeue":
        assert calls == ["requeue 7", "update jobid=7 excnodelist=r1,r7"]
    else:
        wanted = ["update jobid=8|x excnodelist=r1,r7", "update jobid=9|x excnodelist=r1,r7"]
        assert calls == wanted, "the fake squeue ignores --format"
