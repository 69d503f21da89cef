"""dist/checkpoint_callback.py: a save that fails is a warning, many in a row end the run."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed

from dist.checkpoint import CheckpointSaver
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


def saves_seen(url: str, folder: Path) -> tuple[int, list[tuple[int, int, int]]]:
    """Train with 4 micro-batches a step and a request to stop in the second one of step 5; the
    exit code and, at each save: its step, micro-batches so far, updates so far."""
    from recipes.pretrain import Pretrain

    micro, seen = [0], []
    step_method, start = Pretrain.training_step, CheckpointSaver.start

    def training_step(self: Any, batch: Any, index: int) -> Any:
        micro[0] += 1
        if (batch.step, batch.micro) == (5, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return step_method(self, batch, index)

    def watched(self: Any, place: Any, model: Any, optimizer: Any, *args: Any, **kw: Any) -> None:
        updates = next(iter(optimizer.state.values()))["step"]
        seen.append((int(place.name.split("-")[1]), micro[0], int(updates)))
        start(self, place, model, optimizer, *args, **kw)

    with (
        mock.patch.object(Pretrain, "training_step", training_step),
        mock.patch.object(CheckpointSaver, "start", watched),
    ):
        changes = {"max_steps": 30, "save_every_steps": 2, "val_every_steps": 3, "val_rows": 8}
        return pretrain(url, str(folder), **changes), seen


def test_no_save_between_micro_batches(dataset: Dataset, tmp_path: Path) -> None:
    """A save in the middle of an accumulated step would lose the gradients that wait, or count
    its rows as consumed: by cadence, after a validation, and asked for in mid-accumulation."""
    ((code, seen),) = run_ranks(saves_seen, 1, 240, dataset.storage.url, tmp_path / "run")
    assert code == 75
    # 2 and 4 by cadence, perhaps 6 too (with a validation), then the stop's own.
    assert [step for step, _, _ in seen[:2]] == [2, 4] and 6 <= seen[-1][0] <= 8
    assert seen == [(step, 4 * step, step) for step, _, _ in seen]
    consumed = lines(tmp_path / "run", "consumed.jsonl")
    assert len(consumed) == seen[-1][0]


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
