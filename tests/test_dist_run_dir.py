"""The run directory, ranks and local files: one identity, whatever happens to the process."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from dist.errors import ConfigError, SetupError
from dist.local_files import append_line, create_exclusive, write_atomic
from dist.ranks import Ranks
from dist.run_dir import RunDir


def test_attempts_are_numbered_once_under_contention(tmp_path: Path) -> None:
    """Two attempts with one number would overwrite each other's checkpoints and logs."""
    run, numbers = RunDir.open(tmp_path / "run"), []
    threads = [
        threading.Thread(target=lambda: numbers.append(run.new_attempt())) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(16))
    assert (run.attempt_dir(3) / "env.json").exists()


def test_identity_and_outcome_are_read_back(tmp_path: Path) -> None:
    """A run whose id or dataset is lost on a restart becomes another run in every tracker."""
    run = RunDir.open(tmp_path / "run")
    assert run.read_run() is None and run.read_outcome() is None
    run.write_run({"recipe": "pretrain", "data_digest": "d"}, "max_steps: 3\n")
    identity = RunDir.open(tmp_path / "run").read_run()
    assert identity is not None and identity["run_id"].startswith("run-")
    assert identity["data_digest"] == "d" and (run.path / "config.yaml").read_text()
    run.write_outcome(run.new_attempt(), "stopped", step=7)
    run.write_outcome(run.new_attempt(), "completed", step=9)
    outcome = run.read_outcome()
    assert outcome is not None and (outcome["status"], outcome["attempt"]) == ("completed", 1)
    assert json.loads((run.attempt_dir(0) / "outcome.json").read_text())["step"] == 7
    with pytest.raises(ValueError, match="fine"):
        run.write_outcome(0, "fine")


def test_secrets_stay_out_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole environment written into a shared folder publishes every token in it."""
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    run = RunDir.open(tmp_path / "run")
    run.new_attempt()
    text = (run.attempt_dir(0) / "env.json").read_text()
    assert "secret" not in text and '"SLURM_JOB_ID": "17"' in text


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    """After a kill in a write, the next record must not be glued to the torn one."""
    run = RunDir.open(tmp_path / "run")
    run.append("consumed.jsonl", {"step": 1})
    with open(run.path / "consumed.jsonl", "ab") as file:
        file.write(b'{"step": 2, "t0": ')
    run.append("consumed.jsonl", {"step": 3})
    assert run.read_lines("consumed.jsonl") == [{"step": 1}, {"step": 3}]
    assert run.read_lines("absent.jsonl") == []


def test_a_second_writer_is_refused_but_a_restart_of_the_job_is_not(tmp_path: Path) -> None:
    """Two jobs in one run directory interleave their writes; a requeued job must not wait."""
    run = RunDir.open(tmp_path / "run")
    with run.lease(0, job_id="17"):
        with pytest.raises(SetupError, match="is in use by process"):
            run.lease(1, job_id="18").__enter__()
        with run.lease(1, job_id="17") as taken:
            taken.check()
    assert not (run.path / "lease.json").exists()


def test_a_file_where_the_run_should_be_is_said(tmp_path: Path) -> None:
    """mkdir's own message names neither the run nor the reason."""
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunDir.open(tmp_path / "run")


def test_a_failed_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in the middle of a write must not cost the old outcome."""
    write_atomic(tmp_path / "x", b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SetupError, match="No space left"):
        RunDir(tmp_path).write("x", b"new")
    monkeypatch.undo()
    assert (tmp_path / "x").read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


def test_exclusive_create_has_one_winner(tmp_path: Path) -> None:
    """A lease that two hold."""
    wins: list[int] = []

    def attempt(number: int) -> None:
        if create_exclusive(tmp_path / "lease", str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=attempt, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1 and (tmp_path / "lease").read_text() == str(wins[0])


def test_append_starts_a_file(tmp_path: Path) -> None:
    """Looking for the last byte of an empty file must not fail."""
    append_line(tmp_path / "log", "a")
    append_line(tmp_path / "log", "b")
    assert (tmp_path / "log").read_text() == "a\nb\n"


TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_ranks_come_from_the_launcher() -> None:
    """SLURM's variables inside torchrun's ranks would make every rank of a node rank 0."""
    by_torchrun = Ranks(rank=5, world_size=8, local_rank=1, local_world_size=4, node_rank=1)
    assert Ranks.from_environment(TORCHRUN) == by_torchrun
    assert Ranks.from_environment({**SRUN, **TORCHRUN}) == by_torchrun
    assert Ranks.from_environment(SRUN) == Ranks(
        rank=5, world_size=7, local_rank=1, local_world_size=3, node_rank=1
    )
    assert Ranks.from_environment({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}) == Ranks()
    assert Ranks.from_environment({}) == Ranks()


def test_nonsense_ranks_are_refused() -> None:
    """A rank outside its world would wait for ever in the first collective."""
    with pytest.raises(SetupError, match="rank 8 does not exist in a world of 8"):
        Ranks.from_environment({**TORCHRUN, "RANK": "8"})
    with pytest.raises(SetupError, match="not a number"):
        Ranks.from_environment({**TORCHRUN, "WORLD_SIZE": ""})
