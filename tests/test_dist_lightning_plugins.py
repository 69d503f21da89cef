"""dist/lightning_plugins.py: what is changed in Lightning is changed, and stays changed."""

from __future__ import annotations

import json
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

import dist.lightning_plugins
from dist.audit import replay
from dist.dataset import Dataset
from dist.drain import StopFlag
from dist.errors import SetupError
from dist.lightning_plugins import LIGHTNING_HOOKS, check_lightning
from dist.ranks import Ranks
from dist.report_facts import read_facts
from dist.run_dir import RunDir
from tests.make_dataset import write_dataset
from tests.run_ranks import run_ranks

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48,
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), with_tokenizer=False)


def pretrain(url: str, folder: str, **changes: Any) -> int:
    """Run the recipe on this rank with a small model; returns its exit code."""
    from dist.optim import OptimConfig
    from dist.sharding import ParallelConfig
    from dist.start import DataConfig
    from recipes.llama import ModelConfig
    from recipes.pretrain import Config, run

    settings = {
        "data": DataConfig(url=url),
        "model": ModelConfig(**SMALL),
        "optim": OptimConfig(lr=1e-2, warmup_steps=2),
        "parallel": ParallelConfig(strategy=changes.pop("strategy", "fsdp")),
        "precision": "fp32", "activation_checkpointing": "full", "global_batch": 8,
        "micro_batch": 2, "max_steps": 6, "log_every_steps": 1, "save_every_steps": 0,
    }  # fmt: skip
    config = Config(**{**settings, **changes, "run": folder})
    with ExitStack() as stack:
        return run(config, Ranks.from_environment(), stack)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize(("owner", "name"), LIGHTNING_HOOKS)
def test_private_hook_is_still_there(owner: type, name: str) -> None:
    """If this fails, Lightning moved the hook that dist/lightning_plugins.py overrides."""
    assert name in vars(owner), f"Lightning moved {owner.__name__}.{name}"


def test_a_moved_hook_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overriding a name that nobody calls brings the per-batch broadcast back in silence."""
    moved = (dist.lightning_plugins._TrainingEpochLoop, "_broadcast_sigterm_flag")
    monkeypatch.setattr(dist.lightning_plugins, "LIGHTNING_HOOKS", (*LIGHTNING_HOOKS, moved))
    with pytest.raises(SetupError, match=r"_TrainingEpochLoop\._broadcast_sigterm_flag"):
        check_lightning()


def count_collectives(url: str, folder: str, neutralised: bool) -> tuple[dict[str, int], str]:
    """Python-level collectives of the main thread between two middle batches, and who handles
    SIGTERM in training. Under ddp the gradients are reduced below Python."""
    from pytorch_lightning import Callback

    import recipes.pretrain

    counts: dict[str, int] = {}
    for name in ("broadcast", "all_reduce", "barrier", "all_gather", "broadcast_object_list",
                 "all_gather_object", "all_gather_into_tensor", "reduce"):  # fmt: skip
        original = getattr(torch.distributed, name)

        def counted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                counts[name] = counts.get(name, 0) + 1
            return original(*args, **kwargs)

        setattr(torch.distributed, name, counted)
    seen: list[Any] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index in (4, 12):
                seen.append(dict(counts))
            seen.append(repr(signal.getsignal(signal.SIGTERM)))

    original_trainer = recipes.pretrain.Trainer
    recipes.pretrain.Trainer = lambda **options: original_trainer(
        **{**options, "callbacks": [*options["callbacks"], Watch()]}
    )
    if not neutralised:
        # In this forked process only: Lightning's own methods again.
        del dist.lightning_plugins.StepLoop._broadcast_sigterm_tensor
        del dist.lightning_plugins._NoSignals.register_signal_handlers
    code = pretrain(url, folder, strategy="ddp", log_every_steps=100, max_steps=8)
    assert code == 0
    before, after = [item for item in seen if isinstance(item, dict)]
    changed = {k: n - before.get(k, 0) for k, n in after.items() if n != before.get(k, 0)}
    return changed, seen[-1]


def test_only_the_guards_collective_and_no_foreign_handler_in_a_batch(
    dataset: Dataset, tmp_path: Path
) -> None:
    """Lightning's loop broadcasts and waits for the host every batch (since 2.5.2)."""
    url = dataset.storage.url
    for counts, handler in run_ranks(count_collectives, 2, 240, url, str(tmp_path / "ours"), True):
        # Two scalars a step for the guard's verdict (dist/guard.py), on no host's critical path.
        assert counts == {"all_reduce": 4}
        assert "StopFlag" in handler
    # The counter itself must see what it is there for.
    counts, handler = run_ranks(count_collectives, 2, 240, url, str(tmp_path / "lightning"), False)[
        0
    ]
    assert counts.get("broadcast", 0) == 8 and "StopFlag" not in handler


