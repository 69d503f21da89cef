"""A prep job on two nodes of a real Slurm: the data of one machine, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist.dataset import open_dataset
from tests.slurm_cluster import Cluster, wait_for
from tests.slurm_preps import CLUSTER_YAML, SlurmPrep, leyden, prep_words, write_corpus
from tests.slurm_runs import SlurmRun

# Spark's start and its tasks take 20 s on two quiet cores, and minutes while others compute.
pytestmark = [pytest.mark.slurm, pytest.mark.spark, pytest.mark.timeout(900)]
ENDS_WITHIN_S = 400.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    (folder / "cluster.yaml").write_text(CLUSTER_YAML)
    return folder


def local_digest(corpus: Path, output: Path) -> str:
    done = leyden(corpus, {}, *prep_words(corpus, output, "--master", "local[2]"))
    assert done.returncode == 0, done.stderr
    return open_dataset(str(output)).data_digest


def test_two_nodes_give_the_data_of_one(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Executors of another node that see other inputs, lack our code or publish to their own
    disk; daemons that outlive the job; an exit code of srun's or the trap's making; a training
    that starts before the commit, or on something else."""
    prep = SlurmPrep(slurm, corpus, *prep_words(corpus, tmp_path / "data"))
    run = SlurmRun(slurm, corpus, "")
    (corpus / "cluster.yaml").write_text(CLUSTER_YAML)
    words = ("--max_steps", "2", "--nodes", "1", "--nproc", "1", "--parallel.strategy", "ddp")
    run.submit("pretrain", "--after-prep", prep.job, *words)
    assert slurm.state(run.job) == "PENDING" and slurm.job(run.job)["Reason"] == "Dependency"
    wait_for(lambda: slurm.ended(prep.job), ENDS_WITHIN_S, "the prep job")
    assert slurm.state(prep.job) == "COMPLETED", prep.said()
    wait_for(lambda: not prep.processes(), 15, f"Spark gone: {prep.processes()}")
    assert not list(Path("/tmp").glob(f"leyden-spark-{prep.job}.*")), "scratch"
    assert not (prep.folder / "conf").exists(), "the secret stays behind"
    logs = {path.name for path in (prep.folder / "logs").iterdir()}
    assert {"master-r1.log", "worker-r1.log", "worker-r2.log"} <= logs or len(logs) >= 3, logs
    assert (prep.folder / "ended").read_text() == "0\n"
    assert open_dataset(str(tmp_path / "data")).data_digest == local_digest(
        corpus, tmp_path / "local"
    )
    run.wait_ended("COMPLETED", 200)
    reference = f"{tmp_path / 'data'}@{open_dataset(str(tmp_path / 'data')).data_digest}"
    assert run.read("run.json")["data"] == reference
    assert run.read("prep.json")["data"] == reference


def test_check_on_two_nodes(slurm: Cluster, tmp_path: Path) -> None:
    """Ranks of two nodes that do not find each other, are not those of the cluster file, or whose
    verdict is lost on the way back."""
    (tmp_path / "cluster.yaml").write_text("nodes: 2\ncpus_per_task: 1\n")
    done = leyden(
        tmp_path, slurm.env, "check", "--cluster", "cluster.yaml", "--nproc", "1",
        "--disk-mib", "1", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout)
    assert len(record["nodes"]) == 2 and set(record["nodes"]) <= {"r1", "r2", "r3", "r4"}
    verdicts = {row["check"]: row["verdict"] for row in record["rows"]}
    assert verdicts["all-reduce"] == verdicts["run_root shared"] == verdicts["clocks"] == "ok"
    assert len(record["pairs"]) == 1 and record["exclude"] == []
    assert not (tmp_path / "cluster.exclude").exists()
