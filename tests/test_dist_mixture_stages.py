"""Runs on a mixture by their plans alone: any resumes, reweightings, added sources, switches to
derived versions and rollbacks, against the sources' own streams."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dist.batch_layout import batch_rows
from dist.mixed_order import MixedOrder
from dist.mixed_skips import RollbackRanges
from dist.mixture_stages import Standing, plan_stages
from dist.order import OrderState, rank_span
from dist.run_order import mixed_order
from dist.skips import SkippingOrder, Skips
from dist.source_versions import removed_of
from dist.sources import SourceConfig, StageConfig
from dist.windowed import OrderMode, block_rows_of, make_order

NAMES = ("web", "code", "new")
SIZES = st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=4), min_size=3, max_size=3)
SIZES = SIZES.filter(lambda all_of: all(sum(one) > 3 for one in all_of))


SEED = 7
CHANGES = ("none", "weights", "add", "switch", "older")


def weights_of(count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 4), min_size=count, max_size=count).filter(any)


@dataclass
class Simulated:
    """A run as its files would have it, and what its model met."""

    tables: list[Any]
    mode: OrderMode
    batch: int
    checkpoints: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    """States as JSON would give them back; the first is the start."""
    removed: dict[int, list[int]] = field(default_factory=dict)
    written: list[Any] = field(default_factory=list)
    rolled_back: set[tuple[int, int]] = field(default_factory=set)
    """(source, position of its own stream)."""
    met: list[tuple[int, int, int]] = field(default_factory=list)
    """(source, position of its own stream, attempt) of each sample t."""
    removed_in: list[dict[int, list[int]]] = field(default_factory=list)
    """Of each attempt."""
    known: int = 0

    def order_of(self, stages: list[dict[str, Any]]) -> MixedOrder:
        return mixed_order(self.tables, SEED, self.mode, stages)

    def attempt(
        self, weights: list[int], later: dict[int, list[int]], steps: int, world: int,
        spoiled: int | None,
    ) -> None:  # fmt: skip
        """Go on from the newest checkpoint; a checkpoint each step; perhaps a rollback."""
        at = Standing(**self.checkpoints[-1])
        self.known = max(self.known, len(weights))
        names = NAMES[: self.known]
        now = {name: float(one) for name, one in zip(names, weights, strict=True)}
        planned = [
            StageConfig(from_sample=t, weights=dict(zip(names, map(float, one), strict=True)))
            for t, one in later.items()
        ]
        sources = [SourceConfig(name=name, url="x", weight=one) for name, one in now.items()]
        data = SimpleNamespace(sources=sources, stages=planned)
        config = SimpleNamespace(global_batch=self.batch, data=data)
        tables = self.tables[: self.known]
        ranges = RollbackRanges(self.written, at.skipped, at.position, self.order_of)
        stages = plan_stages(
            names, config, self.mode, tables, at=at, removed=self.removed, ranges=ranges,
            order_of=self.order_of,
        )  # fmt: skip
        skipped = ranges.under(stages)
        assert removed_of(stages) == {s: sorted(rows) for s, rows in self.removed.items()}
        order = SkippingOrder(self.order_of(stages), Skips(skipped))
        derived = SkippingOrder(
            mixed_order(tables, SEED, self.mode, stages, derived=True), Skips(skipped)
        )
        number = len(self.removed_in)
        self.removed_in.append({s: list(rows) for s, rows in self.removed.items()})
        del self.met[at.t :]
        for step in range(steps):
            t0, t1 = at.t + step * self.batch, at.t + (step + 1) * self.batch
            self.met += [(s, p, number) for s, p in self.own(order, t0, t1)]
            self.check_batch(order, derived, t0, t1, world)
            if step == spoiled:
                p = order.skips.to_stream(np.array([t0, t1 - 1]))
                self.written.append(([int(p[0]), int(p[1]) + 1], stages))
                self.rolled_back |= {(s, p) for s, p, _ in self.met[t0:]}
                return
            state = {"t": t1, "stages": stages, "skipped": skipped}
            self.checkpoints.append(json.loads(json.dumps(state)))

    def next_rows(self, source: int, count: int) -> list[int]:
        """Rows of a source that come next after the newest checkpoint."""
        met = self.met[: self.checkpoints[-1].get("t", 0)]
        first = max([p + 1 for s, p, _ in met if s == source], default=0)
        return self.stream(source).at(np.arange(first, first + count))[1].tolist()

    def stream(self, source: int) -> Any:
        """A source's own order, with all of its rows."""
        own = replace(self.mode, block_rows=self.blocks()[source]) if self.mode.lanes else self.mode
        return make_order(self.tables[source], SEED, own, source)

    def own(self, order: SkippingOrder, t0: int, t1: int) -> list[tuple[int, int]]:
        """Which position of which source's stream each sample is, by its row: not by what the
        order itself says."""
        epochs, rows = order.rows(t0, t1)
        stream: MixedOrder = order.stream
        source = np.searchsorted(stream.row_offset, rows, side="right") - 1
        found = []
        for s, e, row in zip(source.tolist(), epochs.tolist(), rows.tolist(), strict=True):
            local = np.array([row - stream.row_offset[s]])
            found.append((s, int(self.stream(s).positions(local, e)[0])))
        return found

    def check_batch(
        self, order: SkippingOrder, derived: SkippingOrder, t0: int, t1: int, world: int
    ) -> None:
        """Ranks share the batch, and its rows in the derived versions are the same rows."""
        first, other = order.stream, derived.stream
        kept = []
        for s, table in enumerate(self.tables[: len(other.orders)]):
            gone = self.removed.get(s, [])
            kept.append(first.row_offset[s] + np.setdiff1d(np.arange(table[-1]), gone))
        to_first = np.concatenate(kept)
        size = t1 - t0
        assert np.array_equal(to_first[derived.rows(t0, t1)[1]], order.rows(t0, t1)[1])
        met: list[int] = []
        for rank in range(world):
            got = batch_rows(derived, t0, t1, *rank_span(size, rank, world))[1]
            whole = batch_rows(order, t0, t1, *rank_span(size, rank, world))[1]
            assert np.array_equal(to_first[got], whole)
            met += whole.tolist()
        assert sorted(met) == sorted(order.rows(t0, t1)[1].tolist())

    def check_all(self) -> None:
        """Each source's own stream came in its order, without what may be missing alone."""
        for s, table in enumerate(self.tables):
            own = [(p, attempt) for source, p, attempt in self.met if source == s]
            places = [p for p, _ in own]
            assert places == sorted(set(places)), f"source {s} repeats or jumps back"
            assert not {(s, p) for p in places} & self.rolled_back
            row_of = self.stream(s)
            expected, number = 0, 0
            for p, number in own:
                assert int(row_of.at(np.array([p]))[1][0]) not in self.removed_in[number].get(s, [])
                for missed in range(expected, p):
                    row = int(row_of.at(np.array([missed]))[1][0])
                    assert (s, missed) in self.rolled_back or row in self.removed_in[number].get(
                        s, []
                    ), f"row {row} of source {s} is skipped at {missed}"
                expected = p + 1
            assert int(table[-1]) > 0

    def blocks(self) -> list[int]:
        lanes, window = self.mode.lanes, self.mode.window
        return [block_rows_of(one, lanes, window) for one in self.tables] if lanes else []


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, lanes=st.sampled_from([0, 2, 4]), batch=st.integers(1, 12), data=st.data())
def test_any_story_meets_each_row_once(
    sizes: list[list[int]], lanes: int, batch: int, data: st.DataObject
) -> None:
    """A removal that begins at a unit instead of the sample, that is lost or made twice when a
    checkpoint of before it is resumed, or that shifts another source; rolled-back rows that come
    back as weights or versions change; a planned stage that drops the removal."""
    tables = [np.concatenate(([0], np.cumsum(one))) for one in sizes]
    mode = OrderMode(mode="windowed", lanes=lanes, window=1) if lanes else OrderMode()
    run = Simulated(tables, mode, batch)
    draw = data.draw
    weights = draw(weights_of(2), label="weights")
    for _ in range(draw(st.integers(2, 5), label="attempts")):
        change = draw(st.sampled_from(CHANGES), label="change")
        if change in ("weights", "add"):
            count = 3 if change == "add" else len(weights)
            weights = draw(weights_of(count), label="other weights")
        if change == "switch" and run.known:
            source = draw(st.integers(0, run.known - 1), label="source")
            had = run.removed.get(source, [])
            soon = [row for row in run.next_rows(source, 2 * max(lanes, 1)) if row not in had]
            left = [row for row in range(int(tables[source][-1])) if row not in had]
            pool = soon if soon and draw(st.booleans(), label="soon") else left
            if len(left) > 1:
                most = min(len(pool), len(left) - 1)
                gone = draw(st.sets(st.sampled_from(pool), min_size=1, max_size=most))
                run.removed[source] = sorted({*had, *gone})
        if change == "older" and len(run.checkpoints) > 1:
            del run.checkpoints[draw(st.integers(1, len(run.checkpoints) - 1), label="older") :]
        steps = draw(st.integers(1, 6), label="steps")
        later = {}
        if draw(st.booleans(), label="planned"):
            t = run.checkpoints[-1].get("t", 0) + draw(st.integers(1, 3 * batch))
            later[t] = draw(weights_of(len(weights)))
        spoiled = draw(st.none() | st.integers(0, steps - 1), label="spoiled")
        run.attempt(weights, later, steps, draw(st.integers(1, 4)), spoiled)
    run.attempt(weights, {}, 6, 1, None)
    run.check_all()


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, lanes=st.sampled_from([0, 2, 4]), batch=st.integers(1, 6), data=st.data())
def test_an_interruption_at_any_step_changes_nothing(
    sizes: list[list[int]], lanes: int, batch: int, data: st.DataObject
) -> None:
    """A run that stops just where a stage begins, and goes on with other rows: as a rollback left
    out the stage's first samples, or as the stage says what held before."""
    tables = [np.concatenate(([0], np.cumsum(one))) for one in sizes]
    mode = OrderMode(mode="windowed", lanes=lanes, window=1) if lanes else OrderMode()
    run, draw = Simulated(tables, mode, batch), data.draw
    weights = draw(weights_of(2), label="weights")
    # Mostly at steps, as from_step says; now and then what holds already.
    places = st.integers(1, 8).map(lambda step: step * batch) | st.integers(1, 8 * batch)
    after = weights_of(2) | st.just([2 * one for one in weights])
    later = draw(st.dictionaries(places, after, max_size=3), label="later")
    spoiled = draw(st.integers(0, 6), label="spoiled")
    run.attempt(weights, later, 8, 1, spoiled)
    kept = draw(st.integers(1, len(run.checkpoints)), label="kept")
    del run.checkpoints[kept:]
    run.attempt(weights, later, 8, 1, None)
    whole, states = [one[:2] for one in run.met], list(run.checkpoints)
    for stop in range(kept, len(states)):
        run.checkpoints = states[:stop]
        run.attempt(weights, later, len(states) - stop, 1, None)
        assert [one[:2] for one in run.met] == whole, f"stopped at {states[stop - 1]}"


