"""dist/micro_batch.py and its callback: the largest that fits, agreed, kept, without a trace."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from hypothesis import given, settings
from hypothesis import strategies as st

from dist.checkpoint import find_checkpoint
from dist.dataset import Dataset
from dist.errors import ConfigError, SetupError
from dist.initialise import materialise
from dist.micro_batch import PeakBytes, available_bytes, check_micro_batch, find_micro_batch
from dist.sharding import without_gradient_sync, wrap_ddp
from recipes import llama
from tests.make_dataset import write_dataset
from tests.run_ranks import run_ranks
from tests.test_dist_attention import CONFIG, SCHEMA, packed_and_padded
from tests.test_dist_lightning_plugins import lines, pretrain

CPU = torch.device("cpu")


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 200),
    fixed=st.integers(0, 50),
    per_row=st.integers(1, 20),
    budget=st.integers(0, 1000),
)
def test_the_fewest_and_evenest_micro_batches_that_fit(
    rows: int, fixed: int, per_row: int, budget: int
) -> None:
    """More micro-batches than needed, or one that does not fit, or a trial far beyond memory."""
    tried = []

    def trial(size: int) -> int | None:
        tried.append(size)
        bytes_ = fixed + per_row * size
        return None if bytes_ > budget else bytes_

    if fixed + per_row > budget:
        with pytest.raises(SetupError, match="not even one row"):
            find_micro_batch(rows, trial, budget)
        return
    found = find_micro_batch(rows, trial, budget)
    largest = min(rows, (budget - fixed) // per_row)
    assert found.rows == math.ceil(rows / math.ceil(rows / largest))
    assert found.peak_bytes <= budget
    # Two sizes tell the line: nothing is tried after them that cannot fit.
    assert max(tried) <= max(largest, 2)


def agreed() -> int:
    """Rank 1 has less memory than rank 0."""
    rank = torch.distributed.get_rank()
    return find_micro_batch(8, lambda size: size * (10 + 5 * rank), budget=100 - 30 * rank).rows


def test_ranks_agree_on_the_least() -> None:
    """Ranks with other accumulations would wait for each other for ever."""
    # 70 bytes for all, 15 bytes a row on the larger rank.
    assert run_ranks(agreed, 2, 240) == [4, 4]


def out_of_memory_on_one_rank() -> int:
    rank = torch.distributed.get_rank()

    def trial(size: int) -> int | None:
        return None if rank == 1 and size > 2 else 0

    return find_micro_batch(8, trial, budget=100).rows


def test_memory_that_ran_out_on_one_rank_counts_for_all() -> None:
    """The others would go on to the next size alone."""
    assert run_ranks(out_of_memory_on_one_rank, 2, 240) == [2, 2]


def test_peak_counts_what_lives_at_once() -> None:
    """A sum of all allocations, views counted twice, tensors that never die: all mislead."""
    with PeakBytes() as tracker:
        a = torch.zeros(1000)
        b = a + 1
        view = b.view(10, 100).t()
        del a
        c = torch.empty(500)
        c.untyped_storage().resize_(0)
        d = torch.ones(250)
    assert tracker.peak == 8000 and tracker.now == 4 * (1000 + 250)
    del b, view, c, d
    assert tracker.now == 0


def test_available_memory_is_the_cgroups_where_it_is_less(tmp_path: Path) -> None:
    """In a container of 1 GiB on a host of 1 TiB, the host's number gets the run killed."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 4000 kB\nMemAvailable:    3000 kB\n")
    assert available_bytes(tmp_path / "none", meminfo) == 3000 * 1024
    group = tmp_path / "v2"
    group.mkdir()
    (group / "memory.current").write_text("1024\n")
    for limit, expected in (("max\n", 3000 * 1024), ("2048\n", 1024), ("512\n", 0)):
        (group / "memory.max").write_text(limit)
        assert available_bytes(group, meminfo) == expected


