"""Training that waits for a prep job: on fakes of Slurm's commands and a real dataset."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from launch.after_prep import find_prep
from launch.cluster_config import Cluster
from launch.slurm import job_name, sbatch_text
from tests.fake_slurm import FakeSlurm
from tests.make_dataset import write_dataset
from tests.test_launch_slurm import REQUEST, words_of

Say = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parent.parent
# Stands for the interpreter: what is not after_prep only writes down its words.
PYTHON = f"""#!/bin/bash
[ "$2" = launch.policy ] && exit 0
[ "$2" = launch.after_prep ] && exec {sys.executable} "$@"
printf '%s\\0' "$@" > "$FAKE_SLURM/words"
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    made = FakeSlurm(tmp_path)
    made.install(monkeypatch)
    (made.bin / "python").write_text(PYTHON)
    (made.bin / "python").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    Path("cluster.yaml").write_text("nodes: 2\n")
    return made


def write_prep(name: str, *, job_id: str, output: Path, time: float = 1.0, **more: Any) -> Path:
    folder = Path("runs/prep") / name
    folder.mkdir(parents=True)
    record = {"job": "tokenize_text", "job_id": job_id, "output": str(output), "time": time}
    (folder / "prep.json").write_text(json.dumps({**record, **more}))
    return folder.resolve()


def submit(*words: str) -> int:
    base = ["submit", "pretrain", "--run", "first", "--cluster", "cluster.yaml", "--allow", "L09"]
    return cli.main([*base, *words])


def start(fake: FakeSlurm, tmp_path: Path, prep: Path) -> subprocess.CompletedProcess[str]:
    """Run the rendered batch script of a training that waits for `prep`."""
    (tmp_path / "run").mkdir(exist_ok=True)
    request = replace(
        REQUEST, run_dir=str(tmp_path / "run"), work_dir=str(tmp_path), code=str(ROOT),
        python=str(fake.bin / "python"), nproc=1, prep=str(prep), chain="singleton",
    )  # fmt: skip
    return subprocess.run(
        ["bash", "-c", sbatch_text(request, Cluster()), "script"], cwd=tmp_path,
        env={
            "PATH": f"{fake.bin}:/usr/bin:/bin", "FAKE_SLURM": str(fake.state),
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "r1", "SLURM_NNODES": "1",
            "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "x",
        },
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_submit_depends_on_the_live_job(fake: FakeSlurm, tmp_path: Path, capsys: Say) -> None:
    """A dependency on a job that Slurm has forgotten (sbatch refuses it), or none on a live one."""
    prep = write_prep("one", job_id="50", output=tmp_path / "data")
    fake.queue(("50", "RUNNING", "None", job_name(str(prep))))
    assert submit("--after-prep", "50", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "#SBATCH --dependency=afterany:50\n" in out and f"PREP={prep}\n" in out
    assert submit("--after-prep", "data", "--chain", "singleton", "--dry-run") == 0
    assert "#SBATCH --dependency=singleton,afterany:50\n" in capsys.readouterr().out
    fake.queue(("50", "FAILED", "None", job_name(str(prep))))
    assert submit("--after-prep", "one", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "--dependency" not in out.split("# Slurm")[0].split("RUN_DIR=")[0]
    assert submit("--after-prep", "50") == 0, "and for good"


def test_what_cannot_be_meant_is_refused(fake: FakeSlurm, tmp_path: Path, capsys: Say) -> None:
    """A training that waits for a job which writes other data, or none."""
    write_prep("one", job_id="50", output=tmp_path / "data")
    write_prep("two", job_id="60", output=tmp_path / "tok", job="train_tokenizer")
    assert submit("--after-prep", "51") == 2
    assert "did you mean '50'?" in capsys.readouterr().err
    assert submit("--after-prep", "60") == 2
    assert "makes a tokenizer" in capsys.readouterr().err
    assert submit("--after-prep", "50", "--data.url", "elsewhere") == 2
    assert f"writes {tmp_path / 'data'}; leave --data.url out" in capsys.readouterr().err
    assert submit("--after-prep", "50", "--data.url", "data", "--dry-run") == 0


def test_the_newest_of_a_dataset(fake: FakeSlurm, tmp_path: Path) -> None:
    """Two preps of one dataset: the older one's commit is what nobody waits for."""
    write_prep("b", job_id="50", output=tmp_path / "data", time=2.0)
    newest = write_prep("a", job_id="51", output=tmp_path / "data", time=3.0)
    root = tmp_path / "runs" / "prep"
    assert find_prep("data", root, tmp_path) == newest
    assert find_prep("50", root, tmp_path).name == "b"


def test_it_trains_on_what_that_job_committed(fake: FakeSlurm, tmp_path: Path) -> None:
    """LATEST of another job, which came later; a job that failed after its commit; a requeue that
    finds another version."""
    wanted = write_dataset(tmp_path / "data", seed=1)
    later = write_dataset(tmp_path / "data", seed=2)
    assert wanted.data_digest != later.data_digest
    prep = write_prep("one", job_id="50", output=tmp_path / "data")
    said = {"job_digest": f"{1:064x}", "output": str(tmp_path / "data")}
    (prep / "job.json").write_text(json.dumps(said))
    (prep / "ended").write_text("1\n")
    done = start(fake, tmp_path, prep)
    assert done.returncode == 0, done.stderr
    assert "ended with exit code 1 after its commit; training goes on" in done.stderr
    given = words_of(fake.state / "words")
    assert given[-2:] == [b"--data.url", f"{tmp_path}/data@{wanted.data_digest}".encode()]
    bound = json.loads((tmp_path / "run" / "prep.json").read_text())
    assert bound["data"] == given[-1].decode() and bound["job_id"] == "50"
    # A requeue, when the record says something else.
    (prep / "job.json").write_text(json.dumps({**said, "job_digest": f"{2:064x}"}))
    assert start(fake, tmp_path, prep).returncode == 0
    assert words_of(fake.state / "words")[-1] == given[-1]


@pytest.mark.parametrize("how", ["never ran", "other job", "shard gone"])
def test_without_its_commit_it_never_starts(
    fake: FakeSlurm, tmp_path: Path, how: str, capsys: Say
) -> None:
    """A run that trains on yesterday's data because today's job failed."""
    dataset = write_dataset(tmp_path / "data", seed=1)
    prep = write_prep("one", job_id="50", output=tmp_path / "data")
    if how != "never ran":
        digest = f"{1 if how == 'shard gone' else 9:064x}"
        said = {"job_digest": digest, "output": str(tmp_path / "data")}
        (prep / "job.json").write_text(json.dumps(said))
        (prep / "ended").write_text("3\n")
    if how == "shard gone":
        dataset.shard_path(dataset.manifest.shards[0]).unlink()
    done = start(fake, tmp_path, prep)
    assert done.returncode == 93, done.stderr
    assert "has committed nothing to" in done.stderr
    assert not (fake.state / "words").exists() and not (tmp_path / "run" / "prep.json").exists()
    assert fake.calls("scancel"), "the rest of the chain"
    (tmp_path / "run" / "submit.json").write_text('{"submits": []}')
    assert cli.main(["status", str(tmp_path / "run")]) == 0
    assert "ended for good: the prep job 50" in capsys.readouterr().out