def test_changes_within_one_unit_leave_none() -> None:
    """Other weights and back within a unit of lanes: a pattern begun anew, unless it is resumed."""
    mode = OrderMode(mode="windowed", lanes=4, window=1)
    tables = [np.array([0, 9, 20, 31]), np.array([0, 8, 17])]
    for later in ({10: [1, 2], 12: [3, 1]}, {5: [3, 1], 6: [1, 1], 7: [3, 1], 30: [1, 1]}):
        run = Simulated(tables, mode, batch=2)
        run.attempt([3, 1], later, 16, 1, None)
        whole, states = [one[:2] for one in run.met], list(run.checkpoints)
        assert [stage["unit"] for stage in states[-1]["stages"]] == [0, 8][: 1 + (30 in later)]
        for stop in range(1, len(states)):
            run.checkpoints = states[:stop]
            run.attempt([3, 1], later, len(states) - stop, 1, None)
            assert [one[:2] for one in run.met] == whole


def test_a_removal_begins_in_the_middle_of_a_unit() -> None:
    """A removal from the next whole unit on: the derived version lacks rows that still come."""
    for first in range(1, 6):
        mode = OrderMode(mode="windowed", lanes=4, window=1)
        tables = [np.array([0, 9, 20, 31]), np.array([0, 8, 17])]
        run = Simulated(tables, mode, batch=5)
        run.attempt([1, 2], {}, first, 2, None)
        for source in (0, 1):
            run.removed[source] = run.next_rows(source, 3)
        run.attempt([1, 2], {}, 10, 3, None)
        run.check_all()
        # The weights are as if nothing had been removed.
        sources = [source for source, _, _ in run.met]
        for n in range(4, len(sources), 4):
            assert abs(sources[:n].count(0) / 4 - n / 4 / 3) <= 1


