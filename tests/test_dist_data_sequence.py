"""One sequence: any ranks, accumulation, interruptions and stages, every mode and kind of data.

What is compared are the rows as a model receives them, tensors of real loaders over real shards,
told apart by their bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist.batch_layout import batch_samples
from dist.dataset import Dataset, MixedDataset, mix
from dist.examples import as_rows
from dist.loader import Batch, LoaderPlan, TokenLoader
from dist.mixture import with_stage
from dist.order import OrderState
from dist.run_dir import RunDir
from dist.run_order import first_order
from dist.skips import SkippingOrder, Skips
from dist.windowed import block_rows_of
from tests.make_dataset import write_dataset
from tests.make_examples import write_examples

SEED = 11
Folders = dict[str, list[Dataset]]


@dataclass(frozen=True)
class Segment:
    """What an attempt of a run did until it ended, and its ranks."""

    world: int
    micro_batch: int
    batch: int
    steps: int
    read_on: int
    """Micro-batches of the next step that were read before the end; they do not count."""
    weights: tuple[int, int] | None
    """A new stage from its first sample on."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Of each kind datasets of one row a shard, of a few, and of some."""
    root = tmp_path_factory.mktemp("data")
    return {
        "packed_tokens": [
            write_dataset(root / f"p{n}", documents=n, num_train_shards=shards, seed=n, longest=20)
            for n, shards in ((1, 1), (3, 2), (9, 4))
        ],
        "examples": [
            write_examples(root / f"e{n}", num_examples=n, num_train_shards=shards, seed=n)
            for n, shards in ((1, 1), (3, 2), (9, 4))
        ],
    }


SEGMENTS = st.lists(
    st.builds(
        Segment, world=st.integers(1, 4), micro_batch=st.integers(1, 3), batch=st.integers(1, 9),
        steps=st.integers(0, 4), read_on=st.integers(0, 2),
        weights=st.none() | st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


def open_data(folders: Folders, what: str, sizes: list[int]) -> Dataset:
    kind, _, packing = what.partition(" ")
    parts = [as_rows(folders[kind][size], packing or "packed") for size in sizes]
    return parts[0] if len(parts) == 1 else mix(["a", "b"][: len(parts)], parts)


def state_of(dataset: Dataset, lanes: int, window: int) -> OrderState:
    """How a run begins."""
    state = OrderState(data_digest=dataset.data_digest, seed=SEED, batch=1)
    tables = [one.split("train").row_start for one in dataset.sources]
    if lanes:
        blocks = [block_rows_of(table, lanes, window) for table in tables]
        state = replace(state, mode="windowed", lanes=lanes, window=window, block_rows=blocks[0])
    if isinstance(dataset, MixedDataset):
        state = replace(state, stages=staged(dataset, state, [], [1] * len(tables)))
    return state


def staged(
    dataset: Dataset, state: OrderState, stages: list[Any], weights: list[int]
) -> list[dict[str, Any]]:
    """`stages` and another one from the state's sample on, with the blocks that a run keeps."""
    made = with_stage(stages, -(-state.t // max(state.lanes, 1)), weights)
    tables = [one.split("train").row_start for one in dataset.sources]
    if state.lanes:
        blocks = [block_rows_of(table, state.lanes, state.window) for table in tables]
        made = [{**stage, "blocks": blocks} for stage in made]
    return made


def run_segment(
    dataset: Dataset, state: OrderState, segment: Segment, seen: dict[int, bytes]
) -> OrderState:
    """Read a segment on each of its ranks; `seen` receives sample -> row as the model gets it."""
    order = SkippingOrder(first_order(RunDir("/none"), dataset, SEED, state, 0), Skips())
    step, t = state.step, state.t
    got: dict[int, list[bytes]] = {}
    for rank in range(segment.world):
        plan = LoaderPlan(
            batch=segment.batch, micro_batch=segment.micro_batch, rank=rank,
            world_size=segment.world, start_step=step, start_t=t,
        )  # fmt: skip
        with TokenLoader(dataset, dataset.split("train"), order, plan) as loader:
            left = segment.read_on
            for batch in loader:
                if batch.step >= step + segment.steps:
                    if left == 0:
                        break
                    left -= 1
                    continue
                got.setdefault(batch.step, []).extend(keys_of(batch))
    for n in range(segment.steps):
        t1 = t + segment.batch
        samples = batch_samples(order, t, t1).tolist()
        seen |= dict(zip(samples, got[step + n], strict=True))
        t = t1
    return replace(state, step=step + segment.steps, t=t, batch=segment.batch)


def keys_of(batch: Batch) -> list[bytes]:
    """Each row as the model receives it: tokens, and which targets are trained."""
    pairs = zip(batch.tokens, batch.valid, batch.rows.tolist(), strict=True)
    return [
        tokens.numpy().tobytes() + valid.numpy().tobytes()
        for tokens, valid, row in pairs if row >= 0
    ]  # fmt: skip


def rows_of(dataset: Dataset) -> list[bytes]:
    """Every row of train in the order of the shards, by one loader that reads from end to end."""
    table = dataset.split("train")

    class AsTheyLie:
        def rows(self, t0: int, t1: int) -> tuple[Any, Any]:
            return self.at(np.arange(t0, t1))

        def at(self, t: Any) -> tuple[Any, Any]:
            return np.zeros_like(t), t

    plan = LoaderPlan(batch=1, micro_batch=1, end_t=table.num_rows)
    with TokenLoader(dataset, table, AsTheyLie(), plan) as loader:
        return [key for batch in loader for key in keys_of(batch)]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    what=st.sampled_from(["packed_tokens", "examples packed", "examples padded"]),
    sizes=st.lists(st.integers(0, 2), min_size=1, max_size=2),
    lanes=st.sampled_from([0, 1, 2, 4]), window=st.integers(1, 2), segments=SEGMENTS,
)  # fmt: skip
def test_any_history_gives_the_one_sequence(
    folders: Folders, what: str, sizes: list[int], lanes: int, window: int, segments: list[Segment]
) -> None:
    """A row dropped, doubled or moved by a number of ranks, an accumulation, a resume, a
    reweighting or a batch that was read ahead; a mask or a packing that follows the rank."""
    dataset = open_data(folders, what, sizes)
    state, seen = state_of(dataset, lanes, window), {}  # type: OrderState, dict[int, bytes]
    for segment in segments:
        if segment.weights and isinstance(dataset, MixedDataset):
            stages = staged(dataset, state, state.stages, list(segment.weights))
            state = replace(state, stages=stages)
        state = run_segment(dataset, state, segment, seen)
        state = OrderState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert sorted(seen) == list(range(state.t)), "a sample was left out"
    # As one process without an interruption that knew all stages from the start.
    whole = {}  # type: dict[int, bytes]
    first = replace(state, step=0, t=0)
    if state.t:
        run_segment(dataset, first, Segment(1, 64, state.t, 1, 0, None), whole)
    assert seen == whole
    epochs, rows = first_order(RunDir("/none"), dataset, SEED, state, 0).rows(0, state.t)
    keys = rows_of(dataset)
    assert [seen[t] for t in range(state.t)] == [keys[row] for row in rows.tolist()]
    # Every row exactly once per epoch and source.
    start = 0
    for source in dataset.sources:
        n = source.split("train").num_rows
        mine = (rows >= start) & (rows < start + n)
        for epoch in range(np.count_nonzero(mine) // n):
            here = np.flatnonzero(mine & (epochs == epoch)).tolist()
            assert Counter(seen[t] for t in here) == Counter(keys[start : start + n])
        start += n
