"""What becomes of a job after its ranks have ended, and which nodes it avoids."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dist.checkpoint_folder import checkpoint_name, write_commit
from dist.drain import CONTROL_DRAIN, clear_request
from dist.run_dir import RunDir
from launch import policy
from launch.policy import AGAIN, DONE, NEVER, RETRY, Ended, decide, status_of
from tests.fake_slurm import FakeSlurm

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (Ended(rc=0, status="completed"), DONE),
        # srun's code is another node's 143; the outcome is what counts.
        (Ended(rc=143, status="completed"), DONE),
        (Ended(rc=0, status="stopped", progress=(True,)), AGAIN),
        (Ended(rc=0, status="stopped", progress=(True,), cancelled=True), DONE),
        (Ended(rc=1, status="failed", progress=(True,)), RETRY),
        (Ended(rc=1, status="hung", progress=(True,)), RETRY),
        # Its rank could not run Python and was killed.
        (Ended(rc=137, status="hung", progress=(False,)), RETRY),
        (Ended(rc=137, progress=(True,)), RETRY),
        (Ended(rc=137, progress=(False, False)), RETRY),
        (Ended(rc=137, progress=(False, False, False)), NEVER),
        (Ended(rc=137, progress=(False, False, True)), RETRY),
        (Ended(rc=137, progress=(False, True, False, False)), RETRY),
        # Told to stop before its first checkpoint three times: the lead is longer than the job.
        (Ended(rc=0, status="stopped", progress=(False, False, False)), NEVER),
        (Ended(rc=1, status="failed", progress=(True,), failures=18), RETRY),
        (Ended(rc=1, status="failed", progress=(True,), failures=19), NEVER),
        (Ended(rc=3, status="data_refused", error="x", progress=(False,)), 3),
        (Ended(rc=2, progress=(False,)), 2),
        (Ended(rc=1, status="no_restart", progress=(True,)), NEVER),
        (Ended(rc=0, progress=(True,)), RETRY),
        (Ended(rc=0, codes=(0, 0), num_tasks=2, progress=(False,)), DONE),
        (Ended(rc=0, codes=(0, 75), num_tasks=2, progress=(True,)), AGAIN),
        (Ended(rc=0, codes=(0,), num_tasks=2, progress=(True,)), RETRY),
    ],
)
def test_verdicts(ended: Ended, code: int) -> None:
    """A crash loop that burns a night, or a run that is given up after one lost node."""
    assert decide(ended)[0] == code


def test_without_an_outcome_the_tasks_speak() -> None:
    """A user's own file writes no outcome: done and stopped would both count as failed."""
    assert status_of(Ended(rc=0, codes=(0,), num_tasks=1)) == "completed"
    assert status_of(Ended(rc=1, codes=(0, 1), num_tasks=2)) == "failed"
    assert status_of(Ended(rc=0)) == "failed"


class Job:
    """A run's folder as the job's script keeps it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        (run / "control").mkdir(parents=True)
        self.submit("one")

    def submit(self, name: str) -> None:
        (self.run / "submit.json").write_text(json.dumps({"submits": [{"id": name}]}))

    def attempt(self, number: int, *, commits: int = 0, rc: int = 1, **outcome: Any) -> int:
        """One attempt that commits a checkpoint at step `commits`; the policy's verdict."""
        folder = self.run / "attempts" / str(number)
        (folder / "ended").mkdir(parents=True)
        (folder / "nodes").write_text("r1\nr2\n")
        assert policy.start(self.run, number) == 0
        if commits:
            place = self.run / "checkpoints" / checkpoint_name(commits, number)
            place.mkdir(parents=True)
            write_commit(place, {})
        if outcome:
            (folder / "outcome.json").write_text(json.dumps(outcome))
        return policy.end(self.run, number, rc, ending=False)


def test_three_cycles_without_progress_end_a_run(tmp_path: Path) -> None:
    """A count that a new job id or a checkpoint of an earlier attempt would reset."""
    job = Job(tmp_path / "run")
    assert job.attempt(0, commits=5) == RETRY
    assert job.attempt(1) == RETRY
    assert job.attempt(2) == RETRY
    assert job.attempt(3, commits=9) == RETRY, "progress starts the count afresh"
    assert [job.attempt(n) for n in (4, 5, 6)] == [RETRY, RETRY, NEVER]
    job.submit("two")
    assert job.attempt(7) == RETRY, "a person has submitted it again"


def test_retired_checkpoints_are_progress(tmp_path: Path) -> None:
    """Retention deletes old checkpoints; the ledger still knows them."""
    job = Job(tmp_path / "run")
    line = {"event": "save", "checkpoint": "step-30-a0", "failure": ""}
    failed = {"event": "save", "checkpoint": "step-90-a0", "failure": "disk full"}
    torn = '{"event": "sa'
    (job.run / "ledger.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(failed)}\n{torn}")
    assert policy.committed_step(job.run) == 30


def test_an_old_completed_outcome_is_not_this_attempts(tmp_path: Path) -> None:
    """max_steps was raised and the new attempt died: `completed` would end the run unfinished."""
    job = Job(tmp_path / "run")
    (job.run / "outcome.json").write_text(json.dumps({"status": "completed", "attempt": 0}))
    assert job.attempt(0, rc=137) == RETRY
    assert job.attempt(1, rc=0) == DONE, "rank 0 found it complete and took no attempt"


def test_what_slurm_ends_is_nobodys_failure(tmp_path: Path) -> None:
    """Preempted three times in a row: no crash loop, and no requeue of our own on top."""
    job = Job(tmp_path / "run")
    for number in range(4):
        folder = job.run / "attempts" / str(number)
        (folder / "ended").mkdir(parents=True)
        (folder / "nodes").write_text("r1\n")
        policy.start(job.run, number)
        assert policy.end(job.run, number, 143, ending=True) == AGAIN
        assert json.loads((folder / "end.json").read_text())["by_slurm"]
    assert job.attempt(4) == RETRY, "the first failure of its own"


