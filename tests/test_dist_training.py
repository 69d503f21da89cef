"""dist/training.py: what every recipe does around its Trainer."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from tests.make_dataset import write_dataset
from tests.rank_processes import config
from tests.run_ranks import run_ranks


def counts_while_training(url: str, folder: Path) -> tuple[list[int], int]:
    """(objects left out of garbage collections in each step, and after the run)."""
    from contextlib import ExitStack

    from dist.ranks import Ranks
    from dist.run_recorder import RunRecorder
    from recipes import pretrain

    seen: list[int] = []
    ends = RunRecorder.on_train_batch_end

    def counted(self: Any, *args: Any) -> None:
        seen.append(gc.get_freeze_count())
        ends(self, *args)

    RunRecorder.on_train_batch_end = counted  # type: ignore[method-assign]
    with ExitStack() as stack:
        made = config(url, folder, max_steps=2, strategy="ddp", save_every_steps=0)
        assert pretrain.run(made, Ranks.from_environment(), stack) == 0
    return seen, gc.get_freeze_count()


def test_collections_do_not_look_through_the_imports(tmp_path: Path) -> None:
    """A full collection in the middle of a step: a quarter of a second in which all other ranks
    wait. And a process that trains twice must be able to free its first model."""
    dataset = write_dataset(tmp_path / "data", documents=60, with_tokenizer=False)
    arguments = (dataset.storage.url, tmp_path / "run")
    ((seen, after),) = run_ranks(counts_while_training, 1, 240, *arguments)
    assert len(seen) == 8 and min(seen) > 100_000
    assert after == 0
