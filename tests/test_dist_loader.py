"""dist/loader.py: which rows, which targets, on any number of ranks, and how it fails."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

from dist.agreement import Agreement
from dist.batch_layout import StepRows, Steps
from dist.dataset import Dataset, open_dataset
from dist.errors import DataRefused
from dist.loader import (
    GATHERED_STEPS,
    Batch,
    LoaderPlan,
    TokenLoader,
    planned_shards,
)
from dist.mesh import PeerFailed, host_group
from dist.order import Order, SequentialOrder
from dist.step_gather import STEPS_TOGETHER, StepGatherer
from dist.verify import ShardVerifier
from tests.make_dataset import flip_byte, write_dataset
from tests.run_ranks import run_ranks

SEQ_LEN = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), seq_len=SEQ_LEN, with_tokenizer=False)


def make_loader(dataset: Dataset, plan: LoaderPlan, split: str = "train") -> TokenLoader:
    table = dataset.split(split)
    order = Order(table.num_rows, 3) if split == "train" else SequentialOrder(table.num_rows)
    return TokenLoader(dataset, table, order, plan)


def rows_of(batches: list[Batch]) -> list[int]:
    return [row for batch in batches for row in batch.rows.tolist() if row >= 0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_any_world_size_reads_the_same_step(dataset: Dataset, world_size: int, batch: int) -> None:
    """A dropped tail row on the last rank, or ranks with unequal numbers of micro-batches (a
    hang in training), would show here."""
    order = Order(dataset.split("train").num_rows, 3)
    steps: dict[int, list[int]] = {}
    counts = []
    for rank in range(world_size):
        plan = LoaderPlan(batch=batch, micro_batch=2, rank=rank, world_size=world_size, end_step=4)
        with make_loader(dataset, plan) as loader:
            batches = list(loader)
        assert len(batches) == len(loader)
        counts.append([(b.step, b.micro, b.num_micro, b.t0, b.t1) for b in batches])
        for b in batches:
            steps.setdefault(b.step, []).extend(rows_of([b]))
    assert all(count == counts[0] for count in counts)
    for step in range(4):
        expected = order.rows(step * batch, (step + 1) * batch)[1].tolist()
        assert steps[step] == expected


def test_validation_reads_every_row_and_target_once(dataset: Dataset) -> None:
    """A short last batch that is dropped or repeated would bias the validation loss."""
    table = dataset.split("validation")
    rows, targets = [], 0
    for rank in range(3):
        plan = LoaderPlan(batch=8, micro_batch=2, rank=rank, world_size=3, end_t=table.num_rows)
        with make_loader(dataset, plan, "validation") as loader:
            for _ in range(2):  # a second pass must be equal to the first
                batches = list(loader)
                assert len(batches) == len(loader)
        rows += rows_of(batches)
        targets += sum(int(b.valid.sum()) for b in batches)
    assert sorted(rows) == list(range(table.num_rows))
    assert targets == dataset.manifest.totals["validation"]["targets"]


def test_starting_late_gives_what_an_early_start_would(dataset: Dataset) -> None:
    """A resumed run that repeats or skips a sample would show here."""
    with make_loader(dataset, LoaderPlan(batch=5, micro_batch=2, end_step=9)) as whole:
        early = [b for b in whole if b.step >= 6]
    plan = LoaderPlan(batch=5, micro_batch=2, start_step=6, start_t=30, end_step=9)
    with make_loader(dataset, plan) as late:
        batches = list(late)
        assert len(late) == len(whole)  # Lightning counts from the run's beginning
    assert [(b.step, b.micro, b.t0) for b in batches] == [(b.step, b.micro, b.t0) for b in early]
    for ours, theirs in zip(batches, early, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.rows, theirs.rows)


def test_padding_rows_weigh_nothing(dataset: Dataset) -> None:
    """7 rows on 2 ranks in micro-batches of 2: the padded row must hold no valid target."""
    plan = LoaderPlan(batch=7, micro_batch=2, rank=0, world_size=2, end_step=1)
    with make_loader(dataset, plan) as loader:
        last = list(loader)[-1]
    padding = last.rows == -1
    assert padding.any() and not last.valid[padding].any()
    assert last.tokens.dtype == torch.uint16


def test_a_flipped_byte_is_never_delivered(tmp_path: Path) -> None:
    """Damage must surface in the consumer as DataRefused, before a row of the shard."""
    dataset = write_dataset(tmp_path / "d", seq_len=SEQ_LEN, num_train_shards=1)
    table = dataset.split("train")
    flip_byte(dataset.shard_path(table.shards[0]), 1000)
    verifier = ShardVerifier(dataset, table, tmp_path / "stamps")
    plan = LoaderPlan(batch=2, micro_batch=2, end_step=3)
    order = Order(table.num_rows, 0)
    with (
        TokenLoader(dataset, table, order, plan, verifier=verifier) as loader,
        pytest.raises(DataRefused, match=table.shards[0].xxh3_128),
    ):
        next(iter(loader))


def test_damage_fails_its_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are gathered together: one that cannot be read must not take good ones with it, or a
    run dies up to 16 steps before the damage, and a bundle is made of the wrong one."""
    dataset = write_dataset(tmp_path / "d", seq_len=SEQ_LEN, num_train_shards=6)
    table = dataset.split("train")
    plan = LoaderPlan(batch=3, micro_batch=2, end_t=table.num_rows)
    order, damaged = SequentialOrder(table.num_rows), len(table.shards) - 1
    flip_byte(dataset.shard_path(table.shards[damaged]), 1000)
    together: list[int] = []
    begin = StepGatherer._begin

    def counted(self: StepGatherer, steps: list[StepRows], plan: Steps) -> Any:
        together.append(len(steps))
        return begin(self, steps, plan)

    monkeypatch.setattr(StepGatherer, "_begin", counted)
    verifier, seen = ShardVerifier(dataset, table, tmp_path / "stamps"), list[Batch]()
    with (
        TokenLoader(dataset, table, order, plan, verifier=verifier) as loader,
        pytest.raises(DataRefused, match=table.shards[damaged].xxh3_128),
    ):
        seen.extend(loader)
    assert max(together) > 1
    whole = int(table.row_start[damaged]) // 3
    assert [one.step for one in seen if one.ends_step] == list(range(whole))