@pytest.mark.parametrize(
    ("state", "bad"),
    [
        ("IDLE", False), ("ALLOCATED", False), ("MIXED", False), ("DOWN", True),
        ("IDLE+DRAIN", True), ("DOWN*+DRAIN", True), ("IDLE*", True), ("FAIL", True),
    ],
)  # fmt: skip
def test_failed_nodes_are_excluded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, bad: bool
) -> None:
    """The same bad node, attempt after attempt."""
    fake = FakeSlurm(tmp_path)
    fake.install(monkeypatch)
    fake.set("node-r1", "NodeName=r1 State=ALLOCATED CPUTot=2\n")
    fake.set("node-r2", f"NodeName=r2 State={state} CPUTot=2\n")
    run = tmp_path / "run"
    for number in (0, 1):
        (run / "attempts" / str(number)).mkdir(parents=True)
        (run / "attempts" / str(number) / "nodes").write_text("r1\nr2\n")
    # Attempt 0 was ended from outside: it left no end.json.
    assert policy.start(run, 1) == (AGAIN if bad else 0)
    assert policy.excluded(run) == (["r2"] if bad else [])


NOW, LATER = time.time(), time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 7200))
EARLIER = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(NOW - 600))


@pytest.mark.parametrize(
    ("shown", "srun", "why"),
    [
        (f"State=IDLE BootTime={EARLIER}", "", None),
        (f"State=IDLE BootTime={LATER}", "", f"booted at {LATER}"),
        (f"State=IDLE Reason=bad disk [root@{LATER}]", "", "reason 'bad disk'"),
        (f"State=IDLE Reason=bad disk [root@{EARLIER}]", "", None),
        ("State=IDLE", "srun: error: Node failure on r2\n", "srun: node failure"),
        # What a rank prints is in another file; a name that begins alike is another node.
        ("State=IDLE", "srun: error: Node failure on r22\n", None),
        ("State=IDLE", "srun: error: r2: task 1: Killed\n", None),
    ],
    ids=["old boot", "booted", "reason", "old reason", "srun", "other node", "task"],
)
def test_a_failed_node_that_is_back_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: str, srun: str, why: str | None
) -> None:
    """A node that reboots in a minute, or whose slurmd returns in 40 ms, looks healthy to who
    asks for its state: the run lands on it again, attempt after attempt."""
    fake = FakeSlurm(tmp_path)
    fake.install(monkeypatch)
    fake.set("node-r1", "NodeName=r1 State=IDLE\n")
    fake.set("node-r2", f"NodeName=r2 {shown} CPUTot=2\n")
    job = Job(tmp_path / "run")
    folder = job.run / "attempts" / "0"
    (folder / "ended").mkdir(parents=True)
    (folder / "nodes").write_text("r1\nr2\n")
    assert policy.start(job.run, 0) == 0
    (folder / "srun.log").write_text(srun)
    monkeypatch.setattr(policy, "WAIT_FOR_WORD_S", 0.3)
    assert policy.main(["--nodes", str(job.run), "0"]) == 0
    assert policy.excluded(job.run) == (["r2"] if why else [])
    policy.end(job.run, 0, 143, ending=True)
    end = json.loads((folder / "end.json").read_text())
    assert end["failed_nodes"] == ({"r2": why} if why else {})


def test_sweep_ends_what_earlier_attempts_left(tmp_path: Path) -> None:
    """An orphan of the last attempt holds the GPU; another run's process must live."""
    run = str(tmp_path / "a run")
    sleeper = [sys.executable, "-S", "-c", "import time; print(flush=True); time.sleep(60)"]

    def started(folder: str, attempt: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, "LEYDEN_RUN_DIR": folder, "LEYDEN_ATTEMPT": attempt}
        process = subprocess.Popen(sleeper, env=env, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.read(1)  # it has its environment from here on
        return process

    orphan, ours, other = started(run, "3"), started(run, "4"), started(run + "2", "3")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "launch.policy", "--sweep", run, "4"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0 and "ended 1 processes" in done.stdout, done.stderr
        assert orphan.wait(timeout=10) == -9
        assert ours.poll() is None and other.poll() is None
    finally:
        for process in (orphan, ours, other):
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def test_policy_needs_nothing_installed(tmp_path: Path) -> None:
    """A batch node without the environment's packages could not even requeue."""
    (tmp_path / "run" / "attempts" / "0").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-S", "-m", "launch.policy", str(tmp_path / "run"), "0", "1"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (RETRY, "")
    assert done.stdout == "attempt 0: again: failed (exit code 1)\n"


def test_ranks_take_the_attempt_of_their_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logs in one attempt and the outcome in another; or a request to stop that came between the
    job's start and the ranks', forgotten by them: the job would train on until it is killed."""
    run = RunDir.open(tmp_path / "runs" / "a")
    (run.path / "attempts" / "4").mkdir(parents=True)
    (run.path / "control").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEYDEN_RUN_DIR", str(run.path))
    monkeypatch.setenv("LEYDEN_ATTEMPT", "4")
    relative = RunDir(Path("runs") / "a")
    assert relative.new_attempt() == 4
    (run.path / CONTROL_DRAIN).touch()
    clear_request(relative.path)
    assert (run.path / CONTROL_DRAIN).exists()
    # The same environment and another run, or a second start of this one.
    other = RunDir.open(tmp_path / "runs" / "b")
    assert other.new_attempt() == 0
    assert relative.new_attempt() == 5
