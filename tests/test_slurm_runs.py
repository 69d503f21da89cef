"""Two nodes of two ranks on a real Slurm: drained, killed, its node lost; then as if nothing was.

The run is the real recipe with FSDP2 on real shards; `assert_same_run` compares weights, optimizer,
samples and losses bit for bit with a run that nobody touched. Times go to the test's output.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dist.dataset import Dataset
from tests.make_dataset import write_dataset
from tests.rank_processes import train
from tests.slurm_cluster import Cluster, wait_for
from tests.slurm_runs import CHANGES, SAVE_EVERY, SlurmRun
from tests.test_exact_resume import assert_same_run

# On a machine where others compute too a start takes a minute instead of 15 s.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
STEPS = 60
SHORT = {**CHANGES, "max_steps": STEPS}

# The real recipe; each rank also writes down the steps that it completes.
RECORDED = """\
import os
from dist.run_recorder import RunRecorder
from recipes import pretrain

original = RunRecorder.on_train_batch_end


def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
    if batch.ends_step:
        name = f"steps-{os.environ['LEYDEN_ATTEMPT']}-{trainer.global_rank}"
        with open(os.path.join(os.environ["LEYDEN_RUN_DIR"], name), "a") as file:
            file.write(f"{batch.step}\\n")
    original(self, trainer, pl_module, outputs, batch, batch_idx)


RunRecorder.on_train_batch_end = on_train_batch_end
if __name__ == "__main__":
    from dist.errors import run_main

    run_main(pretrain.main)
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(
        tmp_path_factory.mktemp("data"), documents=40, num_train_shards=2, with_tokenizer=False
    )


