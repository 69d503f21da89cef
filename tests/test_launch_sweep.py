"""Arrays of runs: which values each task gets, its own folder, and what Slurm's commands see."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist.errors import ConfigError
from launch import cli
from launch.cluster_config import Cluster
from launch.live_jobs import jobs_of, live_jobs
from launch.slurm import Request, job_name, sbatch_text
from launch.sweep import combinations, make_tasks, parse_sweep
from tests.fake_slurm import FakeSlurm
from tests.test_launch_slurm import CLUSTER, FOLDER, GOLDEN, HOSTILE, REQUEST, run_script, words_of

Say = pytest.CaptureFixture[str]


def array(sweeps: list[str], run_dir: str, **more: Any) -> Request:
    tasks = make_tasks(
        sweeps, run_dir=run_dir, arguments=("--config", "1b"), run_words=("--run", "lr-{task}")
    )
    fields = {name: getattr(REQUEST, name) for name in REQUEST.__dataclass_fields__}
    return Request(**{**fields, "run_dir": run_dir, "tasks": tasks, **more})


def test_golden_array() -> None:
    """A change of what users submit, seen as a diff. LEYDEN_UPDATE_GOLDEN=1 if it was meant."""
    path = GOLDEN / "sbatch_array.txt"
    request = array(["optim.lr=1e-3,3e-3", "seed=0,1"], "/shared/runs/lr-{task}", at_once=2)
    text = sbatch_text(request, CLUSTER)
    if os.environ.get("LEYDEN_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_values() -> None:
    """A task that misses a combination, or a comma that cuts a value."""
    assert combinations(["a=1,2", "b=x,y,z"])[4] == [("a", "2"), ("b", "y")]
    assert parse_sweep(r"--k=a\,b,c\d,,\\") == ("k", ["a,b", r"c\d", "", "\\\\"])
    assert parse_sweep("k=") == ("k", [""])
    for bad in ("k", "=1", "k=1,1"):
        with pytest.raises(ConfigError, match="--sweep"):
            parse_sweep(bad)
    with pytest.raises(ConfigError, match="names a key twice"):
        combinations(["a=1", "--a=2"])
    with pytest.raises(ConfigError, match="--seed is given, and --sweep gives it values too"):
        make_tasks(["seed=1,2"], run_dir="/r-{task}", arguments=["--seed=3"], run_words=[])


@pytest.fixture(scope="module")
def fake_python(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = FakeSlurm(tmp_path_factory.mktemp("fake"))
    python = made.bin / "python"
    python.write_text(
        '#!/bin/bash\n[ "$2" = launch.policy ] && exit 0\n'
        'printf "%s\\0" "$@" > "$FAKE_SLURM/words"\n'
        'printf "%s\\0" "$LEYDEN_RUN_DIR" > "$FAKE_SLURM/seen"\n'
    )
    python.chmod(0o755)
    return made


@settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(values=st.lists(HOSTILE, min_size=1, max_size=3, unique=True), folder=FOLDER,
       pick=st.integers(0, 2))  # fmt: skip
def test_hostile_values_of_a_sweep_arrive_byte_for_byte(
    fake_python: FakeSlurm, values: list[str], folder: str, pick: int
) -> None:
    """A value that ends its `case` arm, runs as a command, or reaches another task."""
    fake = fake_python
    with tempfile.TemporaryDirectory() as place:
        written = [value.replace(",", "\\,") for value in values]
        if [parse_sweep(f"k={one}") for one in written] != [("k", [one]) for one in values]:
            return  # a backslash before a comma cannot be written; parse_sweep's docstring says so
        root = Path(place)
        request = array(
            [f"k={','.join(written)}"], f"{place}/{folder}-{{task}}", work_dir=place,
            python=str(fake.bin / "python"), nodes=1, nproc=1,
        )  # fmt: skip
        number = pick % len(values)
        run = root / f"{folder}-{number}"
        run.mkdir()
        run_script(
            fake, sbatch_text(request, Cluster()), root,
            SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID=str(number),
        )  # fmt: skip
        expected = ["--config", "1b", "--run", f"lr-{number}", f"--k={values[number]}"]
        assert words_of(fake.state / "words")[-5:] == [word.encode() for word in expected]
        assert words_of(fake.state / "seen") == [str(run).encode()]
        assert (run / "attempts" / "0").is_dir()
        assert not list(root.rglob("canary")), "a value was executed"


def test_a_task_that_is_not_there(fake_python: FakeSlurm, tmp_path: Path) -> None:
    """A script that is submitted by hand with a larger --array would train without a folder."""
    text = sbatch_text(array(["seed=0,1"], f"{tmp_path}/r-{{task}}"), Cluster())
    for env in ({"SLURM_ARRAY_TASK_ID": "2"}, {}):
        with pytest.raises(AssertionError, match="no task"):
            run_script(fake_python, text, tmp_path, **env)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    made = FakeSlurm(tmp_path)
    made.install(monkeypatch)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("cluster.yaml").write_text("nodes: 1\n")
    return made


def submit(*words: str) -> int:
    command = ["submit", "pretrain", "--cluster", "cluster.yaml", "--allow", "L09"]
    return cli.main([*command, *words])


def test_each_task_is_a_run_of_its_own(fake: FakeSlurm, capsys: Say) -> None:
    """status, cancel and the refusal of a second submit that take another task's job for the
    run's: all tasks of an array have one name."""
    words = ["--run", "lr", "--sweep", "seed=0,1", "--sweep", "optim.lr=1e-3,2e-3"]
    assert submit(*words) == 0
    out = capsys.readouterr().out
    assert "submitted 4 runs as job 101" in out and "seed=1, optim.lr=1e-3" in out
    runs = [Path.cwd() / "runs" / f"lr-{k}" for k in range(4)]
    records = [json.loads((run / "submit.json").read_text())["submits"][0] for run in runs]
    assert [one["job_ids"] for one in records] == [[f"101_{k}"] for k in range(4)]
    assert len({one["code"] for one in records}) == 1 and Path(records[0]["code"]).is_dir()
    assert "--array" not in fake.calls("sbatch")[0], "the script says it"
    text = Path(records[0]["script"]).read_text()
    assert "#SBATCH --array=0-3\n" in text
    assert f"#SBATCH --output={Path.cwd()}/runs/lr-%a/slurm-%j.out\n" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    name = job_name(str(Path.cwd() / "runs" / "lr-{task}"))
    fake.queue(("101_1", "RUNNING", "None", name), ("101_3", "PENDING", "Resources", name))
    assert [len(live_jobs(run) or []) for run in runs] == [0, 1, 0, 1]
    assert jobs_of(runs[0], live_jobs(runs[1]) or []) == []
    assert cli.main(["status"]) == 0
    said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "job 101_1 running" in said["lr-1"] and "job 101_3 waiting" in said["lr-3"]
    assert "Slurm has no job of it" in said["lr-0"]
    assert cli.main(["cancel", "lr-3"]) == 0
    assert fake.calls("scancel") == ["101_3"]
    assert submit(*words) == 4, "a task of it runs"
    assert "lr-1 has job 101_1 already" in capsys.readouterr().err
    # A single run of a task's folder: its own jobs count, and no other task's.
    assert submit("--run", "lr-1") == 4
    assert submit("--run", "lr-0") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sweep", "seed"], "is not KEY=V1,V2"),
        (["--sweep", "seed=0,1", "--fresh"], "goes with neither --fresh nor --chain singleton"),
        (["--sweep", "seed=0,1", "--chain", "singleton"], "goes with neither"),
        (["--sweep", "seed=0", "--at-once", "no"], "--at-once 'no' is not a number of tasks"),
        (["--nnodes", "2"], "are leyden train's"),
        (["--max-restarts=2"], "are leyden train's"),
    ],
)
def test_usage_errors(fake: FakeSlurm, capsys: Say, words: list[str], said: str) -> None:
    """A traceback, or a job, for what the user can mend."""
    assert submit("--run", "x", *words) == 2
    assert said in capsys.readouterr().err
    assert fake.calls("sbatch") == []
