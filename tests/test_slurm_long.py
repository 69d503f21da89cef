"""Minutes on a real Slurm: ten preemptions, a chain, a time limit, and a soak under kills.

Run by `make test-slurm`; every other selection leaves these out (tests/conftest.py).
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from dist.dataset import Dataset, open_dataset
from tests.make_dataset import write_dataset
from tests.rank_processes import train
from tests.slurm_cluster import Cluster, wait_for
from tests.slurm_preps import CLUSTER_YAML, SlurmPrep, leyden, prep_words, write_corpus
from tests.slurm_runs import CHANGES, SAVE_EVERY, STEPS, SlurmRun
from tests.test_exact_resume import assert_same_run

pytestmark = [pytest.mark.slurm, pytest.mark.slurm_long, pytest.mark.timeout(2400)]
SOAK_S, KILL_EVERY_S, SOAK_STEP_S = 600.0, 30.0, 0.4

# The real recipe with a rest in every step, so that a small model lasts for minutes.
SLOW = """\
import time
from dist.run_recorder import RunRecorder
from recipes import pretrain

original = RunRecorder.on_train_batch_end


def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
    if batch.ends_step:
        time.sleep({seconds})
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
    assert train(dataset.storage.url, folder, 4, CHANGES, timeout_s=200.0) == [0] * 4
    return folder


def slow(run: SlurmRun, seconds: float) -> str:
    (run.work / "slow.py").write_text(SLOW.format(seconds=seconds))
    return "slow.py"


def test_ten_preemptions(slurm: Cluster, dataset: Dataset, untouched: Path, tmp_path: Path) -> None:
    """A job of a higher partition takes the nodes, ten times: USR1, then SIGTERM, then SIGKILL.
    A second requeue on top of Slurm's, or a step lost each time, shows in the end."""
    run = SlurmRun(slurm, tmp_path, dataset.storage.url)
    # The blocker wants all four nodes, so the run cannot go around it.
    run.submit(slow(run, 0.1))
    for cycle in range(10):
        run.wait_steps(cycle, 6)
        blocker = slurm.command(
            "sbatch", "--parsable", "--partition=hi", "--nodes=4", "--exclusive",
            "--output=/dev/null", "--wrap=sleep 2",
        ).strip()  # fmt: skip
        wait_for(lambda job=blocker: slurm.ended(job), 120, f"blocker {cycle}: {run.said()}")
        run.assert_gone(cycle)
    run.wait_ended("COMPLETED", 300)
    steps = [step for attempt in range(11) for step in run.steps_of(attempt)]
    assert steps == list(range(STEPS)), "each step once: nothing lost, nothing done twice"
    assert_same_run(run.folder, untouched)


def test_chain(slurm: Cluster, dataset: Dataset, untouched: Path, tmp_path: Path) -> None:
    """Jobs one after the other where requeueing is off; those left over are cancelled."""
    run = SlurmRun(slurm, tmp_path, dataset.storage.url)
    with open(tmp_path / "cluster.yaml", "a") as file:
        file.write("chain_jobs: 4\n")
    run.submit(slow(run, 0.05), "--chain", "singleton")
    jobs = run.read("submit.json")["submits"][0]["job_ids"]
    assert len(jobs) == 4
    for attempt in range(2):
        run.job = jobs[attempt]
        run.wait_steps(attempt, 6)
        assert "waiting for the job before it" in slurm_words(run, jobs[attempt + 1])
        slurm.command("scancel", "--signal=USR1", "--batch", jobs[attempt])
        wait_for(lambda job=jobs[attempt]: slurm.ended(job), 60, run.said())
    run.job = jobs[2]
    run.wait_ended("COMPLETED")
    wait_for(lambda: slurm.ended(jobs[3]), 30, "the last job of the chain")
    assert slurm.state(jobs[3]) == "CANCELLED"
    assert_same_run(run.folder, untouched)


def slurm_words(run: SlurmRun, job: str) -> str:
    from launch.live_jobs import Job

    fields = run.cluster.job(job)
    return Job(
        job_id=job, state=fields["JobState"], reason=fields["Reason"], start="N/A", end="N/A",
        nodes="", name="",
    ).words()  # fmt: skip


