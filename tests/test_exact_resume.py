"""Exact resume with real processes: kill anything at any step, go on as if nothing happened.

The kill trials marked `slow` complete the twenty seeds; the default set holds two of each case.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist.checkpoint import find_checkpoint
from dist.dataset import Dataset
from dist.order import Order
from tests.make_dataset import write_dataset
from tests.rank_processes import World, processes_of, train

ROOT = Path(__file__).parent.parent
CASES = (("ddp", 1), ("ddp", 2), ("fsdp", 2))
PEERS_END_WITHIN_S = 15.0


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    # A few dozen rows, so that forty steps pass over several epochs.
    return write_dataset(
        tmp_path_factory.mktemp("data"), documents=40, num_train_shards=2, with_tokenizer=False
    )


@pytest.fixture(scope="module")
def reference(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of the uninterrupted run of a case, made once."""
    made: dict[Any, Path] = {}

    def of(strategy: str, world_size: int, **changes: Any) -> Path:
        key = (strategy, world_size, json.dumps(changes, sort_keys=True))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "run"
            codes = train(
                dataset.storage.url, made[key], world_size, {"strategy": strategy, **changes}
            )
            assert codes == [0] * world_size
        return made[key]

    return of


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint: weights and optimizer state, unsharded."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    found, _ = find_checkpoint(folder / "checkpoints")
    assert found is not None
    path = folder / "unsharded.pt"
    dcp_to_torch_save(found, path)
    state = torch.load(path)
    flat = {f"{part}.{name}": value for part in state for name, value in state[part].items()}
    assert any(name.startswith("optimizer.") for name in flat) and len(flat) > 20
    return flat


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    found = []
    for line in (folder / name).read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # torn by the kill
    return found


def last_attempts(folder: Path, name: str, *keys: str) -> list[tuple[Any, ...]]:
    """A log by step, the last attempt of a step counting."""
    by_step = {line["step"]: line for line in lines(folder, name) if all(k in line for k in keys)}
    return [tuple(by_step[step][k] for k in ("step", *keys)) for step in sorted(by_step)]


def assert_same_run(folder: Path, whole: Path) -> None:
    """Bit for bit: weights, optimizer, what was consumed, and every loss."""
    one, other = tensors(folder), tensors(whole)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"differ: {different[:5]} ({len(different)} of {len(one)})"
    keys = ("t0", "t1", "batch", "targets")
    consumed = last_attempts(folder, "consumed.jsonl", *keys)
    assert consumed == last_attempts(whole, "consumed.jsonl", *keys)
    losses = last_attempts(folder, "metrics.jsonl", "loss")
    assert losses == last_attempts(whole, "metrics.jsonl", "loss")


def killed_at(rank: int, victim: int, step: int, micro: int, delay_s: float) -> None:
    """On the victim: SIGKILL itself `delay_s` after a micro-batch begins, wherever it is then."""
    if rank != victim:
        return
    from recipes import pretrain

    original = pretrain.Pretrain.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if (batch.step, batch.micro) == (step, micro):
            kill = (os.getpid(), signal.SIGKILL)
            threading.Timer(delay_s, os.kill, kill).start()
        return original(self, batch, batch_idx)

    pretrain.Pretrain.training_step = training_step  # type: ignore[method-assign]


def trials() -> list[Any]:
    """Twenty seeds over three cases; victims, steps and moments by the seed."""
    chosen = []
    for seed in range(20):
        strategy, world_size = CASES[seed % len(CASES)]
        marks = [] if seed < 6 else [pytest.mark.slow]
        chosen.append(pytest.param(seed, strategy, world_size, marks=marks))
    return chosen