def validation_steps(folder: Path) -> list[int]:
    return [line["step"] for line in lines(folder, "metrics.jsonl") if "validation_loss" in line]


def test_validation_and_saves_follow_optimizer_steps_across_resume(
    dataset: Dataset, tmp_path: Path
) -> None:
    """Counted in batches, a resume with another accumulation shifts every later validation, and
    a batch of the first accumulation counts for the wrong step."""
    url, folder = dataset.storage.url, tmp_path / "run"
    cadence = {"val_every_steps": 2, "save_every_steps": 3, "keep": 9, "val_rows": 4}
    # 4 micro-batches a step, then 1.
    assert run_ranks(call, 1, 240, url, folder, {**cadence, "micro_batch": 2, "max_steps": 5}) == [
        0
    ]
    assert validation_steps(folder) == [2, 4, 5]
    assert run_ranks(call, 1, 240, url, folder, {**cadence, "micro_batch": 8, "max_steps": 9}) == [
        0
    ]
    assert validation_steps(folder) == [2, 4, 5, 6, 8, 9]
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved == ["step-3-a0", "step-5-a0", "step-6-a1", "step-9-a1"]
    steps = [line["step"] for line in lines(folder, "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 10))
    consumed = [(line["step"], line["t0"], line["t1"]) for line in lines(folder, "consumed.jsonl")]
    assert consumed == [(s, 8 * s, 8 * s + 8) for s in range(9)]


def call(url: str, folder: Path, changes: dict[str, Any]) -> int:
    return pretrain(url, str(folder), **changes)


def ramped(url: str, folder: str) -> list[tuple[int, list[int]]]:
    """Train two steps of 8 rows and then some of 7; (step, rows) as the model received them."""
    from collections.abc import Iterator

    import recipes.pretrain

    class Ramp(recipes.pretrain.LoaderPlan):
        def steps(self) -> Iterator[tuple[int, int, int]]:
            if self.end_t is not None:  # validation
                return super().steps()
            return iter([(0, 0, 8), (1, 8, 16), (2, 16, 23), (3, 23, 30), (4, 30, 37)])

    received = []
    step = recipes.pretrain.Pretrain.training_step

    def recorded(self: Any, batch: Any, batch_idx: int) -> Any:
        received.append((batch.step, [row for row in batch.rows.tolist() if row >= 0]))
        return step(self, batch, batch_idx)

    recipes.pretrain.Pretrain.training_step = recorded  # type: ignore[method-assign]
    recipes.pretrain.LoaderPlan = Ramp  # type: ignore[misc]
    assert pretrain(url, folder, strategy="ddp", max_steps=5, val_every_steps=2) == 0
    return received


def test_records_say_what_was_trained_when_the_batch_changes(
    dataset: Dataset, tmp_path: Path
) -> None:
    """One line of order.jsonl an attempt: the audit would look for rows in the wrong steps. And
    the report's goodput needs the times."""
    began = time.time()
    [received] = run_ranks(ramped, 1, 240, dataset.storage.url, str(tmp_path / "run"))
    run = RunDir(tmp_path / "run")
    order = run.read_lines("order.jsonl")
    keys = ("step0", "t0", "batch", "micro_batch", "attempt")
    assert [tuple(line[key] for key in keys) for line in order] == [
        (0, 0, 8, 2, 0),
        (2, 16, 7, 2, 0),
    ]
    for step in range(5):
        rows = [row for at, some in received if at == step for row in some]
        assert [row.row for row in replay(run, step, text=False).rows] == rows, step
    consumed = run.read_lines("consumed.jsonl")
    times = [line["time"] for line in consumed]
    assert times == sorted(times) and began < times[0] and times[-1] < time.time()
    metrics = run.read_lines("metrics.jsonl")
    validations = [line for line in metrics if "validation_loss" in line]
    assert [line["step"] for line in validations] == [2, 4, 5]
    assert all(line["validation_s"] > 0 for line in validations)
    peaks = [line["peak_rss_bytes"] for line in metrics if "loss" in line]
    assert all(1 << 25 < peak < 1 << 34 for peak in peaks)
    facts = read_facts(run)
    assert not facts.problems and facts.attempts[0].validation_s > 0


def test_stop_flag_only_sets_a_flag() -> None:
    """A handler that saves or calls a collective can deadlock the ranks."""
    flag = StopFlag()
    assert not flag()
    flag._handle(signal.SIGTERM, None)
    assert flag() and flag.exit_code == 75
    interrupted = StopFlag()
    interrupted._handle(signal.SIGINT, None)
    interrupted._handle(signal.SIGINT, None)  # torchrun's copy of the same Ctrl-C
    assert interrupted() and interrupted.exit_code == 130
    interrupted._since -= 4
    with pytest.raises(KeyboardInterrupt):
        interrupted._handle(signal.SIGINT, None)
