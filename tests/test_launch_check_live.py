"""`leyden check` as it is typed: words, srun's options, what is planned, what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import check_live, cli
from launch.check_live import find_target, read_words, srun_argv
from launch.cluster_config import Cluster, load_cluster

Say = pytest.CaptureFixture[str]
CLUSTER = Cluster(
    nodes=2, gpus_per_node=4, cpus_per_task=3, partition="gpu", exclude=("n9",),
    setup=('export A="a b"',), sbatch=("--qos=high",), run_root="/shared/runs",
)  # fmt: skip


def test_words() -> None:
    """A recipe taken for a run, an option of ours that reaches the recipe, a number of none."""
    asked = read_words(["pretrain", "--config", "1b", "--cluster=c.yaml", "--nproc", "auto"])
    assert (asked.recipe, asked.cluster, asked.nproc) == ("pretrain", "c.yaml", 0)
    assert asked.passed == ["--config", "1b"]
    assert read_words(["first", "--json"]).run == Path("first")
    assert read_words(["--config", "1b", "--data.url", "d"]).recipe == "pretrain"
    assert read_words(["--data.url", "d", "--nodes", "2"]).recipe == ""
    for words in (["--nodes", "x"], ["--disk-mib", "0"], ["--nproc"]):
        assert cli.main(["check", *words]) == 2


def test_targets(tmp_path: Path) -> None:
    """The check of a run that looks at another dataset than the run trains on."""
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    digests = {"data_digest": "d" * 64, "tokenizer_digest": None}
    identity = {"recipe": "pretrain", "data": "/data@abcdef", **digests}
    (run / "run.json").write_text(json.dumps(identity))
    found = find_target(read_words(["first"]), Cluster(), tmp_path)
    assert found.data == "/data@abcdef" and found.exclude == run / "control" / "exclude"
    assert found.expected == {"data_digest": "d" * 64, "tokenizer_digest": ""}
    assert found.plan_words == ("pretrain", "--config", str(run / "config.yaml"))
    words = read_words(["pretrain", "--config", "1b", "--cluster", "a/c.yaml"])
    found = find_target(words, CLUSTER, tmp_path)
    assert found.run_root == "/shared/runs" and found.exclude == Path("a/c.exclude")
    assert found.plan_words == (), "nothing says how large vocabulary and rows are"
    assert cli.main(["check", str(tmp_path / "none")]) == 2


def test_srun_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs' worth of tasks, a job inside a job, values that a shell reads twice."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    argv = srun_argv(CLUSTER, 2, 4, ["--plan", '{"a": "$(x)"}'])
    head, script = argv[: argv.index("bash")], argv[argv.index("-c") + 1]
    wanted = {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--gpus-per-node=4",
              "--cpus-per-task=3", "--partition=gpu", "--exclude=n9", "--kill-on-bad-exit=1",
              "--wait=60", "--qos=high"}  # fmt: skip
    assert wanted <= set(head) and "--overlap" not in head
    assert 'export A="a b"' in script and argv[-2:] == ["--plan", '{"a": "$(x)"}']
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    head = srun_argv(CLUSTER, 2, 4, [])
    assert "--overlap" in head and "--qos=high" not in head


def test_nodes_at_fault_are_left_out_of_the_next_submit(tmp_path: Path, capsys: Say) -> None:
    """A bad node that was found, and given the next job."""
    file = tmp_path / "cluster.yaml"
    file.write_text("nodes: 2\nexclude: [n1]\n")
    check_live._leave_out(tmp_path / "cluster.exclude", ["n1", "n2"])
    check_live._leave_out(tmp_path / "cluster.exclude", ["n2", "n3"])
    assert (tmp_path / "cluster.exclude").read_text() == "n1\nn2\nn3\n"
    assert load_cluster(file).exclude == ("n1", "n2", "n3")
    check_live._leave_out(tmp_path / "new" / "exclude", [])
    assert not (tmp_path / "new").exists()


def test_here_on_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The whole path on this machine; the exit code; a dataset that is not there, said as a row."""
    monkeypatch.chdir(tmp_path)
    words = ["check", "--nproc", "2", "--disk-mib", "1"]
    assert cli.main([*words, "--dry-run"]) == 0
    assert "-m launch.agent" in capfd.readouterr().out and not Path("runs").exists()
    code = cli.main([*words, "--data.url", "absent"])
    said = capfd.readouterr()
    assert code == 1, said
    lines = said.out.splitlines()
    assert lines[0] == "1 nodes, 2 ranks" and any(x.startswith("ok    all-reduce") for x in lines)
    assert any(x.startswith("fail  dataset") for x in lines) and "no dataset at" in said.out
    assert "Traceback" not in said.err, said.err


def test_a_plan_that_is_refused_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config error that only the job's log shows, a day later."""
    found: dict[str, Any] = check_live.plan_record(("pretrain", "--confgi", "x"), 1, "cpu")
    assert set(found) == {"error"} and "confgi" in found["error"]
