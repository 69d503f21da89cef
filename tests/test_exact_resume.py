"""Exact resume with real processes: kill anything at any step, go on as if nothing happened.

Lightning's options are in test_dist_trainer_options.py, stops on request in test_drain.py.
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

from dist.dataset import Dataset
from dist.order import Order
from tests.make_dataset import write_dataset
from tests.rank_processes import World, kill, processes_of, train, watches
from tests.same_run import assert_same_run, last_attempts, lines

ROOT = Path(__file__).parent.parent
CASES = (("ddp", 1), ("ddp", 2), ("fsdp", 2))
STEPS = 24  # of rank_processes.config
ALL_END_WITHIN_S = 15.0
"""After a kill, on a machine whose cores are free; more in proportion to its load."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    # A few dozen rows, so that the steps pass over several epochs.
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
    """Twenty seeds over three cases; victims, steps and moments by the seed. make test-all: all."""
    return [
        pytest.param(
            seed, *CASES[seed % len(CASES)],
            marks=[pytest.mark.all_cells] if seed >= 3 * len(CASES) else [],
        )
        for seed in range(20)
    ]  # fmt: skip


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
    moment = (victim, choose.randrange(1, STEPS - 1), micro, choose.uniform(0.0, 0.03))
    with World(url, tmp_path / "run", world_size, changes, killed_at, *moment) as world:
        codes = world.wait()
        assert codes[victim] == -signal.SIGKILL
        for rank in set(range(world_size)) - {victim}:
            assert codes[rank] == 1, world.said(rank)
            said = world.said(rank).strip().splitlines()
            assert "another rank ended" in said[-1], said
            assert len(said) <= 9 and "Traceback" not in world.said(rank), said
    assert train(url, tmp_path / "run", world_size, changes) == [0] * world_size
    assert_same_run(tmp_path / "run", reference(strategy, world_size))


def record_rows(rank: int, folder: Path, stop_in: tuple[int, int] | None) -> None:
    """Log the row keys of the tensors that the model receives; SIGTERM rank 0 in a micro-batch."""
    from recipes import llama

    original = llama.PackedDecoder.forward
    log = open(folder / f"rows-{rank}.jsonl", "a", buffering=1)  # noqa: SIM115

    def forward(self: Any, batch: Any) -> torch.Tensor:
        if self.training:
            rows = [row for row in batch.rows.tolist() if row >= 0]
            log.write(json.dumps({"step": batch.step, "rank": rank, "rows": rows}) + "\n")
            if rank == 0 and (batch.step, batch.micro) == stop_in:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    llama.PackedDecoder.forward = forward  # type: ignore[method-assign]


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
        "step0", "t0", "batch", "micro_batch", "world_size", "ranks", "accumulation", "attempt",
        "seed", "data_digest",
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


def command(launcher: list[str], url: str, folder: Path) -> list[str]:
    """The run of `reference("fsdp", 2)` by a command line."""
    words = [sys.executable, "-m", *launcher, "--data.url", url, "--run", str(folder)]
    words += ["--precision=fp32", "--activation_checkpointing=full"]
    words += ["--model.hidden_size=48", "--model.num_layers=1", "--model.num_heads=4"]
    words += ["--model.num_kv_heads=2", "--model.intermediate_size=80"]
    words += ["--model.attention_dropout=0.1", "--model.residual_dropout=0.1"]
    words += ["--optim.lr=0.01", "--optim.warmup_steps=2", "--global_batch=8", "--micro_batch=2"]
    return [
        *words,
        *(f"--max_steps={STEPS}", "--log_every_steps=1", "--save_every_steps=5", "--val_rows=8"),
    ]


TORCHRUN = ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
TORCHRUN += ["--nproc-per-node=2", "-m", "--", "recipes.pretrain"]
LEYDEN = ["launch.cli", "train", "pretrain", "--nproc", "2", "--max-restarts", "0"]


def wait_until(true: Any, timeout_s: float, what: str) -> None:
    until = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > until:
            raise TimeoutError(f"{what} did not happen within {timeout_s} s")
        time.sleep(0.02)


def wait_ended(front: subprocess.Popen[str], folder: Path, victim: str) -> None:
    """Until no process carries the run's folder in its command line or environment."""
    within_s = ALL_END_WITHIN_S * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    until = time.monotonic() + within_s
    while front.poll() is None or processes_of(str(folder)):
        if time.monotonic() > until:
            left = [(pid, words_of(pid)[:6]) for pid in processes_of(str(folder))]
            raise TimeoutError(f"{within_s:.0f} s after {victim} there are still {left}")
        time.sleep(0.05)


def words_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def rank_of(pid: int) -> int:
    """The rank that the process was started as; -1 for a launcher."""
    for item in Path(f"/proc/{pid}/environ").read_text().split("\0"):
        if item.startswith("RANK="):
            return int(item.removeprefix("RANK="))
    return -1


def hit(victim: str, front: subprocess.Popen[str], family: list[int]) -> None:
    """Kill one process of a launch, or press Ctrl-C in its terminal."""
    if victim == "ctrl-c":
        os.killpg(front.pid, signal.SIGINT)
        return
    if victim == "front":
        front.kill()
        return
    found = [
        pid
        for pid in family
        if (victim == f"rank {rank_of(pid)}" and not watches(pid))
        or (victim == "agent" and rank_of(pid) < 0 and "launch.agent" in words_of(pid))
    ]
    assert len(found) == 1, (victim, [words_of(pid) for pid in family])
    os.kill(found[0], signal.SIGKILL)


@pytest.mark.timeout(600)
def test_whatever_is_killed_nothing_of_the_run_is_left(
    dataset: Dataset, reference: Any, tmp_path: Path
) -> None:
    """Ranks that outlive their agent, or an agent that outlives `leyden train`, train on beside
    the restart, or hold its lease. One run is killed in every way, and is exact all the same."""
    url, folder = dataset.storage.url, tmp_path / "run"
    consumed = folder / "consumed.jsonl"
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills = [
        (TORCHRUN, "front", (-9,)), (TORCHRUN, "rank 1", (1,)), (LEYDEN, "rank 0", (1, 137)),
        (LEYDEN, "agent", (137,)), (LEYDEN, "front", (-9,)), (LEYDEN, "ctrl-c", (75,)),
    ]  # fmt: skip
    for number, (launcher, victim, codes) in enumerate(kills):
        front = subprocess.Popen(
            command(launcher, url, folder), cwd=ROOT, env=env, start_new_session=True, **pipes
        )
        try:
            wait_until(
                lambda number=number: consumed.exists()
                and lines(folder, consumed.name)[-1]["attempt"] == number,
                150, f"the first step of attempt {number}",
            )  # fmt: skip
            family = processes_of(str(folder))
            assert len(family) >= 3, "the front or agent and two ranks carry the run's folder"
            hit(victim, front, family)
            wait_ended(front, folder, victim)
            output, _ = front.communicate(timeout=15)
            assert front.returncode in codes, (victim, front.returncode, output)
            if victim.startswith("rank") and launcher is LEYDEN:
                assert "another rank ended" in output and "Traceback" not in output, output
        finally:
            for pid in processes_of(str(folder)):
                kill(pid)
            front.wait()
    assert train(url, folder, 2, {"strategy": "fsdp"}) == [0, 0]
    assert_same_run(folder, reference("fsdp", 2))