@pytest.fixture(scope="module")
def untouched(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stops, without Slurm."""
    folder = tmp_path_factory.mktemp("untouched") / "run"
    assert train(dataset.storage.url, folder, 4, SHORT, timeout_s=200.0) == [0] * 4
    return folder


@pytest.fixture(scope="module")
def untouched_2(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two ranks, one a node: starting two costs half of four."""
    folder = tmp_path_factory.mktemp("untouched") / "run"
    assert train(dataset.storage.url, folder, 2, SHORT, timeout_s=200.0) == [0] * 2
    return folder


def test_drain_requeue_and_go_on(
    slurm: Cluster, dataset: Dataset, untouched: Path, tmp_path: Path
) -> None:
    """USR1 to the batch shell, as before a time limit: ranks that stop at steps of their own, a
    step done twice, a requeue before the checkpoint is durable, another code than was submitted."""
    run = SlurmRun(slurm, tmp_path, dataset.storage.url, steps=STEPS)
    own = tmp_path / "recorded.py"
    own.write_text(RECORDED)
    run.submit("recorded.py", "--log.to", '["tensorboard", "wandb"]')
    own.write_text("raise SystemExit('the copy of the submit must run, not this')\n")
    run.wait_steps(0, 12)
    second = run.try_submit("recorded.py")
    assert second.returncode == 4 and f"has job {run.job} already" in second.stderr
    since = time.monotonic()
    slurm.command("scancel", "--signal=USR1", "--batch", run.job)
    wait_for(lambda: run.read("attempts/0/end.json"), 60, f"drained: {run.said()}")
    took_s = time.monotonic() - since
    wait_for(lambda: slurm.state(run.job) == "PENDING", 20, "requeued")
    requeued_s = time.monotonic() - since
    stopped = run.read("attempts/0/outcome.json")
    assert stopped["status"] == "stopped" and 12 <= stopped["step"] < STEPS
    end = run.read("attempts/0/end.json")
    # Two agents, each with the code of its ranks: none may abort (134) while it ends.
    assert end["verdict"] == 75 and end["codes"] == [75, 75], end
    last = [(run.folder / f"steps-0-{rank}").read_text().split()[-1] for rank in range(4)]
    assert last == [str(stopped["step"] - 1)] * 4, "step spread"
    run.assert_gone(0)
    assert "waiting to be requeued" in run.leyden("status", "run").stdout
    run.wait_steps(1, 1)
    again_s = time.monotonic() - since
    assert run.steps_of(1)[0] == stopped["step"], "lost steps"
    run.wait_ended("COMPLETED")
    assert slurm.job(run.job)["ExitCode"] == "0:0"
    assert_same_run(run.folder, untouched)
    run.assert_gone(1)
    # One identity over the requeue: one curve, under the run's own id.
    run_id = run.read("run.json")["run_id"]
    assert run.read("loggers.json") == {"tensorboard": run_id, "wandb": run_id}
    # Two attempts, without a key: two folders of one id, which `wandb sync` joins.
    offline = list((run.folder / "loggers/wandb").glob(f"offline-run-*-{run_id}"))
    assert len(offline) == 2 and all(list(one.glob("*.wandb")) for one in offline)
    assert [path.name for path in (run.folder / "loggers/tensorboard").iterdir()] == [run_id]
    status = run.leyden("status", "run").stdout
    assert "run: completed" in status and "stopped on request" in status, status
    assert "recorded.py" not in run.leyden("logs", "run").stdout
    assert f"from step {stopped['step']}" in run.leyden("logs", "run", "--rank", "0").stdout
    print(
        f"from USR1: durable checkpoint {took_s:.1f} s, requeued {requeued_s:.1f} s, first new "
        f"step {again_s:.1f} s (with Slurm's own wait before a requeued job starts)"
    )


def test_killed_processes(
    slurm: Cluster, dataset: Dataset, untouched_2: Path, tmp_path: Path
) -> None:
    """kill -9 of a rank, and of the agent that hosts the store (rank 0 goes with it), in one run: a
    hang, an orphan that keeps the GPU, more than one interval lost, a wrong bit."""
    run = SlurmRun(slurm, tmp_path, dataset.storage.url, steps=STEPS)
    run.submit("pretrain", "--nproc", "1")
    kills = {"rank 1": lambda: run.rank(1), "agent of r1": lambda: run.agent("r1")}
    for attempt, (name, find) in enumerate(kills.items()):
        run.wait_steps(attempt, SAVE_EVERY + 4)
        before = time.time()
        run.kill(find())
        wait_for(lambda n=attempt: run.read(f"attempts/{n}/end.json"), 30, f"{name}: {run.said()}")
        end = run.read(f"attempts/{attempt}/end.json")
        run.assert_gone(attempt)
        assert end["verdict"] == 76 and end["committed_end"] > end["committed_start"], end
        print(f"{name}: told after {end['time'] - before:.1f} s")
    run.wait_ended("COMPLETED")
    assert run.read("attempts/0/end.json")["first_failure"]["rank"] == 1, "the rank that was killed"
    for attempt in range(len(kills)):
        lost = run.steps_of(attempt)[-1] + 1 - run.steps_of(attempt + 1)[0]
        # The newest save may have been under way.
        assert 0 <= lost <= 2 * SAVE_EVERY, (attempt, lost)
    assert_same_run(run.folder, untouched_2)
    run.assert_gone(len(kills))


def test_batch_shell_killed_then_a_node_lost(
    slurm: Cluster, dataset: Dataset, untouched_2: Path, tmp_path: Path
) -> None:
    """Nobody is left to requeue: a second submit must go on. Then a node fails: Slurm requeues,
    and the run must not land on that node again."""
    run = SlurmRun(slurm, tmp_path, dataset.storage.url, steps=STEPS)
    run.submit("pretrain", "--nproc", "1")
    run.wait_steps(0, SAVE_EVERY + 4)
    run.kill(run.batch_shell())
    run.wait_ended("FAILED", 60)
    run.assert_gone(0)
    assert ", resumable" in run.leyden("status", "run").stdout
    run.submit("pretrain", "--nproc", "1")
    run.wait_steps(1, SAVE_EVERY + 4)
    try:
        # Back at once, as after a reboot or with ReturnToService=2: its state tells nothing.
        slurm.command("scontrol", "update", "nodename=r2", "state=down", "reason=test")
        slurm.command("scontrol", "update", "nodename=r2", "state=resume")
        run.assert_gone(1)
        run.wait_steps(2, 1)
        assert "r2" not in (run.folder / "attempts/2/nodes").read_text().split()
        assert (run.folder / "control/exclude").read_text().split() == ["r2"]
        assert slurm.job(run.job)["ExcNodeList"] == "r2"
        assert "node failure" in run.read("attempts/1/failed_nodes")["r2"]
        run.wait_ended("COMPLETED")
    finally:
        slurm.resume_nodes()
    assert run.steps_of(1)[-1] + 1 - run.steps_of(2)[0] <= 2 * SAVE_EVERY
    assert_same_run(run.folder, untouched_2)
    run.assert_gone(2)


def test_crash_loop_ends(slurm: Cluster, dataset: Dataset, tmp_path: Path) -> None:
    """A bug that is there in every attempt would be requeued until somebody looks."""
    run = SlurmRun(slurm, tmp_path, dataset.storage.url, steps=STEPS)
    (tmp_path / "broken.py").write_text("raise RuntimeError('broken in every attempt')\n")
    run.submit("broken.py", "--srun-per-rank", recipe=False)
    run.wait_ended("FAILED", 120)
    assert slurm.job(run.job)["ExitCode"] == "93:0"
    assert sorted(path.name for path in (run.folder / "attempts").iterdir()) == ["0", "1", "2"]
    assert "ended for good: 3 attempts in a row" in run.leyden("status", "run").stdout
    assert "broken in every attempt" in run.leyden("logs", "run", "--rank", "3").stdout
    run.assert_gone(2)


def test_one_task_a_rank(slurm: Cluster, dataset: Dataset, tmp_path: Path) -> None:
    """srun-per-rank: ranks that take each other's number, or a cancel that loses what was done."""
    run = SlurmRun(slurm, tmp_path, dataset.storage.url, steps=STEPS)
    run.submit("pretrain", "--srun-per-rank")
    run.wait_steps(0, 8)
    said = run.leyden("cancel", "run", "--drain")
    assert said.returncode == 0 and "stops after" in said.stdout, said.stderr
    run.wait_ended("COMPLETED", 60)
    stopped = run.read("outcome.json")
    assert stopped["status"] == "stopped" and stopped["ranks"] == 4
    assert run.read("attempts/0/end.json")["codes"] == [75] * 4
    run.assert_gone(0)
