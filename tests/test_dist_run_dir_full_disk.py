"""A run whose own disk is full or read-only: a real small file system, filled under the run."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dist.checkpoint import find_checkpoint
from dist.dataset import Dataset
from dist.errors import LeydenError
from dist.local_files import append_line
from dist.run_dir import RunDir
from tests.make_dataset import write_dataset
from tests.run_ranks import run_ranks
from tests.test_dist_lightning_plugins import lines, pretrain

STEPS, EVERY = 16, 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), with_tokenizer=False)


@pytest.fixture
def disk(small_disk: Callable[[str], Path]) -> Path:
    return small_disk("6m")


def fill(disk: Path) -> None:
    with open(disk / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC


def empty(disk: Path) -> None:
    (disk / "ballast").unlink()


def read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def writable(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


FAULTS = {"full": (fill, empty), "read-only": (read_only, writable)}


def train(
    url: str, disk: Path, fault: str, begins: int, ends: int, limit: int
) -> tuple[int, str]:  # fmt: skip
    """Train on `disk`, where the fault lasts from step `begins` to step `ends`."""
    from dist.watchdog import WatchdogConfig
    from recipes.pretrain import Pretrain

    original, calls = Pretrain.training_step, [0]

    def training_step(self: Any, batch: Any, index: int) -> Any:
        calls[0] += 1
        if calls[0] == begins:
            FAULTS[fault][0](disk)
        if calls[0] == ends:
            FAULTS[fault][1](disk)
        return original(self, batch, index)

    settings = {
        "micro_batch": 8, "max_steps": STEPS, "save_every_steps": EVERY, "async_save": False,
        "max_failed_saves": limit, "activation_checkpointing": "none",
        "val_rows": 8, "strategy": "ddp",
        # Its file of stacks is open for writing, which a remount as read-only refuses.
        "watchdog": WatchdogConfig(timeout_s=0),
    }  # fmt: skip
    # Files grow by pages: a log that has room in its last one would never be refused.
    log = disk / "run" / "consumed.jsonl"
    if not log.exists():
        log.parent.mkdir()
        log.write_text(json.dumps({"step": -1, "attempt": -1, "pad": "x" * 3760}) + "\n")
    with (
        mock.patch.object(Pretrain, "training_step", training_step),
        redirect_stderr(io.StringIO()) as said,
    ):
        try:
            code = pretrain(url, str(disk / "run"), **settings)
        except LeydenError as error:
            code = error.exit_code
            print(f"error: {error}", file=said)
    return code, said.getvalue()


@pytest.mark.parametrize("fault", list(FAULTS))
def test_training_goes_on_and_every_step_is_recorded(
    dataset: Dataset, disk: Path, fault: str
) -> None:
    """A log line that the disk refuses must not end the run, nor be missing once there is room."""
    arguments = (dataset.storage.url, disk, fault, 4, 14, 9)
    ((code, said),) = run_ranks(train, 1, 240, *arguments)
    assert code == 0, said
    consumed = [line["step"] for line in lines(disk / "run", "consumed.jsonl")]
    assert consumed == list(range(-1, STEPS))
    logged = [line["step"] for line in lines(disk / "run", "metrics.jsonl") if "loss" in line]
    assert logged == list(range(1, STEPS + 1))
    ledger = lines(disk / "run", "ledger.jsonl")
    failed = [line["failure"] for line in ledger if line["event"] == "save"]
    assert [bool(failure) for failure in failed] == [False] + [True] * 5 + [False] * 2
    word = os.strerror(errno.ENOSPC if fault == "full" else errno.EROFS)
    assert all(word in failure for failure in failed[1:6])
    assert said.count("its lines wait in memory") == 1
    assert said.count("could not be saved") == 5
    found, passed_over = find_checkpoint(disk / "run" / "checkpoints")
    assert found is not None and found.name == f"step-{STEPS}-a0" and passed_over == []


@pytest.mark.parametrize("fault", list(FAULTS))
def test_it_stops_cleanly_at_the_limit(dataset: Dataset, disk: Path, fault: str) -> None:
    """A run that cannot save for ever; a traceback from its own outcome; a spoilt checkpoint."""
    arguments = (dataset.storage.url, disk, fault, 4, STEPS + 1, 2)
    ((code, said),) = run_ranks(train, 1, 240, *arguments)
    assert code == 4
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: 2 saves in a row failed (max_failed_saves); the last: step-6-")
    assert "warning: cannot write" in said and "outcome.json" in said
    found, passed_over = find_checkpoint(disk / "run" / "checkpoints")
    assert found is not None and found.name == "step-2-a0" and passed_over == []
    FAULTS[fault][1](disk)
    arguments = (dataset.storage.url, disk, fault, STEPS + 1, STEPS + 1, 2)
    ((code, said),) = run_ranks(train, 1, 240, *arguments)
    assert code == 0, said
    # By the rule that the last attempt of a step counts, every step is there.
    consumed = {line["step"] for line in lines(disk / "run", "consumed.jsonl")}
    assert consumed == set(range(-1, STEPS))


def test_a_refused_line_leaves_no_part(disk: Path) -> None:
    """Half a line before the retried whole one is a torn record in the middle of a log."""
    path = disk / "log"
    append_line(path, "first")
    fill(disk)
    long = "y" * 9000
    with pytest.raises(OSError, match="No space left"):
        append_line(path, long)
    assert path.read_text() == "first\n"
    run = RunDir(disk)
    run.append("log", {"n": long})
    run.append("log", {"n": 2})
    with pytest.raises(OSError, match="No space left"):
        run.flush()
    empty(disk)
    run.append("log", {"n": 3})
    run.flush()
    assert [record["n"] for record in run.read_lines("log")] == [long, 2, 3]