@pytest.mark.parametrize("agree", [None, Agreement(None)])
def test_leaving_early_ends_the_threads(dataset: Dataset, agree: Agreement | None) -> None:
    """A consumer that breaks off must not leave a thread waiting for room."""
    table, plan = dataset.split("train"), LoaderPlan(batch=4, micro_batch=2)
    loader = TokenLoader(dataset, table, Order(table.num_rows, 0), plan, agree=agree)
    iterator = iter(loader)
    next(iterator)
    expected = {"gather"} if agree is None else {"gather", "agree"}
    names = {thread.name for thread in threading.enumerate()}
    assert names & {"gather", "agree"} == expected
    loader.close()
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"gather", "agree", "copy"}
    assert list(iterator) == []


def test_a_script_that_forgets_to_close_ends_well(dataset: Dataset) -> None:
    """A thread that gathers while the interpreter ends aborts the process, once in ten times."""
    script = f"""
import atexit, threading
names = {{"gather", "agree", "copy"}}
left = lambda: names & {{one.name for one in threading.enumerate()}}
atexit.register(lambda: print("at the end:", left()))  # first registered, called last
from dist.agreement import Agreement
from dist.dataset import open_dataset
from dist.loader import LoaderPlan, TokenLoader
from dist.order import Order
dataset = open_dataset({dataset.storage.url!r})
table = dataset.split("train")
plan = LoaderPlan(batch=4, micro_batch=4)
loaders = [
    TokenLoader(dataset, table, Order(table.num_rows, 0), plan, agree=agree)
    for agree in (None, Agreement(None))
]
batches = [next(iter(loader)) for loader in loaders]
print("meanwhile:", sorted(left()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    said = (done.returncode, done.stdout.splitlines(), done.stderr)
    assert said == (0, ["meanwhile: ['agree', 'gather']", "at the end: set()"], "")


def test_asked_twice_before_the_first_batch_starts_one_thread(dataset: Dataset) -> None:
    """Lightning calls iter() once only to see that it works. A second thread brings its own
    all-reduces into the group of the first, and a slow rank then pairs the targets of two steps:
    a wrong loss scale, once in five resumes on a busy machine."""

    class Counted(Agreement):
        steps = 0

        def step(self, targets: int, stop: bool, failure: BaseException | None) -> tuple[int, bool]:
            Counted.steps += 1
            return super().step(targets, stop, failure)

    table = dataset.split("train")
    plan = LoaderPlan(batch=4, micro_batch=4, end_step=5)
    loader = TokenLoader(dataset, table, Order(table.num_rows, 3), plan, agree=Counted(None))
    with loader:
        iter(loader)
        assert [batch.step for batch in loader] == list(range(5))
    assert Counted.steps == 5


@pytest.mark.parametrize("agree", [None, Agreement(None)])
def test_a_stop_request_ends_after_an_agreed_step(
    dataset: Dataset, agree: Agreement | None
) -> None:
    """The step that all ranks stop after is in the data, so that none goes on alone."""
    table = dataset.split("train")
    asked = iter([False, False, True])
    loader = TokenLoader(
        dataset, table, Order(table.num_rows, 0), LoaderPlan(batch=2, micro_batch=1),
        agree=agree, stop_requested=lambda: next(asked),
    )  # fmt: skip
    with loader:
        found = [(b.step, b.stop) for b in loader]
    assert found == [(0, False), (0, False), (1, False), (1, False), (2, True), (2, True)]


def test_rows_are_gathered_while_the_consumer_computes(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is slow for some milliseconds would be waited for in each small step, were the
    next step gathered only when it is asked for; without a bound all of the data would be."""
    gathered: list[int] = []
    begin = StepGatherer._begin

    def counted(self: StepGatherer, steps: list[StepRows], plan: Steps) -> Any:
        gathered.extend(one.step for one in steps)
        return begin(self, steps, plan)

    monkeypatch.setattr(StepGatherer, "_begin", counted)
    table = dataset.split("train")
    plan = LoaderPlan(batch=4, micro_batch=4)
    loader = TokenLoader(dataset, table, Order(table.num_rows, 3), plan, agree=Agreement(None))
    with loader:
        next(iter(loader))
        deadline = time.monotonic() + 20
        while len(gathered) < GATHERED_STEPS and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
    # What waits, one that is agreed on, one that was taken, one waiting; and those that find no
    # room, as many as were gathered together, with the next ones begun.
    assert GATHERED_STEPS <= len(gathered) <= GATHERED_STEPS + 2 * STEPS_TOGETHER + 3
    assert gathered == list(range(len(gathered)))