@pytest.mark.parametrize(("seed", "strategy", "world_size"), trials())
def test_killed_and_restarted_equals_uninterrupted(
    dataset: Dataset, reference: Any, tmp_path: Path, seed: int, strategy: str, world_size: int
) -> None:
    """A repeated or lost sample, other dropout, lost moments: each would show in a bit. And the
    peers of a killed rank must end by themselves, with one line that says why."""
    url, changes = dataset.storage.url, {"strategy": strategy}
    choose = random.Random(seed)
    # Rank 0 and rank 1 in turn.
    victim = (seed // len(CASES)) % world_size
    micro = choose.randrange(4 // world_size)
    moment = (victim, choose.randrange(1, 39), micro, choose.uniform(0.0, 0.03))
    with World(url, tmp_path / "run", world_size, changes, killed_at, *moment) as world:
        codes = world.wait(60.0)
        assert codes[victim] == -signal.SIGKILL
        for rank in set(range(world_size)) - {victim}:
            assert codes[rank] == 1, world.said(rank)
            said = world.said(rank).strip().splitlines()
            assert "another rank ended" in said[-1], said
            assert len(said) <= 8 and "Traceback" not in world.said(rank), said
    assert train(url, tmp_path / "run", world_size, changes) == [0] * world_size
    assert_same_run(tmp_path / "run", reference(strategy, world_size))


def record_rows(rank: int, folder: Path, stop_in: tuple[int, int] | None) -> None:
    """Log the row keys of the tensors that the model receives; SIGTERM rank 0 in a micro-batch."""
    from recipes import llama

    original = llama.PackedLlama.forward
    log = open(folder / f"rows-{rank}.jsonl", "a", buffering=1)  # noqa: SIM115

    def forward(self: Any, batch: Any) -> torch.Tensor:
        if self.training:
            rows = [row for row in batch.rows.tolist() if row >= 0]
            log.write(json.dumps({"step": batch.step, "rank": rank, "rows": rows}) + "\n")
            if rank == 0 and (batch.step, batch.micro) == stop_in:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    llama.PackedLlama.forward = forward  # type: ignore[method-assign]


def seen_rows(folder: Path) -> dict[int, list[int]]:
    """Step -> rows of the global batch in order of rank; then forgets them."""
    steps: dict[int, list[int]] = {}
    for path in sorted(folder.glob("rows-*.jsonl")):
        for line in lines(folder, path.name):
            steps.setdefault(line["step"], []).extend(line["rows"])
        path.unlink()
    return steps


def segments(
    dataset: Dataset, folder: Path, plan: list[tuple[int, int, tuple[int, int] | None]],
    changes: dict[str, Any],
) -> dict[int, list[int]]:  # fmt: skip
    """Train (ranks, micro_batch, stop in (step, micro)) one after the other in one run."""
    folder.mkdir(exist_ok=True)
    seen: dict[int, list[int]] = {}
    for world_size, micro_batch, stop_in in plan:
        settings = {**changes, "micro_batch": micro_batch}
        codes = train(
            dataset.storage.url, folder, world_size, settings, record_rows, folder, stop_in
        )
        assert codes == [0 if stop_in is None else 75] * world_size
        found = seen_rows(folder)
        assert not seen.keys() & found.keys(), "a step was trained in two segments"
        seen |= found
    return seen


def assert_order(dataset: Dataset, seen: dict[int, list[int]], batch: int) -> None:
    """Each global batch is the order's, and every row comes once per epoch."""
    num_rows = dataset.split("train").num_rows
    order = Order(num_rows, 0)
    for step, rows in seen.items():
        assert rows == order.rows(step * batch, (step + 1) * batch)[1].tolist(), step
    flat = [row for step in sorted(seen) for row in seen[step]]
    for start in range(0, len(flat) - num_rows + 1, num_rows):
        assert sorted(flat[start : start + num_rows]) == list(range(num_rows))
    assert len(flat) >= num_rows


def test_ranks_4_2_3_4_see_the_same_batches(dataset: Dataset, tmp_path: Path) -> None:
    """Batches that move with the number of ranks, a row dropped where 10 does not divide by 4 or
    3, or another normalisation of the loss would show."""
    changes = {"global_batch": 10, "max_steps": 20, "dropout": 0.0, "save_every_steps": 0}
    alone = segments(dataset, tmp_path / "alone", [(1, 5, None)], changes)
    plan = [(4, 3, (1, 0)), (2, 2, (5, 1)), (3, 4, (9, 0)), (4, 2, None)]
    seen = segments(dataset, tmp_path / "run", plan, changes)
    assert seen == alone and sorted(seen) == list(range(20))
    assert_order(dataset, seen, 10)
    losses = [loss for _, loss in last_attempts(tmp_path / "run", "metrics.jsonl", "loss")]
    expected = [loss for _, loss in last_attempts(tmp_path / "alone", "metrics.jsonl", "loss")]
    assert losses[:10] == pytest.approx(expected[:10], rel=1e-5)
    # They drift after: gradients add up in another order.
    assert losses == pytest.approx(expected, rel=1e-3)
    order = lines(tmp_path / "run", "order.jsonl")
    assert [line["world_size"] for line in order] == [4, 2, 3, 4]
    assert [line["accumulation"] for line in order] == [1, 3, 1, 2]
    assert [line["attempt"] for line in order] == [0, 1, 2, 3]
    assert all(line["t0"] == 10 * line["step0"] for line in order) and order[1]["step0"] > 1
    assert set(order[0]) == {
        "step0", "t0", "batch", "world_size", "ranks", "accumulation", "attempt", "seed",
        "data_digest",
    }  # fmt: skip


@pytest.mark.parametrize(("batch", "micro", "later"), [(16, 2, 1), (15, 2, 3)])
def test_accumulation_changes_on_resume(
    dataset: Dataset, tmp_path: Path, batch: int, micro: int, later: int
) -> None:
    """8 -> 16 and 8 -> 5 micro-batches a step: counted in batches, the steps after the resume
    would be cut elsewhere. The stop is asked for in the middle of an accumulation and must wait
    for its end, or the checkpoint would lose the rows of half a step."""
    changes = {"global_batch": batch, "max_steps": 10, "dropout": 0.0, "save_every_steps": 0}
    alone = segments(dataset, tmp_path / "alone", [(1, micro, None)], changes)
    plan = [(1, micro, (3, 4)), (1, later, None)]
    seen = segments(dataset, tmp_path / "run", plan, changes)
    assert seen == alone
    assert_order(dataset, seen, batch)
    first, second = lines(tmp_path / "run", "order.jsonl")
    assert (first["accumulation"], second["accumulation"]) == (8, -(-batch // later))
    assert second["t0"] == batch * second["step0"] and second["step0"] >= 4
    losses = last_attempts(tmp_path / "run", "metrics.jsonl", "loss")
    for (_, loss), (_, expected) in zip(
        losses, last_attempts(tmp_path / "alone", "metrics.jsonl", "loss"), strict=True
    ):
        assert loss == pytest.approx(expected, rel=1e-5)


def divisor(num_rows: int) -> int:
    """A batch that ends with the epoch."""
    found = [batch for batch in range(4, 17) if num_rows % batch == 0]
    assert found, f"{num_rows} rows have no divisor from 4 to 16; change the dataset"
    return found[-1]


def test_checkpoint_after_validation_and_at_an_epochs_end(
    dataset: Dataset, tmp_path: Path, reference: Any
) -> None:
    """A save after a validation holds its side effects (gathered parameters, evaluation mode);
    one at an epoch's end may start the next epoch twice, or not at all."""
    num_rows = dataset.split("train").num_rows
    batch = divisor(num_rows)
    every = num_rows // batch
    changes = {
        "global_batch": batch, "val_every_steps": every, "save_every_steps": every,
        "max_steps": 2 * every + 2, "micro_batch": 4,
        # Waited for: a save in the background may not be durable two steps later.
        "async_save": False,
    }  # fmt: skip
    moment = (1, every + 2, 0, 0.0)
    folder = tmp_path / "run"
    url = dataset.storage.url
    codes = train(url, folder, 2, {**changes, "strategy": "fsdp"}, killed_at, *moment)
    assert -signal.SIGKILL in codes
    assert train(url, folder, 2, {**changes, "strategy": "fsdp"}) == [0, 0]
    assert [line["t0"] for line in lines(folder, "order.jsonl")] == [0, num_rows]
    whole = reference("fsdp", 2, **changes)
    assert_same_run(folder, whole)
    validated = last_attempts(folder, "metrics.jsonl", "validation_loss")
    assert validated == last_attempts(whole, "metrics.jsonl", "validation_loss")


def test_max_epochs_is_that_many_times_every_row(dataset: Dataset, tmp_path: Path) -> None:
    """Short of the last rows (a dropped tail), or a last step weighed as if it were full."""
    num_rows = dataset.split("train").num_rows
    batch = next(b for b in (9, 10, 11) if num_rows % b)
    changes = {"global_batch": batch, "max_epochs": 1, "max_steps": 3, "dropout": 0.0}
    steps = -(-num_rows // batch)
    alone = segments(dataset, tmp_path / "alone", [(1, 2, None)], changes)
    seen = segments(dataset, tmp_path / "run", [(2, 3, (2, 0)), (1, 3, None)], changes)
    assert seen == alone and sorted(seen) == list(range(steps))
    assert sorted(row for rows in seen.values() for row in rows) == list(range(num_rows))
    losses = last_attempts(tmp_path / "run", "metrics.jsonl", "loss")
    expected = last_attempts(tmp_path / "alone", "metrics.jsonl", "loss")
    assert np.allclose(losses, expected, rtol=1e-5)
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["status"], outcome["samples"], outcome["step"]) == (
        "completed", num_rows, steps,
    )  # fmt: skip
    # Another epoch goes on from there; the same one is complete.
    more = segments(dataset, tmp_path / "run", [(1, 3, None)], {**changes, "max_epochs": 2})
    assert sorted(row for rows in more.values() for row in rows) == list(range(num_rows))
    assert segments(dataset, tmp_path / "run", [(1, 3, None)], {**changes, "max_epochs": 2}) == {}


def lightning_options(rank: int, options: dict[str, Any], fit: dict[str, Any]) -> None:
    """Give Lightning's Trainer, or its fit, more options than the recipe does."""
    from recipes import pretrain

    original = pretrain.Trainer

    def trainer(**given: Any) -> Any:
        made = original(**{**given, **options})
        inner = made.fit
        made.fit = lambda *args, **kwargs: inner(*args, **{**kwargs, **fit})
        return made

    pretrain.Trainer = trainer  # type: ignore[assignment]


@pytest.mark.parametrize("options", [{"num_sanity_val_steps": 2}, {"limit_val_batches": 1}])
def test_lightnings_validation_options_change_no_step(
    dataset: Dataset, tmp_path: Path, reference: Any, options: dict[str, Any]
) -> None:
    """The sanity check draws batches and counts them; that must not move the training data, nor
    pass for a validation of the run."""
    changes = {"max_steps": 14, "val_every_steps": 5}
    whole = reference("ddp", 1, **changes)
    changes = {**changes, "strategy": "ddp"}
    url = dataset.storage.url
    arguments = (lightning_options, options, {})
    codes = train(url, tmp_path / "run", 1, changes, *arguments)
    assert codes == [0]
    assert_same_run(tmp_path / "run", whole)
    steps = [
        step for step, _ in last_attempts(tmp_path / "run", "metrics.jsonl", "validation_loss")
    ]
    assert steps == [5, 10, 14]


@pytest.mark.parametrize(
    ("options", "fit", "named"),
    [
        ({"limit_train_batches": 5}, {}, "limit_train_batches"),
        ({"overfit_batches": 2}, {}, "overfit_batches"),
        ({"fast_dev_run": True}, {}, "fast_dev_run"),
        ({"max_epochs": 3}, {}, "max_epochs"),
        ({"max_steps": -1, "max_epochs": -1}, {}, "max_steps"),
        ({"accumulate_grad_batches": 3}, {}, "accumulate_grad_batches"),
        ({}, {"ckpt_path": "last.ckpt"}, "ckpt_path"),
    ],
)
def test_lightnings_inexact_options_are_refused_by_name(
    dataset: Dataset, tmp_path: Path, options: dict[str, Any], fit: dict[str, Any], named: str
) -> None:
    """Each would repeat or lose samples of a resumed run, in silence."""
    arguments = (lightning_options, options, fit)
    with World(dataset.storage.url, tmp_path / "run", 1, {"max_steps": 4}, *arguments) as world:
        assert world.wait(60.0) == [2], world.said(0)
        said = [line for line in world.said(0).splitlines() if line.startswith("error:")]
    assert len(said) == 1 and named in said[0]


def agent(url: str, folder: Path, tag: str) -> subprocess.Popen[str]:
    """The command of `reference("fsdp", 2)` through torchrun's agent."""
    words = [sys.executable, "-m", "launch.agent", "--standalone", "--local-addr=127.0.0.1"]
    words += ["--nproc-per-node=2", "-m", "--", "recipes.pretrain", "--data.url", url]
    words += ["--run", str(folder), "--precision=fp32", "--activation_checkpointing=full"]
    words += ["--model.hidden_size=48", "--model.num_layers=1", "--model.num_heads=4"]
    words += ["--model.num_kv_heads=2", "--model.intermediate_size=80"]
    words += ["--model.attention_dropout=0.1", "--model.residual_dropout=0.1"]
    words += ["--optim.lr=0.01", "--optim.warmup_steps=2", "--global_batch=8", "--micro_batch=2"]
    words += ["--max_steps=40", "--log_every_steps=1", "--save_every_steps=7", "--val_rows=8"]
    env = {**os.environ, "LEYDEN_LAUNCH": tag, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, cwd=ROOT, env=env, **pipes)


def wait_until(true: Any, timeout_s: float, what: str) -> None:
    until = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > until:
            raise TimeoutError(f"{what} did not happen within {timeout_s} s")
        time.sleep(0.02)


@pytest.mark.parametrize(
    "victim", ["agent", pytest.param("rank", marks=pytest.mark.slow)]
)  # fmt: skip
def test_torchrun_killed_and_restarted(
    dataset: Dataset, reference: Any, tmp_path: Path, victim: str
) -> None:
    """Ranks that outlive their agent train on without a store, and a restart would be refused
    by their lease, or write beside them."""
    url, folder, tag = dataset.storage.url, tmp_path / "run", f"t-{tmp_path.name}-{os.getpid()}"
    started = agent(url, folder, tag)
    try:
        consumed = folder / "consumed.jsonl"
        wait_until(
            lambda: consumed.exists() and len(lines(folder, consumed.name)) >= 9, 90, "step 9"
        )
        others = [pid for pid in processes_of(tag) if pid != started.pid]
        os.kill(started.pid if victim == "agent" else others[-1], signal.SIGKILL)
        wait_until(lambda: not set(processes_of(tag)) - {started.pid}, 15, "the end of all ranks")
        output, _ = started.communicate(timeout=15)
        assert started.returncode in ((-9,) if victim == "agent" else (1, 137)), output
        if victim == "rank":
            assert "another rank ended" in output and "Traceback" not in output
        second = agent(url, folder, tag)
        output, _ = second.communicate(timeout=90)
        assert second.returncode == 0, output
        assert not processes_of(tag)
    finally:
        for pid in processes_of(tag):
            os.kill(pid, signal.SIGKILL)
    assert_same_run(folder, reference("fsdp", 2))
