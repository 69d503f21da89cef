"""Fine-tuning stopped in the middle: all ranks at one step, and gone on with to the last bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dist.checkpoint import find_checkpoint
from dist.drain import CONTROL_DRAIN
from tests.finetune_runs import write_base
from tests.make_examples import write_examples
from tests.rank_processes import train
from tests.strategy_runs import at_step, losses, tensors
from tests.test_drain import signal_in

STEPS = 8
CHANGES: dict[str, Any] = {
    "lora": {"method": "lora", "dropout": 0.1}, "parallel": {"strategy": "fsdp"},
    "activation_checkpointing": "full", "max_steps": STEPS, "save_every_steps": 0,
    "async_save": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples with masks, a base, and a run that nobody stopped."""
    root = tmp_path_factory.mktemp("drain")
    write_examples(root / "data")
    write_base(root / "base")
    assert run(root, root / "whole") == [0, 0]
    return root


def run(place: Path, folder: Path, *prepare: Any, **more: Any) -> list[int]:
    changes = {**CHANGES, "base": str(place / "base"), **more}
    return train(str(place / "data"), folder, 2, changes, *prepare)


def control(rank: int, folder: Path) -> None:
    """Rank 1 plays the person: writes control/drain while step 2 is computed."""
    from recipes.finetune import Finetune

    original = Finetune.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if rank == 1 and (batch.step, batch.micro) == (2, 0):
            (folder / CONTROL_DRAIN).parent.mkdir(exist_ok=True)
            (folder / CONTROL_DRAIN).touch()
        return original(self, batch, batch_idx)

    Finetune.training_step = training_step  # type: ignore[method-assign]


STEP = "recipes.finetune.Finetune"
# Two micro-batches a step: call 4 of training_step is the first of step 2, call 5 its second.
STOPS: dict[str, tuple[Any, ...]] = {
    "SIGUSR1 in a step": (signal_in, (1,), STEP, "training_step", 4, (signal.SIGUSR1,)),
    "SIGTERM in an accumulation": (signal_in, (0,), STEP, "training_step", 5, (signal.SIGTERM,)),
    "SIGUSR1 at the model": (signal_in, (1,), STEP, "configure_model", 0, (signal.SIGUSR1,)),
    "control file": (control,),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", list(STOPS))
def test_a_stopped_run_goes_on_to_the_same_bits(place: Path, tmp_path: Path, how: str) -> None:
    """Ranks that stop at steps of their own, adapters or moments that come back otherwise, other
    dropout or other examples after the resume: not the model that an undisturbed run gives."""
    folder = tmp_path / "run"
    prepare, *args = STOPS[how]
    args = [folder] if prepare is control else args
    assert run(place, folder, prepare, *args) == [75, 75]
    end = json.loads((folder / "outcome.json").read_text())
    assert end["status"] == "stopped" and 0 < end["step"] <= 5
    found, passed_over = find_checkpoint(folder / "checkpoints")
    assert found is not None and found.name.startswith(f"step-{end['step']}-"), passed_over
    assert run(place, folder) == [0, 0]
    assert losses(folder) == losses(place / "whole")
    one, other = tensors(at_step(folder, STEPS)), tensors(at_step(place / "whole", STEPS))
    assert one.keys() == other.keys() and all("lora_" in name for name in one)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
