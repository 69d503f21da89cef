"""submit, status, logs, cancel against fakes of Slurm's commands, in every state they can give."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from dist.run_dir import RunDir
from launch import cli
from launch.cluster_config import Cluster, parse_cluster
from launch.lint import check_script
from launch.live_jobs import Job, ask_squeue
from launch.slurm import job_name
from launch.snapshot import take_snapshot
from launch.submit import split_options
from tests.fake_slurm import FakeSlurm

Say = pytest.CaptureFixture[str]
CLUSTER = "nodes: 2\ngpus_per_node: 4\ncpus_per_task: 3\npartition: gpu\n"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    made = FakeSlurm(tmp_path)
    made.install(monkeypatch)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("cluster.yaml").write_text(CLUSTER)
    return made


def submit(*words: str) -> int:
    """`leyden submit pretrain` of a run called first; temporary folders are not shared (L09)."""
    command = ["submit", "pretrain", "--run", "first", "--cluster", "cluster.yaml"]
    return cli.main([*command, "--allow", "L09", *words])


def record() -> dict[str, Any]:
    return dict(json.loads(Path("runs/first/submit.json").read_text())["submits"][-1])


def test_submit_writes_the_run_before_it_asks_slurm(fake: FakeSlurm, capsys: Say) -> None:
    """A job that starts before its snapshot is there, or that no record names."""
    assert submit("--config", "tiny", "--data.url", "a b") == 0
    assert "job 101" in capsys.readouterr().out
    made = record()
    script = Path(made["script"])
    assert fake.calls("sbatch") == [f"--parsable {script}"]
    assert made["job_ids"] == ["101"] and made["arguments"][0] == "pretrain"
    text = script.read_text()
    assert "--data.url 'a b'" in text and "#SBATCH --nodes=2\n" in text and "NPROC=4\n" in text
    code = Path(made["code"])
    assert code.parent == Path.cwd() / "runs" / "first" / "code"
    assert (code / "recipes" / "pretrain.py").is_file()
    assert (code / "launch" / "templates" / "train.sbatch").is_file()
    assert f"CODE={code}\n" in text


def test_dry_run_writes_nothing(fake: FakeSlurm, capsys: Say) -> None:
    """A dry run that leaves a folder, which the next submit takes for the run."""
    assert submit("--dry-run", "--nodes", "7", "--nproc=2", "--srun-per-rank") == 0
    out = capsys.readouterr().out
    assert out.startswith("#!/bin/bash\n")
    assert "#SBATCH --nodes=7\n#SBATCH --ntasks-per-node=2\n" in out
    assert fake.calls("sbatch") == [] and not Path("runs").exists()


def test_a_second_submit_is_refused_while_a_job_lives(fake: FakeSlurm, capsys: Say) -> None:
    """Two jobs that train one run: the second would wait for ever, or tear its files."""
    assert submit() == 0
    name = job_name(str(Path.cwd() / "runs/first"))
    for state in ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED"):
        fake.queue(("101", state, "Resources", name))
        assert submit() == 4
        assert "has job 101 already" in capsys.readouterr().err
    fake.queue(("101", "FAILED", "None", name), ("9", "RUNNING", "None", "another"))
    assert submit() == 0
    assert len(json.loads(Path("runs/first/submit.json").read_text())["submits"]) == 2
    fake.set("squeue.error", "slurm_load_jobs error: Unable to contact slurm controller")
    assert submit() == 4
    assert "squeue cannot be asked" in capsys.readouterr().err


def test_a_live_lease_refuses_a_submit(fake: FakeSlurm, capsys: Say) -> None:
    """`leyden train` works on the run on another machine."""
    run = RunDir.open(Path("runs/first"))
    with run.lease(0):
        assert submit() == 4
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    assert submit() == 0


def test_sbatch_that_refuses_is_said_so(fake: FakeSlurm, capsys: Say) -> None:
    """Its words lost, or a run recorded with a job that does not exist."""
    fake.set("sbatch.error", "sbatch: error: invalid partition specified: gpu")
    assert submit() == 4
    assert "invalid partition specified: gpu" in capsys.readouterr().err
    assert record()["job_ids"] == []


def test_a_chain_is_several_jobs_of_one_name(fake: FakeSlurm) -> None:
    """Jobs of a chain that run side by side."""
    Path("cluster.yaml").write_text(CLUSTER + "chain_jobs: 3\n")
    assert submit("--chain", "singleton") == 0
    assert record()["job_ids"] == ["101", "102", "103"]
    text = Path(record()["script"]).read_text()
    assert "#SBATCH --dependency=singleton\n" in text and "#SBATCH --no-requeue\n" in text


def test_edits_after_submit_do_not_reach_the_job(fake: FakeSlurm, tmp_path: Path) -> None:
    """A requeue that runs code which the first attempt did not."""
    repository = tmp_path / "repository"
    (repository / "dist").mkdir(parents=True)
    for name in (".gitignore", "dist/a.py", "dist/big.bin", "new.py"):
        (repository / name).write_text("*.bin\n")
    git = ("git", "-c", "user.name=x", "-c", "user.email=x@y")
    for words in (("init", "-q"), ("add", "dist/a.py", ".gitignore"), ("commit", "-qm", "x")):
        subprocess.run([*git, *words], cwd=repository, check=True)
    own = tmp_path / "own" / "mine.py"
    own.parent.mkdir()
    own.write_text("print(1)\n")
    (own.parent / "helper.py").write_text("x = 1\n")
    code = take_snapshot(tmp_path / "run", own, repository)
    assert set(code.files) == {".gitignore", "dist/a.py", "new.py", "own/mine.py", "own/helper.py"}
    assert code.dirty and len(code.commit) == 40
    assert code.path == f"{code.folder}:{code.folder}/own"
    code.write()
    (repository / "dist" / "a.py").write_text("changed\n")
    assert (code.folder / "dist" / "a.py").read_text() == "*.bin\n"
    later = take_snapshot(tmp_path / "run", own, repository)
    assert later.folder != code.folder
    assert Path(code.target).read_text() == "print(1)\n"


def test_arguments_stay_as_they_were_typed() -> None:
    """Options after `--` that submit takes for its own, or values that it moves."""
    words = ["--nodes=3", "--x", "--nproc", "2", "", "--srun-per-rank", "--", "--nodes", "9"]
    options = split_options(words)
    assert (options.nodes, options.per_rank) == (3, True)
    assert options.rest == ["--x", "--nproc", "2", "", "--", "--nodes", "9"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partiton: gpu", "unknown key 'partiton'; did you mean 'partition'?"),
        ("nodes: two", "nodes is 'two'; it must be a whole number"),
        ("nodes: 0", "nodes is 0; it must be 1 or more"),
        ("mem_gib: -1", "mem_gib is -1; it must not be negative"),
        ("exclusive: 1", "exclusive is 1; it must be a true or false"),
        ("setup: 3", "setup is 3; it must be a list of texts"),
        ("account: 12", "account is 12; it must be text (in quotes)"),
        ("- a", "must hold `key: value` lines, not a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_cluster_file_is_checked(fake: FakeSlurm, capsys: Say, text: str, said: str) -> None:
    """A key that was misspelt and silently ignored: the job waits in the wrong partition."""
    Path("cluster.yaml").write_text(text)
    assert submit("--dry-run") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrian"], "did you mean 'pretrain'?"),
        (["pretrain"], "--cluster FILE.yaml is missing"),
        (["pretrain", "--cluster", "no.yaml"], "no cluster file no.yaml"),
        (["pretrain", "--cluster", "cluster.yaml", "--nodes", "x"], "--nodes 'x' is not a number"),
        (["pretrain", "--cluster", "cluster.yaml", "--chain", "singelton"], "mean 'singleton'?"),
        (["pretrain", "--cluster"], "--cluster needs a value"),
        (["pretrain", "--cluster", "cluster.yaml", "--run", "a:b"], "cannot hold a colon"),
    ],
)
def test_usage_errors(fake: FakeSlurm, capsys: Say, words: list[str], said: str) -> None:
    """A traceback for what the user can mend."""
    assert cli.main(["submit", *words]) == 2
    assert said in capsys.readouterr().err


def test_run_root_of_the_cluster_reaches_the_recipe(fake: FakeSlurm, tmp_path: Path) -> None:
    """The job's folder and the recipe's must be one; else the policy reads an empty one."""
    Path("cluster.yaml").write_text(CLUSTER + f"run_root: {tmp_path}/shared\n")
    assert submit() == 0
    (script,) = (tmp_path / "shared" / "first" / "submits").glob("*.sbatch")
    text = script.read_text()
    assert f"--run_root {tmp_path}/shared\n" in text
    assert f"RUN_DIR={tmp_path}/shared/first\n" in text


def test_lists_of_the_cluster_file() -> None:
    """One line given as a string becomes its letters."""
    made = parse_cluster({"setup": "module load x", "exclude": ["a", "b"]}, "x")
    assert made == Cluster(setup=("module load x",), exclude=("a", "b"))


@pytest.mark.parametrize(
    ("state", "reason", "start", "said"),
    [
        ("PENDING", "JobHeldUser", "N/A", "held by its user: scontrol release 7"),
        ("PENDING", "JobHeldAdmin", "N/A", "held by an administrator: scontrol release 7"),
        ("PENDING", "launch failed requeued held", "N/A", "held because a node could not start it"),
        ("PENDING", "BeginTime", "2026-11-22T00:01:37", "waiting to be requeued in 97 s"),
        ("PENDING", "Dependency", "N/A", "waiting for the job before it"),
        ("PENDING", "Resources", "N/A", "waiting (Resources)"),
        ("RUNNING", "None", "x", "running on r1 until 2026-11-22T12:00:00"),
        ("COMPLETING", "None", "x", "completing on r1"),
    ],
)
def test_what_a_job_does_in_words(state: str, reason: str, start: str, said: str) -> None:
    """`PENDING` for a job that an administrator must release: nobody looks for a week."""
    job = Job(
        job_id="7", state=state, reason=reason, start=start, end="2026-11-22T12:00:00",
        nodes="r1", name="x",
    )  # fmt: skip
    now = time.mktime(time.strptime("2026-11-22T00:00:00", "%Y-%m-%dT%H:%M:%S"))
    assert job.words(now).startswith(said)


def test_squeue_without_an_answer_is_not_an_empty_queue(fake: FakeSlurm) -> None:
    """A controller that is down for a minute would let a second job in."""
    assert ask_squeue() == []
    fake.set("squeue.error", "slurm_load_jobs error: Unable to contact slurm controller")
    assert ask_squeue() is None
    fake.set("squeue.error", "slurm_load_jobs error: Invalid job id specified")
    assert ask_squeue() == []


def attempt(run: Path, number: int, **files: dict[str, Any]) -> None:
    for name, content in files.items():
        path = run / "attempts" / str(number) / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def test_status_tells_what_became_of_runs(fake: FakeSlurm, capsys: Say) -> None:
    """A run that waits, is held, was killed, or is over, in one word that fits all."""
    assert submit() == 0
    run = Path("runs/first").absolute()
    assert cli.main(["status"]) == 0
    assert "submitted as job 101, but Slurm has no job of it" in capsys.readouterr().out
    fake.queue(("101", "PENDING", "JobHeldUser", job_name(str(run))))
    assert cli.main(["status", "first"]) == 0
    assert "job 101 held by its user: scontrol release 101" in capsys.readouterr().out
    fake.queue()
    attempt(run, 0, start={"SLURM_JOB_ID": "101", "time": record()["time"] + 9, "nodes": ["r1"]})
    cli.main(["status"])
    assert "killed, resumable" in capsys.readouterr().out
    fake.set("squeue.error", "Unable to contact slurm controller")
    cli.main(["status"])
    assert "Slurm cannot be asked whether its job runs" in capsys.readouterr().out
    (fake.state / "squeue.error").unlink()
    attempt(run, 0, end={"verdict": 93, "why": "3 attempts in a row ended", "time": 1.0})
    cli.main(["status", "first"])
    out = capsys.readouterr().out
    assert "ended for good: 3 attempts in a row" in out
    # Queued from the submit on.
    row = out.splitlines()[-1].split()
    assert row[:3] == ["0", "101", "r1"]
    fake.set("squeue.error", "Unable to contact slurm controller")
    cli.main(["status", "first"])
    assert "Slurm cannot be asked here" in capsys.readouterr().out
    (run / "outcome.json").write_text(
        json.dumps({"status": "completed", "attempt": 1, "step": 9, "max_steps": 9})
    )
    attempt(run, 1, outcome={"status": "completed"})
    cli.main(["status"])
    assert "completed" in capsys.readouterr().out
    assert cli.main(["status", "nope"]) == 2
    assert "runs in runs/: first" in capsys.readouterr().err


def test_time_in_the_queue(tmp_path: Path) -> None:
    """Training of earlier attempts counted as waiting, when Slurm ended them without a verdict."""
    from launch.status import queued_s

    submits = [{"id": "a", "time": 100.0}, {"id": "b", "time": 900.0}]
    (tmp_path / "submit.json").write_text(json.dumps({"submits": submits}))
    attempt(tmp_path, 0, start={"time": 130.0, "submit": "a"}, end={"time": 200.0})
    attempt(tmp_path, 1, start={"time": 205.0, "submit": "a"}, outcome={"time": 300.0})
    attempt(tmp_path, 2, start={"time": 310.0, "submit": "a"})
    attempt(tmp_path, 3, start={"time": 400.0, "submit": "a"}, end={"time": 500.0})
    attempt(tmp_path, 4, start={"time": 907.0, "submit": "b"})
    assert [queued_s(tmp_path, n) for n in range(6)] == [30.0, 5.0, 10.0, None, 7.0, None]


def test_status_reads_the_last_whole_line(tmp_path: Path) -> None:
    """A line torn by a kill, or a log of gigabytes read from its beginning."""
    from launch.status import last_line

    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {i}}}\n' for i in range(5000)) + '{"step": 50')
    assert last_line(path) == {"step": 4999}
    assert last_line(tmp_path / "none") == {}


def test_logs_of_a_rank(fake: FakeSlurm, capsys: Say) -> None:
    """torchrun numbers nodes by name: r10 comes before r9, whatever Slurm's order is."""
    assert submit() == 0
    run = Path("runs/first")
    start = {"SLURM_JOB_ID": "101", "NPROC": "2", "nodes": ["r9", "r10"], "time": 1.0}
    attempt(run, 0, start=start, end={"verdict": 0})
    for node in ("r9", "r10"):
        for local in (0, 1):
            folder = run / "attempts/0/logs" / node / "1.0_abc/attempt_0" / str(local)
            folder.mkdir(parents=True)
            (folder / "stdout.log").write_text(f"{node}/{local}\n")
    (run / "slurm-101.out").write_text("the job\n")
    capsys.readouterr()
    said = []
    for words in ([], ["--rank", "0"], ["--rank", "1"], ["--rank", "2"], ["--rank", "3"]):
        assert cli.main(["logs", "first", *words]) == 0
        said.append(capsys.readouterr().out)
    assert said == ["the job\n", "r10/0\n", "r10/1\n", "r9/0\n", "r9/1\n"]
    assert cli.main(["logs", "first", "--rank", "4"]) == 2
    assert "ranks 0 to 3" in capsys.readouterr().err
    assert cli.main(["logs", "first", "--follow"]) == 0, "ends when the run has"