def test_time_limit(slurm: Cluster, dataset: Dataset, untouched: Path, tmp_path: Path) -> None:
    """Slurm's own USR1 before the limit, not one that a test sends."""
    run = SlurmRun(slurm, tmp_path, dataset.storage.url)
    text = (tmp_path / "cluster.yaml").read_text().replace("20", "2")
    (tmp_path / "cluster.yaml").write_text(text + "lead_s: 30\n")
    run.submit(slow(run, 1.5))
    wait_for(lambda: run.read("attempts/0/end.json"), 200, run.said())
    end = run.read("attempts/0/end.json")
    assert (end["status"], end["drain"]) == ("stopped", "USR1")
    (tmp_path / "slow.py").unlink()
    assert run.leyden("cancel", "run").returncode == 0
    wait_for(lambda: slurm.ended(run.job), 30, "cancelled")
    assert slurm.state(run.job) == "CANCELLED", "cancelled, and not requeued by its own script"
    run.submit()
    run.wait_ended("COMPLETED")
    assert_same_run(run.folder, untouched)


def test_array(slurm: Cluster, dataset: Dataset, tmp_path: Path) -> None:
    """One job array of two runs: a requeue of one task that takes the other along, attempts or a
    lease that they share, a status that shows one task's job for both."""
    array = SlurmRun(slurm, tmp_path, dataset.storage.url, "sweep")
    (tmp_path / "cluster.yaml").write_text("nodes: 1\ncpus_per_task: 1\ntime_limit_min: 20\n")
    array.submit(slow(array, 0.05), "--sweep", "seed=0,1", "--max_steps", "60")
    runs = [SlurmRun(slurm, tmp_path, dataset.storage.url, f"sweep-{k}") for k in (0, 1)]
    for number, run in enumerate(runs):
        run.job = f"{array.job}_{number}"
        run.wait_steps(0, 4)
    slurm.command("scancel", "--signal=USR1", "--batch", runs[1].job)
    wait_for(lambda: runs[1].read("attempts/0/end.json"), 60, f"drained: {runs[1].said()}")
    runs[1].assert_gone(0)
    runs[1].wait_steps(1, 1)
    listed = array.leyden("status").stdout
    assert f"job {runs[1].job} running" in listed, listed
    assert "from step" in runs[1].leyden("logs", "sweep-1", "--rank", "0").stdout
    for number, run in enumerate(runs):
        run.wait_ended("COMPLETED", 300)
        steps = [line["step"] for line in run.lines("consumed.jsonl")]
        assert steps == list(range(60)), "each step once"
        assert run.read("run.json")["config"]["seed"] == number
        run.assert_gone(number)
    assert (runs[0].folder / "attempts" / "1").exists() is False
    assert len({run.read("run.json")["run_id"] for run in runs}) == 2
    print(f"array: task 1 stopped at {runs[1].read('attempts/0/outcome.json')['step']}")