def test_impossible_values_are_refused() -> None:
    """A micro-batch of 0 divides by zero in the middle of a start."""
    check_micro_batch("auto", "fsdp")
    for value, strategy in ((0, "ddp"), ("auto", "deepspeed")):
        with pytest.raises(ConfigError, match="micro_batch"):
            check_micro_batch(value, strategy)  # type: ignore[arg-type]


def train(url: str, folder: str, changes: dict[str, Any], budget: int) -> int:
    """The recipe, on ranks that may use `budget` bytes."""
    import dist.micro_batch_callback

    dist.micro_batch_callback.budget_bytes = lambda device, local_ranks: budget
    return pretrain(url, folder, activation_checkpointing="none", **changes)


def accumulations(folder: Path) -> list[int]:
    return [line["accumulation"] for line in lines(folder, "order.jsonl")]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), with_tokenizer=False)


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_auto_trains_as_if_its_number_had_been_given(
    dataset: Dataset, tmp_path: Path, strategy: str
) -> None:
    """A trial that leaves a moment, a random number or a moved weight behind; another global
    batch; a resumed run that finds another number: each would change a bit."""
    url, budget = dataset.storage.url, 10**9
    auto, given = tmp_path / "auto", tmp_path / "given"
    changes: dict[str, Any] = {"strategy": strategy, "max_steps": 4, "save_every_steps": 2}
    changes["global_batch"] = 16
    # Room for a few rows of the 8: what two rows took in a first look says how many.
    look = tmp_path / "look"
    assert run_ranks(train, 2, 240, url, str(look), {**changes, "micro_batch": "auto"}, budget)
    (peak,) = {one["peak_bytes"] for one in recorded(look).values()}
    assert accumulations(look) == [1]
    run_ranks(train, 2, 240, url, str(auto), {**changes, "micro_batch": "auto"}, int(peak * 0.7))
    (found,) = recorded(auto).values()
    assert 1 <= found["rows"] < 8 and found["peak_bytes"] <= int(peak * 0.7)
    run_ranks(train, 2, 240, url, str(given), {**changes, "micro_batch": found["rows"]}, 0)
    assert accumulations(auto) == accumulations(given) == [math.ceil(8 / found["rows"])]
    for one, other in zip(*(lines(f, "metrics.jsonl") for f in (auto, given)), strict=True):
        assert one.get("loss") == other.get("loss")
    one, other = weights(auto), weights(given)
    assert one == other
    # Kept by the next start, though there is room for more now.
    more = {**changes, "micro_batch": "auto", "max_steps": 6}
    assert run_ranks(train, 2, 240, url, str(auto), more, budget) == [0, 0]
    assert len(set(accumulations(auto))) == 1 and len(accumulations(auto)) == 2


def recorded(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "micro_batch.json").read_text()))


def weights(folder: Path) -> dict[str, bytes]:
    found, _ = find_checkpoint(folder / "checkpoints")
    assert found is not None
    return {p.name: p.read_bytes() for p in found.glob("*.distcp")}


def ddp_reductions() -> list[int]:
    """Buckets that DDP reduces in a backward without and with synchronisation."""
    calls: list[int] = []

    def count(state: Any, bucket):  # type: ignore[no-untyped-def]  # DDP checks annotations
        calls.append(1)
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    net = llama.build(CONFIG, SCHEMA)
    materialise(net, CPU, 0, 0.02)
    model = wrap_ddp(net, CPU)
    model.register_comm_hook(None, count)
    batch, _ = packed_and_padded()
    with without_gradient_sync(model):
        model(batch).backward()
    without = len(calls)
    model(batch).backward()
    return [without, len(calls) - without]


def test_ddp_does_not_reduce_within_an_accumulation() -> None:
    """A reduction every micro-batch gives right gradients and wastes the network."""
    for without, with_sync in run_ranks(ddp_reductions, 2, 240):
        assert without == 0 and with_sync >= 1
