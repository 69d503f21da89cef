"""Checkpoints under every strategy: resumed runs equal uninterrupted ones bit for bit, and every
strategy loads what every other has saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist.dataset import Dataset
from tests.make_dataset import write_dataset
from tests.run_ranks import run_ranks
from tests.strategy_runs import Job, at_step, losses, play, tensors

ZERO = {f"zero{n}": (2, {"strategy": "deepspeed", "zero_stage": n}) for n in (1, 2, 3)}
# Name -> (ranks, config).
STRATEGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {"strategy": "ddp"}),
    "fsdp": (2, {"strategy": "fsdp"}),
    "hsdp": (4, {"strategy": "hsdp"}),
    "tp": (2, {"strategy": "tp"}),
    "fsdp_tp": (4, {"strategy": "fsdp", "tp": 2}),
    **ZERO,
    "offload": (2, {**ZERO["zero2"][1], "offload_optimizer": True}),
}
CROSSINGS = (
    ("ddp", "tp"), ("fsdp", "zero3"), ("zero2", "fsdp_tp"), ("tp", "hsdp"), ("hsdp", "zero1"),
    ("fsdp_tp", "zero2"), ("zero3", "ddp"), ("zero1", "fsdp"), ("offload", "tp"),
    ("fsdp_tp", "offload"),
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(
        tmp_path_factory.mktemp("data"), documents=40, num_train_shards=2, with_tokenizer=False
    )


@pytest.fixture(scope="module")
def runs(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of each strategy without a break, their last three again, and the crossings."""
    root = tmp_path_factory.mktemp("runs")
    first: dict[int, list[Job]] = {2: [], 4: []}
    second: dict[int, list[Job]] = {2: [], 4: []}
    for name, (ranks, parallel) in STRATEGIES.items():
        # A dropout that draws other numbers after a resume would show.
        changes = {
            "parallel": parallel, "max_steps": 6, "save_every_steps": 3, "micro_batch": 2,
            "model": {"residual_dropout": 0.1},
        }  # fmt: skip
        first[ranks].append(("train", str(root / name), "", changes))
        first[ranks].append(("resume", str(root / f"{name}-cut"), str(root / name), changes))
        for source, target in CROSSINGS:
            if target == name:
                folder = str(root / f"{source}-to-{target}")
                second[ranks].append(("reload", folder, str(root / source), changes))
    for worlds in (first, second):
        for ranks, jobs in worlds.items():
            done = [75 if kind == "reload" else 0 for kind, *_ in jobs]
            assert run_ranks(play, ranks, 280, dataset.storage.url, jobs) == [done] * ranks
    return root


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", STRATEGIES)
def test_interrupted_is_uninterrupted(runs: Path, name: str) -> None:
    """A moment or a step lost on the way through a checkpoint, or weights that the engine's
    copies of them do not follow."""
    whole, cut = runs / name, runs / f"{name}-cut"
    assert losses(cut) == losses(whole) and len(losses(whole)) == 6
    one, other = tensors(at_step(cut, 6)), tensors(at_step(whole, 6))
    assert one.keys() == other.keys() and len(one) > 20
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different, different[:5]
    # It did resume.
    assert (cut / "attempts" / "1").is_dir()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("source", "target"), CROSSINGS)
def test_checkpoints_cross(runs: Path, source: str, target: str) -> None:
    """A part read into another's place, a moment left at zero, a lost count of steps."""
    saved = tensors(at_step(runs / source, 3))
    loaded = tensors(runs / f"{source}-to-{target}" / "again" / "step-3-a9")
    assert saved.keys() == loaded.keys()
    different = [key for key in saved if not torch.equal(saved[key], loaded[key])]
    assert not different, different[:5]
    assert {float(v) for k, v in saved.items() if k.endswith(".step")} == {3.0}
