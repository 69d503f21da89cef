"""Lightning's own options keep exact resume: compared with a plain run, uninterrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist.dataset import Dataset
from dist.drain import EXIT_STOPPED
from tests.make_dataset import flip_byte, write_dataset
from tests.rank_processes import World, train
from tests.same_run import assert_same_run, last_attempts, lines

STEPS = 12
# 4 micro-batches a step on one rank, 2 on two.
BASE: dict[str, Any] = {"strategy": "ddp", "max_steps": STEPS, "save_every_steps": 4, "keep": 9}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(
        tmp_path_factory.mktemp("data"), documents=40, num_train_shards=2, with_tokenizer=False
    )


@pytest.fixture(scope="module")
def whole(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain recipe on one rank, uninterrupted, with its row log."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert go(dataset, folder) == [0]
    return folder


def with_options(
    rank: int, folder: Path, options: dict[str, Any], fit: dict[str, Any],
    event: tuple[str, int, int] | None, plain_start: bool,
) -> None:  # fmt: skip
    """Give Lightning's Trainer, or its fit, more options than the recipe does; log the rows and
    the passes; in the micro-batch of `event` (what, step, micro) stop or kill the last rank.

    plain_start: forget the checkpoint that the recipe itself would go on from.
    """
    from pytorch_lightning import Callback

    from recipes import pretrain

    log = open(folder.parent / f"{folder.name}-rows-{rank}", "a", buffering=1)  # noqa: SIM115

    class Passes(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            log.write(json.dumps({"epoch": trainer.current_epoch, "at": trainer.global_step}))
            log.write("\n")

    original_trainer, step = pretrain.Trainer, pretrain.Pretrain.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        record = {"step": batch.step, "micro": batch.micro, "rows": batch.rows.tolist()}
        log.write(json.dumps(record) + "\n")
        last = rank == self.trainer.world_size - 1
        if event is not None and last and (batch.step, batch.micro) == event[1:]:
            number = signal.SIGKILL if event[0] == "kill" else signal.SIGTERM
            os.kill(os.getpid(), number)
        return step(self, batch, batch_idx)

    def trainer(**given: Any) -> Any:
        made = original_trainer(
            **{**given, **options, "callbacks": [*given["callbacks"], Passes()]}
        )
        inner = made.fit
        made.fit = lambda *args, **kwargs: inner(*args, **{**kwargs, **fit})
        return made

    pretrain.Pretrain.training_step = training_step  # type: ignore[method-assign]
    pretrain.Trainer = trainer  # type: ignore[assignment]
    if plain_start:
        original_start = pretrain.start_run
        pretrain.start_run = lambda *args, **kwargs: replace(  # type: ignore[assignment]
            original_start(*args, **kwargs), checkpoint=None, record=None
        )


def go(
    dataset: Dataset, folder: Path, options: dict[str, Any] | None = None, *,
    fit: dict[str, Any] | None = None, event: tuple[str, int, int] | None = None,
    world_size: int = 1, plain_start: bool = False, **changes: Any,
) -> list[int]:  # fmt: skip
    """Exit codes of the recipe under the given Trainer options."""
    folder.parent.mkdir(exist_ok=True)
    arguments = (with_options, folder, options or {}, fit or {}, event, plain_start)
    return train(dataset.storage.url, folder, world_size, {**BASE, **changes}, *arguments)


def rows_of(folder: Path, rank: int = 0) -> dict[int, list[list[int]]]:
    """Step -> rows of the micro-batches that the model received; the last attempt of a step."""
    steps: dict[int, list[list[int]]] = {}
    for line in lines(folder.parent, f"{folder.name}-rows-{rank}"):
        if "step" in line:
            if line["micro"] == 0:
                steps[line["step"]] = []
            steps[line["step"]].append(line["rows"])
    return steps


def passes_of(folder: Path) -> list[tuple[int, int]]:
    """(number, first step) of each pass that began."""
    found = lines(folder.parent, f"{folder.name}-rows-0")
    return [(line["epoch"], line["at"]) for line in found if "epoch" in line]


def test_passes_of_limit_train_batches_go_on_where_the_last_stopped(
    dataset: Dataset, whole: Path, tmp_path: Path
) -> None:
    """Passes that begin at the loader's start repeat its rows; a killed pass that begins again,
    or one counted from the resume, repeats or loses some."""
    folder = tmp_path / "run"
    limited = {"limit_train_batches": 12, "max_epochs": 3}  # 3 steps a pass
    # In the middle of pass 1; then after its end, which a stop or a kill may fall on.
    assert go(dataset, folder, limited, event=("stop", 3, 1)) == [EXIT_STOPPED]
    assert go(dataset, folder, limited) == [0]
    outcome = json.loads((folder / "outcome.json").read_text())
    assert (outcome["status"], outcome["step"], outcome["max_steps"]) == ("completed", 9, 9)
    assert passes_of(folder)[:2] == [(0, 0), (1, 3)] and passes_of(folder)[-1] == (2, 6)
    # The share of an epoch, to the recipe's own end; killed on the way.
    share = {"limit_train_batches": 2.2 * 8 / dataset.split("train").num_rows}
    assert go(dataset, folder, share, event=("kill", 10, 2)) == [-signal.SIGKILL]
    assert go(dataset, folder, share) == [0]
    assert passes_of(folder)[-1] == (5, 10)
    assert_same_run(folder, whole)
    assert rows_of(folder) == rows_of(whole)


def test_passes_on_two_ranks_with_another_accumulation(dataset: Dataset, tmp_path: Path) -> None:
    """Counters of a pass in micro-batches of the first attempt's accumulation."""
    plain, folder = tmp_path / "plain", tmp_path / "run"
    same: Any = {"strategy": "fsdp", "world_size": 2, "max_steps": 8}
    assert go(dataset, plain, **same) == [0, 0]
    limited = {"limit_train_batches": 6, "max_epochs": 2}
    codes = go(dataset, folder, limited, event=("kill", 5, 1), **same)
    assert codes[1] == -signal.SIGKILL
    assert go(dataset, folder, limited, **same) == [0, 0]
    # The rest in passes of 2 steps of 1 micro-batch: other sums, the same rows.
    assert last_attempts(folder, "consumed.jsonl", "t1")[-1] == (5, 48)
    assert go(dataset, folder, {"limit_train_batches": 4}, **same) == [0, 0]
    assert_same_run(folder, plain)
    assert passes_of(folder)[-1] == (3, 6)


