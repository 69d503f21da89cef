"""dist/checkpoint_callback.py: a save that fails is a warning, many in a row end the run."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed

from dist.checkpoint_files import HashedFiles
from dist.checkpoint_folder import COMMIT, check_files, find_checkpoint, read_record
from dist.dataset import Dataset
from dist.errors import LeydenError
from tests.make_dataset import write_dataset
from tests.run_ranks import run_ranks
from tests.test_dist_lightning_plugins import lines, pretrain


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), with_tokenizer=False)


def warned_on_full_disk(*args: Any) -> tuple[tuple[int, str], str]:
    """train_on_full_disk and what it wrote to stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return train_on_full_disk(*args), said.getvalue()


def train_on_full_disk(
    url: str, folder: Path, full_saves: tuple[int, ...], rank: int, changes: dict[str, Any]
) -> tuple[int, str]:
    """Run the recipe while the n-th saves of one rank find its disk full; exit code, error."""
    original, count = HashedFiles.create_stream, [0]

    def create_stream(self: HashedFiles, path: Any, mode: str) -> Any:
        if Path(path).suffix == ".distcp":
            count[0] += 1
        if count[0] in full_saves and torch.distributed.get_rank() == rank:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(self, path, mode)

    with mock.patch.object(HashedFiles, "create_stream", create_stream):
        try:
            return pretrain(url, str(folder), **changes), ""
        except LeydenError as error:
            return error.exit_code, str(error)


EVERY_STEP = {"save_every_steps": 1, "max_steps": 6, "keep": 9, "max_failed_saves": 2}


def saves(folder: Path) -> list[tuple[str, bool]]:
    events = [line for line in lines(folder, "ledger.jsonl") if line["event"] == "save"]
    return [(line["checkpoint"], line["failure"] == "") for line in events]


def test_failed_saves_in_a_row_end_the_run(dataset: Dataset, tmp_path: Path) -> None:
    """One rank whose disk is full must not hang the others, nor cost an older checkpoint; a run
    that cannot save any more must not go on for days."""
    url, folder = dataset.storage.url, tmp_path / "run"
    outcomes = run_ranks(train_on_full_disk, 2, 240, url, folder, (2, 3, 4, 5, 6), 1, EVERY_STEP)
    for code, text in outcomes:
        assert code == 4
        assert "2 saves in a row failed (max_failed_saves)" in text and "make room" in text
        assert "step-3-a0 could not be saved: rank 1: No space left on device" in text
    outcome = json.loads((folder / "outcome.json").read_bytes())
    assert outcome["status"] == "failed" and "No space left on device" in outcome["error"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-1-a0"]
    # With room again the same command goes on from there, on other ranks.
    assert run_ranks(train_on_full_disk, 1, 240, url, folder, (), 0, EVERY_STEP) == [(0, "")]
    steps = [line["step"] for line in lines(folder, "consumed.jsonl") if line["attempt"] == 1]
    assert steps == [1, 2, 3, 4, 5]


def test_a_failed_save_is_a_warning(dataset: Dataset, tmp_path: Path) -> None:
    """Failures that are not in a row must not add up; the last save is tried again."""
    url, folder = dataset.storage.url, tmp_path / "run"
    # The 6th is of the last step, and so is the 7th.
    done = run_ranks(warned_on_full_disk, 1, 240, url, folder, (2, 4, 6), 0, EVERY_STEP)
    (code, _), said = done[0]
    assert code == 0
    assert saves(folder) == [
        *[("step-1-a0", True), ("step-2-a0", False), ("step-3-a0", True)],
        *[("step-4-a0", False), ("step-5-a0", True), ("step-6-a0", False), ("step-6-a0", True)],
    ]
    found, passed_over = find_checkpoint(folder / "checkpoints")
    assert found is not None and found.name == "step-6-a0" and passed_over == []
    warnings = [line for line in said.splitlines() if "warning:" in line]
    assert len(warnings) == 3 and "(1 of at most 2 in a row)" in warnings[0]


@pytest.mark.parametrize("async_save", [True, False])
def test_resumes_past_what_is_left_and_cleans_it(
    dataset: Dataset, tmp_path: Path, async_save: bool
) -> None:
    """Leftovers of kills would fill the disk; a damaged checkpoint must neither be loaded nor
    push the valid one out, nor be deleted before somebody has seen it."""
    url, folder = dataset.storage.url, tmp_path / "run"
    settings = {**EVERY_STEP, "keep": 3, "async_save": async_save}
    first = {**settings, "max_steps": 4}
    assert run_ranks(train_on_full_disk, 1, 240, url, folder, (), 0, first) == [(0, "")]
    checkpoints = folder / "checkpoints"
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["step-2-a0", "step-3-a0", "step-4-a0"]
    (checkpoints / "step-4-a0" / COMMIT).unlink()
    (checkpoints / "step-3-a0" / ".metadata").write_bytes(b"not a pickle")
    second = {**settings, "keep": 2, "val_every_steps": 2}
    assert run_ranks(train_on_full_disk, 1, 240, url, folder, (), 0, second) == [(0, "")]
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["step-3-a0", "step-5-a1", "step-6-a1"]
    for name, validated in (("step-5-a1", False), ("step-6-a1", True)):
        assert check_files(checkpoints / name) == ""
        commit = json.loads((checkpoints / name / COMMIT).read_bytes())
        assert (commit["validation_loss"] is not None) == validated
    assert read_record(checkpoints / "step-6-a1")["order"]["step"] == 6
