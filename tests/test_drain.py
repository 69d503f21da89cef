"""A request to stop, in every phase of a run: all ranks at the same step, saved, exit 75, no hang.

Fifty trials in all; those marked `slow` are the larger part of the ones at random moments. A hang
is a TimeoutError that names the silent ranks.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dist.checkpoint import find_checkpoint
from dist.dataset import Dataset
from dist.drain import CONTROL_DRAIN, PeerLost, StopFlag, lost_peer, stop_requests
from tests.make_dataset import write_dataset
from tests.rank_processes import World, train

STEPS = 12
SHORT: dict[str, Any] = {"max_steps": STEPS, "save_every_steps": 4, "val_every_steps": 5}
# Phase -> (owner, function of it that runs in that phase, how many calls of it to let pass).
PHASES = {
    "start-up": ("recipes.pretrain", "open_dataset", 0),
    "model": ("recipes.pretrain.Pretrain", "configure_model", 0),
    "first batch": ("recipes.pretrain.Pretrain", "training_step", 0),
    "mid-accumulation": ("recipes.pretrain.Pretrain", "training_step", 6),
    "optimizer": ("recipes.pretrain.Pretrain", "on_before_optimizer_step", 5),
    "validation": ("recipes.pretrain.Pretrain", "validation_step", 0),
    "save": ("dist.checkpoint_callback.Checkpoints", "save", 0),
    "last validation": ("recipes.pretrain.Pretrain", "validation_step", 4),
    "last save": ("dist.checkpoint_callback.Checkpoints", "save", 3),
    "after the last step": ("dist.checkpoint_callback.Checkpoints", "on_train_end", 0),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), with_tokenizer=False)


def outcome(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "outcome.json").read_text()))


def find(owner: str) -> Any:
    """A module, or a class of one, by its dotted name."""
    module, _, name = owner.rpartition(".")
    if name[0].isupper():
        return getattr(importlib.import_module(module), name)
    return importlib.import_module(owner)


def signal_in(
    rank: int, victims: tuple[int, ...], owner: str, name: str, calls: int, signums: tuple[int, ...]
) -> None:
    """On the victims: send itself signals in call number `calls` of a function of the recipe."""
    if rank not in victims:
        return
    place = find(owner)
    original = getattr(place, name)
    seen = [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if seen[0] == calls:
            for signum in signums:
                os.kill(os.getpid(), signum)
        seen[0] += 1
        return original(*args, **kwargs)

    setattr(place, name, wrapped)


def drained(folder: Path, codes: list[int], expected: list[int] | None = None) -> int:
    """Check a drained run; returns the step where it stopped."""
    assert codes == (expected or [75] * len(codes))
    end = outcome(folder)
    assert end["status"] == "stopped" and 0 < end["step"] < STEPS
    found, passed_over = find_checkpoint(folder / "checkpoints")
    assert found is not None and found.name.startswith(f"step-{end['step']}-"), passed_over
    return int(end["step"])


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("phase", list(PHASES))
def test_a_signal_in_each_phase(dataset: Dataset, tmp_path: Path, phase: str, victim: int) -> None:
    """Twenty trials. A handler that saves deadlocks; ranks that stop at steps of their own hang
    in the next collective; a stop that is lost trains on."""
    signum = signal.SIGUSR1 if victim else signal.SIGTERM
    where = PHASES[phase]
    folder = tmp_path / "run"
    codes = train(
        dataset.storage.url, folder, 2, SHORT, signal_in, (victim,), *where, (signum,)
    )  # fmt: skip
    if "last" in phase:
        assert codes == [0, 0] and outcome(folder)["status"] == "completed"
        return
    step = drained(folder, codes)
    # Two micro-batches a step; steps begun before the signal, and at most two more.
    begun = {"first batch": 1, "mid-accumulation": 4, "optimizer": 6, "validation": 5, "save": 4}
    assert step <= begun.get(phase, 0) + 2, f"{step} steps; the signal came in {phase}"


def test_at_most_two_more_steps_begin(dataset: Dataset, tmp_path: Path) -> None:
    """With one micro-batch a step the loader could agree on steps far ahead of the model."""
    folder = tmp_path / "run"
    where = ("recipes.pretrain.Pretrain", "training_step", 2, (signal.SIGTERM,))
    changes = {**SHORT, "micro_batch": 4, "save_every_steps": 0}
    codes = train(dataset.storage.url, folder, 2, changes, signal_in, (1,), *where)
    assert drained(folder, codes) <= 5  # the third step had begun


@pytest.mark.parametrize("victims", [(0, 1), (1,)])
def test_a_second_signal_changes_nothing(
    dataset: Dataset, tmp_path: Path, victims: tuple[int, ...]
) -> None:
    """Impatient senders repeat themselves; during the drain's save this must not end it."""
    folder = tmp_path / "run"

    where = ("recipes.pretrain.Pretrain", "training_step", 2, (signal.SIGTERM,))
    codes = train(
        dataset.storage.url, folder, 2, {**SHORT, "save_every_steps": 0}, signal_twice, victims,
        where,
    )  # fmt: skip
    drained(folder, codes)
    assert train(dataset.storage.url, folder, 2, {**SHORT, "save_every_steps": 0}) == [0, 0]


def signal_twice(rank: int, victims: tuple[int, ...], where: tuple[Any, ...]) -> None:
    signal_in(rank, victims, *where)
    # The only save before the end is the drain's.
    both = (signal.SIGUSR1, signal.SIGTERM)
    signal_in(rank, victims, "dist.checkpoint_callback.Checkpoints", "save", 0, both)