def test_max_steps_and_max_epochs_of_the_trainer(dataset: Dataset, tmp_path: Path) -> None:
    """max_epochs as passes over a loader that ends elsewhere, or a short last step that is never
    applied because its micro-batches are fewer."""
    num_rows = dataset.split("train").num_rows
    batch = next(b for b in (11, 10, 9) if (num_rows % b) % 2)
    steps = -(-num_rows // batch)
    sizes = {"global_batch": batch, "max_steps": steps}
    plain, folder = tmp_path / "plain", tmp_path / "run"
    assert go(dataset, plain, **{**sizes, "max_epochs": 1}) == [0]
    once = {"max_steps": -1, "max_epochs": 1}
    assert go(dataset, folder, {"max_steps": 2}, **sizes) == [0]
    assert lines(folder, "consumed.jsonl")[-1]["t1"] == 2 * batch
    assert go(dataset, folder, once, event=("kill", steps - 1, 0), **sizes) == [-signal.SIGKILL]
    assert go(dataset, folder, once, **sizes) == [0]
    assert lines(folder, "consumed.jsonl")[-1]["t1"] == num_rows
    assert len(lines(folder, "order.jsonl")) == 3, "a short last step is no segment of its own"
    assert_same_run(folder, plain)


def test_fast_dev_run_leaves_the_run_as_it_was(
    dataset: Dataset, whole: Path, tmp_path: Path
) -> None:
    """A trial's steps in consumed.jsonl, or its checkpoint, would be gone on from."""
    folder = tmp_path / "run"
    assert go(dataset, folder, {"fast_dev_run": True}) == [0]
    assert sorted(p.name for p in folder.glob("*.jsonl")) == []
    assert go(dataset, folder, {"max_steps": 5}) == [0]
    kept = ("consumed.jsonl", "order.jsonl", "metrics.jsonl", "ledger.jsonl")
    before = {name: (folder / name).read_bytes() for name in kept}
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert go(dataset, folder, {"fast_dev_run": 3}) == [0]
    assert {name: (folder / name).read_bytes() for name in kept} == before
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == saved
    assert json.loads((folder / "outcome.json").read_text())["step"] == 5
    trial = [line["step"] for line in lines(tmp_path, "run-rows-0") if "step" in line]
    assert trial[-12:] == [5] * 4 + [6] * 4 + [7] * 4
    # Interrupted trials save nothing either.
    assert go(dataset, folder, {"fast_dev_run": 3}, event=("stop", 5, 0)) == [EXIT_STOPPED]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == saved
    assert go(dataset, folder) == [0]
    assert_same_run(folder, whole)


def test_ckpt_path_sets_model_data_and_counters(
    dataset: Dataset, whole: Path, tmp_path: Path
) -> None:
    """Weights from the checkpoint and data from the start, or the other way round."""
    other, again = tmp_path / "other", tmp_path / "again"
    middle = str(whole / "checkpoints" / "step-8-a0")
    # Another run, started from this one's checkpoint.
    assert go(dataset, other, fit={"ckpt_path": middle}) == [0]
    assert lines(other, "order.jsonl")[0]["t0"] == 8 * 8
    (other / "consumed.jsonl").write_bytes(
        b"".join((whole / "consumed.jsonl").read_bytes().splitlines(keepends=True)[:8])
        + (other / "consumed.jsonl").read_bytes()
    )
    (other / "metrics.jsonl").write_bytes(
        b"".join((whole / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:8])
        + (other / "metrics.jsonl").read_bytes()
    )
    assert_same_run(other, whole)
    # An older checkpoint of the same run: the steps after it are rewound. Then "last", where the
    # recipe itself would start at the beginning.
    shutil.copytree(whole, again)
    older = str(again / "checkpoints" / "step-4-a0")
    longer: Any = {"max_steps": STEPS + 1}
    stop = ("stop", 5, 0)
    codes = go(dataset, again, {"max_steps": STEPS}, fit={"ckpt_path": older}, event=stop, **longer)
    assert codes == [EXIT_STOPPED]
    last = {"fit": {"ckpt_path": "last"}, "plain_start": True}
    assert go(dataset, again, {"max_steps": STEPS}, **longer, **last) == [0]
    order = lines(again, "order.jsonl")
    assert [line["step0"] for line in order[:2]] == [0, 4] and order[2]["step0"] in (6, 7, 8)
    consumed = last_attempts(again, "consumed.jsonl", "t0", "t1")
    assert consumed == last_attempts(whole, "consumed.jsonl", "t0", "t1")
    rows = rows_of(again)
    assert {step: rows[step] for step in range(8, STEPS)} == {
        step: found for step, found in rows_of(whole).items() if step >= 8
    }


def test_last_of_a_run_without_checkpoints_starts_it(
    dataset: Dataset, whole: Path, tmp_path: Path
) -> None:
    """Lightning's "last" may be given from the first start on."""
    assert go(dataset, tmp_path / "run", fit={"ckpt_path": "last"}) == [0]
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("options", [{"num_sanity_val_steps": 2}, {"limit_val_batches": 1}])
def test_validation_options_change_no_step(
    dataset: Dataset, whole: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """The sanity check draws batches and counts them; that must not move the training data, nor
    pass for a validation of the run."""
    assert go(dataset, tmp_path / "run", options, val_every_steps=5) == [0]
    assert_same_run(tmp_path / "run", whole)
    validated = [
        line for line in lines(tmp_path / "run", "metrics.jsonl") if "validation_loss" in line
    ]
    assert [line["step"] for line in validated] == [5, 10, STEPS]
    assert all(line["validation_s"] > 0 for line in validated)


@pytest.mark.parametrize(
    ("options", "fit", "code", "named"),
    [
        ({"limit_train_batches": 5}, None, 2, "limit_train_batches=5"),
        ({"overfit_batches": 2}, None, 2, "overfit_batches=2"),
        ({"accumulate_grad_batches": 3}, None, 2, "accumulate_grad_batches=3"),
        ({}, "last.ckpt", 2, "not a checkpoint of Leyden"),
        ({}, "best", 2, "not a checkpoint of Leyden"),
        ({}, "{damaged}", 2, "is damaged: another SHA-256"),
        ({}, "{settings}", 2, "optim.lr was"),
        ({}, "{data}", 3, "is of data"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(
    dataset: Dataset, whole: Path, tmp_path: Path, options: dict[str, Any], fit: str | None,
    code: int, named: str,
) -> None:  # fmt: skip
    """Each would repeat or lose samples, or train another run's model, in silence."""
    changes: dict[str, Any] = dict(BASE)
    url, saved = dataset.storage.url, whole / "checkpoints" / "step-4-a0"
    if fit == "{damaged}":
        saved = Path(shutil.copytree(saved, tmp_path / "step-4-a0"))
        flip_byte(saved / "__0_0.distcp", 2000)
    elif fit == "{settings}":
        from dist.optim import OptimConfig

        changes["optim"] = OptimConfig(lr=2e-2, warmup_steps=2)
    elif fit == "{data}":
        url = write_dataset(tmp_path / "data", seed=1, with_tokenizer=False).storage.url
    path = {"ckpt_path": str(saved) if fit and fit[0] == "{" else fit}
    arguments = (with_options, tmp_path / "run", options, path, None, False)
    with World(url, tmp_path / "run", 1, changes, *arguments) as world:
        assert world.wait() == [code], world.said(0)
        said = [line for line in world.said(0).splitlines() if line.startswith("error:")]
    assert len(said) == 1 and named in said[0]
    assert not (tmp_path / "run" / "consumed.jsonl").exists()