def test_a_rank_keeps_its_lanes_when_rows_are_removed() -> None:
    """Lanes counted over the mixed stream: after a removal each rank reads shards of all lanes."""
    tables = [np.arange(0, 100, 7), np.arange(0, 120, 9)]
    mode = OrderMode(mode="windowed", lanes=4, window=1)
    run = Simulated(tables, mode, batch=16)
    run.attempt([1, 1], {}, 2, 2, None)
    run.removed[1] = run.next_rows(1, 3)
    run.attempt([1, 1], {}, 6, 2, None)
    stages, moved = run.checkpoints[-1]["stages"], False
    for skips in (Skips(), Skips([[40, 43]])):
        order = SkippingOrder(run.order_of(stages), skips)
        for t0 in range(0, 160, 16):
            t = order.layout(t0, t0 + 16)
            assert sorted(t.tolist()) == list(range(t0, t0 + 16))
            lanes = [p % 4 for _, p in (run.own(order, one, one + 1)[0] for one in t.tolist())]
            assert lanes == sorted(lanes)
            moved |= (t % 4).tolist() != lanes
    assert moved


def test_a_state_with_removals_is_small() -> None:
    """Positions of every epoch in the state, which is written with every checkpoint."""
    tables = [np.array([0, 1000]), np.array([0, 50])]
    run = Simulated(tables, OrderMode(), batch=8)
    run.attempt([1, 3], {}, 2, 1, None)
    for removed in ([4, 5, 900], [4, 5, 17, 900]):
        run.removed[0] = removed
        run.attempt([1, 3], {}, 1000, 1, None)
    stages = run.checkpoints[-1]["stages"]
    state = OrderState(data_digest="d" * 64, seed=1, t=10**12, batch=4096, stages=stages)
    assert len(json.dumps(state.to_dict())) <= 1024 + 64 * 2 * len(stages)
    assert [rows for _, _, rows in stages[0]["removed"]] == [[4, 5, 900], [17]]