def test_ctrl_c_drains_too_and_keeps_its_code(dataset: Dataset, tmp_path: Path) -> None:
    """A shell must see an interrupted command as one (130)."""
    where = ("recipes.pretrain.Pretrain", "training_step", 3, (signal.SIGINT, signal.SIGINT))
    codes = train_allowing(dataset, tmp_path / "run", (0,), where)
    drained(tmp_path / "run", codes, [130, 75])


def train_allowing(
    dataset: Dataset, folder: Path, victims: tuple[int, ...], where: tuple[Any, ...]
) -> list[int]:
    with World(dataset.storage.url, folder, 2, SHORT, signal_in, victims, *where) as world:
        return world.wait()


def test_a_signal_before_the_handlers_ends_the_ranks(dataset: Dataset, tmp_path: Path) -> None:
    """In import nothing is taken or written. The other rank must not wait for the dead one, and
    the same command must work afterwards."""
    where = ("recipes.pretrain", "choose_device", 0, (signal.SIGTERM,))
    folder = tmp_path / "run"
    with World(dataset.storage.url, folder, 2, SHORT, signal_in, (1,), *where) as world:
        assert world.wait() == [1, -signal.SIGTERM]
        assert "another rank ended" in world.said(0) and "Traceback" not in world.said(0)
    assert not (folder / "outcome.json").exists()
    assert train(dataset.storage.url, folder, 2, SHORT) == [0, 0]


def test_a_rank_that_crashes_in_c_says_where(dataset: Dataset, tmp_path: Path) -> None:
    """A library that segfaults: exit code 139, empty logs, and nobody knows in which call."""
    where = ("recipes.pretrain.Pretrain", "training_step", 3, (signal.SIGSEGV,))
    with World(dataset.storage.url, tmp_path / "run", 2, SHORT, signal_in, (1,), *where) as world:
        assert world.wait() == [1, -signal.SIGSEGV]
        assert "Fatal Python error: Segmentation fault" in world.said(1)
        assert "in optimizer_step" in world.said(1) and "another rank ended" in world.said(0)


def write_control(rank: int, folder: Path) -> None:
    """Rank 1 plays the person: writes control/drain while step 3 is computed."""
    from recipes import pretrain

    original = pretrain.Pretrain.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if rank == 1 and (batch.step, batch.micro) == (3, 0):
            (folder / CONTROL_DRAIN).parent.mkdir(exist_ok=True)
            (folder / CONTROL_DRAIN).touch()
        return original(self, batch, batch_idx)

    pretrain.Pretrain.training_step = training_step  # type: ignore[method-assign]


def test_the_control_file_drains_once(dataset: Dataset, tmp_path: Path) -> None:
    """A scheduler that cannot reach the ranks writes a file; left there, it would stop every
    later attempt after its first step."""
    folder = tmp_path / "run"
    codes = train(dataset.storage.url, folder, 2, SHORT, write_control, folder)
    assert 4 <= drained(folder, codes) <= 6
    assert (folder / CONTROL_DRAIN).exists()
    assert train(dataset.storage.url, folder, 2, SHORT) == [0, 0]
    assert not (folder / CONTROL_DRAIN).exists()
    assert outcome(folder)["status"] == "completed"


def random_trials() -> list[Any]:
    return [
        pytest.param(seed, marks=[pytest.mark.all_cells] if seed >= 5 else []) for seed in range(25)
    ]


@pytest.fixture(scope="module")
def usual_s(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds of a run that nobody stops."""
    with World(dataset.storage.url, tmp_path_factory.mktemp("usual") / "run", 2, SHORT) as world:
        world.wait_joined()
        start = time.monotonic()
        assert world.wait() == [0, 0]
        return time.monotonic() - start


@pytest.mark.parametrize("seed", random_trials())
def test_a_signal_at_any_moment(
    dataset: Dataset, tmp_path: Path, usual_s: float, seed: int
) -> None:
    """Twenty-five trials, one or two signals: whatever the phases above leave out."""
    choose = random.Random(seed)
    folder = tmp_path / "run"
    with World(dataset.storage.url, folder, 2, SHORT) as world:
        world.wait_joined()
        for _ in range(choose.randint(1, 2)):
            world.processes[0].join(choose.uniform(0.0, usual_s))
            world.signal(choose.randrange(2), choose.choice([signal.SIGTERM, signal.SIGUSR1]))
        codes = world.wait()
        said = [world.said(rank) for rank in range(2)]
    if codes == [0, 0]:
        assert outcome(folder)["status"] == "completed"
    elif codes == [75, 75]:
        drained(folder, codes)
    else:
        # Before the handlers of one rank: it is gone, and the other says so.
        assert min(codes) in (-signal.SIGTERM, -signal.SIGUSR1), (codes, said)
        assert not (folder / "consumed.jsonl").exists(), (codes, said)
    assert "Traceback" not in said[0] + said[1]


def test_requests_and_lost_peers_are_told_apart(tmp_path: Path) -> None:
    """A bug of ours taken for a lost peer would hide its traceback; the reverse buries the run's
    last words under pages of gloo."""
    gloo = "[../pair.cc:547] Connection closed by peer [127.0.0.1]:4242"
    assert isinstance(lost_peer(RuntimeError(gloo)), PeerLost)
    assert lost_peer(RuntimeError("shape mismatch")) is None
    assert lost_peer(ValueError(gloo)) is None
    flag = StopFlag()
    first = stop_requests(flag, tmp_path, is_first=True)
    other = stop_requests(flag, tmp_path, is_first=False)
    assert not first() and not other()
    (tmp_path / "control").mkdir()
    (tmp_path / CONTROL_DRAIN).touch()
    assert first() and not other()
    flag._handle(signal.SIGUSR1, None)
    assert other()