def test_soak(slurm: Cluster, dataset: Dataset, tmp_path: Path) -> None:
    """Ten minutes, a kill 30 s after each first step: what is left behind adds up, and so do lost
    steps. Goodput against 1 - (C/2 * step + restart) / MTBF, all but C measured."""
    run = SlurmRun(slurm, tmp_path, dataset.storage.url)
    run.submit(slow(run, SOAK_STEP_S), "--max_steps", "100000")
    choose = random.Random(0)
    restarts_s: list[float] = []
    attempt = 0
    run.wait_steps(0, 1)
    began = killed = time.monotonic()
    while time.monotonic() - began < SOAK_S:
        time.sleep(KILL_EVERY_S)
        run.kill(run.rank(choose.randrange(4)))
        killed = time.monotonic()
        attempt += 1
        run.wait_steps(attempt, 1)
        run.assert_gone(attempt - 1)
        restarts_s.append(time.monotonic() - killed)
    took_s = killed + restarts_s[-1] - began
    assert run.leyden("cancel", "run").returncode == 0
    wait_for(lambda: slurm.ended(run.job), 60, "cancelled")
    run.assert_gone(attempt)
    steps = [line["step"] for line in run.lines("consumed.jsonl") if line["attempt"] < attempt]
    # The newest attempt goes on from the last checkpoint: what lies after it was lost.
    useful = run.steps_of(attempt)[0]
    step_s = KILL_EVERY_S * attempt / len(steps)
    restart_s, mtbf_s = sum(restarts_s) / attempt, took_s / attempt
    formula = 1 - (SAVE_EVERY / 2 * step_s + restart_s) / mtbf_s
    goodput = useful * step_s / took_s
    print(
        f"soak: {took_s:.0f} s, {attempt} kills, restart to first new step {restart_s:.1f} s (max "
        f"{max(restarts_s):.1f}), step {step_s:.2f} s, {len(steps) - useful} of {len(steps)} steps "
        f"lost, goodput {goodput:.3f}, formula {formula:.3f}"
    )
    assert abs(goodput - formula) <= 0.1


def test_prep_survives_a_killed_worker(slurm: Cluster, tmp_path: Path) -> None:
    """kill -9 of a worker's JVM while its executor has tasks: the shuffle files of that node are
    lost, and the digest must not show it; then a bad job's own exit code, a cancelled one, and one
    that is told of its time limit."""
    corpus = tmp_path / "corpus"
    write_corpus(corpus, files=12, documents=400)
    (corpus / "cluster.yaml").write_text(CLUSTER_YAML)
    prep = SlurmPrep(slurm, corpus, *prep_words(corpus, tmp_path / "data", "--num_tasks", "60"))
    wait_for(lambda: len(prep.processes("CoarseGrainedExecutorBackend")) == 2, 200, "two executors")
    (victim,) = [
        pid for pid, what in prep.processes("deploy.worker.Worker").items() if ".r2." in what
    ]
    os.kill(victim, signal.SIGKILL)
    assert not slurm.ended(prep.job), "the kill came too late to show anything"
    wait_for(lambda: slurm.ended(prep.job), 400, "the prep job")
    assert slurm.state(prep.job) == "COMPLETED", prep.said()
    wait_for(lambda: not prep.processes(), 15, f"Spark gone: {prep.processes()}")
    done = leyden(corpus, {}, *prep_words(corpus, tmp_path / "local", "--master", "local[2]"))
    assert done.returncode == 0, done.stderr
    digests = {open_dataset(str(tmp_path / name)).data_digest for name in ("data", "local")}
    assert len(digests) == 1

    refused = SlurmPrep(
        slurm, corpus, *prep_words(corpus, tmp_path / "no", "--text_field", "absent")
    )
    wait_for(lambda: slurm.ended(refused.job), 200, "the refused job")
    assert refused.exit_code() == 3, refused.said()
    assert not refused.processes()

    cancelled = SlurmPrep(slurm, corpus, *prep_words(corpus, tmp_path / "cancelled"))
    wait_for(lambda: len(cancelled.processes("deploy.worker.Worker")) == 2, 200, "two workers")
    slurm.command("scancel", cancelled.job)
    wait_for(lambda: not cancelled.processes(), 15, f"Spark gone: {cancelled.processes()}")
    assert not (tmp_path / "cancelled" / "LATEST").exists()

    # As before a time limit: the driver is ended, its own code is the job's, and a rerun does it.
    words = prep_words(corpus, tmp_path / "late", "--num_tasks", "60")
    late = SlurmPrep(slurm, corpus, *words)
    wait_for(lambda: len(late.processes("CoarseGrainedExecutorBackend")) == 2, 200, "executors")
    slurm.command("scancel", "--signal=USR1", "--batch", late.job)
    wait_for(lambda: slurm.ended(late.job), 60, f"ended: {late.said()}")
    assert late.exit_code() == 130 and (late.folder / "ended").read_text() == "130\n", late.said()
    assert not late.processes() and not (tmp_path / "late" / "LATEST").exists()