def test_planned_shards_lists_each_once_in_order_of_use(dataset: Dataset) -> None:
    """Verification ahead of use is worthless in another order."""
    table = dataset.split("train")
    order = Order(table.num_rows, 3)
    planned = planned_shards(table, order, 10, 6)
    first = table.locate(order.rows(10, 11)[1])[0][0]
    assert planned[0] == first and sorted(planned) == list(range(len(table.shards)))


def agree_on_ranks(root: str) -> tuple[list[tuple[int, int, bool]], int, str]:
    """Run one loader a rank; rank 1 asks to stop at its third step."""
    dataset = open_dataset(root)
    table = dataset.split("train")
    rank = torch.distributed.get_rank()
    calls = iter(range(100))
    plan = LoaderPlan(batch=6, micro_batch=2, rank=rank, world_size=2)
    agree = Agreement(host_group())
    loader = TokenLoader(
        dataset, table, Order(table.num_rows, 0), plan, agree=agree,
        stop_requested=lambda: next(calls) == 2 and rank == 1,
    )  # fmt: skip
    with loader:
        batches = list(loader)
    seen = [(b.step, b.step_targets, b.stop) for b in batches if b.ends_step]
    # Then rank 1 fails: the other must hear of it and not wait for ever.
    failure = DataRefused("damaged") if rank == 1 else None
    try:
        agree.step(1, False, failure)
        heard = ""
    except PeerFailed as error:
        heard = f"{error.exit_code}: {error}"
    return seen, sum(int(b.valid.sum()) for b in batches), heard


def test_ranks_agree_on_targets_stop_and_failure(dataset: Dataset) -> None:
    """Each rank normalising by its own targets, or stopping alone, would show here."""
    zero, one = run_ranks(agree_on_ranks, 2, 240, dataset.storage.url)
    assert zero[0] == one[0]
    assert [(step, stop) for step, _, stop in zero[0]] == [(0, False), (1, False), (2, True)]
    assert sum(targets for _, targets, _ in zero[0]) == zero[1] + one[1]
    assert one[2] == "" and zero[2].startswith("3: ")