def test_cancel_at_once_and_after_a_checkpoint(fake: FakeSlurm, capsys: Say) -> None:
    """A drain that Slurm's requeue undoes, or a waiting job that is asked to save."""
    assert submit() == 0
    run = Path("runs/first").absolute()
    assert cli.main(["cancel", "first"]) == 2
    assert "nothing of" in capsys.readouterr().err
    name = job_name(str(run))
    fake.queue(("101", "RUNNING", "None", name), ("102", "PENDING", "Dependency", name))
    assert cli.main(["cancel", "first", "--drain"]) == 0
    assert fake.calls("scancel") == ["102"]
    assert (run / "control" / "drain").read_text() == "cancel\n"
    capsys.readouterr()
    cli.main(["status", "first"])
    assert "asked to stop" in capsys.readouterr().out
    assert cli.main(["cancel", "first"]) == 0
    assert fake.calls("scancel")[-1] == "101 102"
    fake.queue(("101", "PENDING", "BeginTime", name))
    (run / "control" / "drain").unlink()
    assert cli.main(["cancel", "first", "--drain"]) == 0
    assert not (run / "control" / "drain").exists(), "it would stop the next start"
    fake.set("squeue.error", "Unable to contact slurm controller")
    assert cli.main(["cancel", "first"]) == 4


def test_what_submit_writes_passes_its_own_checks(fake: FakeSlurm, capsys: Say) -> None:
    """A linter that its own house fails."""
    assert submit("--dry-run") == 0
    captured = capsys.readouterr()
    assert "error: L" not in captured.err.replace("error: L09", "")
    assert [f.rule for f in check_script(captured.out) if f.rule != "L09"] == []


def test_the_page_on_slurm_is_true() -> None:
    """An example file that submit refuses, a verb or a key that was renamed."""
    import dataclasses

    import yaml

    page = (Path(__file__).resolve().parent.parent / "docs" / "slurm.md").read_text()
    example = page.split("```yaml\n")[1].split("```")[0]
    cluster = parse_cluster(yaml.safe_load(example), "docs/slurm.md")
    assert cluster.gpus_per_node == 8 and cluster.setup == ("module load cuda",)
    for field in dataclasses.fields(Cluster):
        assert f"{field.name}:" in example or f"`{field.name}`" in page, field.name
    commands = [line.split()[1] for line in page.splitlines() if line.startswith("    leyden ")]
    assert len(commands) >= 6 and set(commands) <= set(cli.VERBS)
