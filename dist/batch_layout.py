"""How a batch lies before it is cut for the ranks: by sample, or lane by lane.

An order of lanes (`lanes` above 1; dist/windowed.py) says by `layout(t0, t1)` in which order ranks
take a batch's samples, so that a rank reads few shards. The samples of a step are the same.
Whoever asks which rank has a row - loader, audit, replay, bundle - asks here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dist.order import rank_span

I64 = NDArray[np.int64]
_ROWS_AT_ONCE, _STEPS_AT_ONCE = 4096, 256


def lane_by_lane(t: I64, p: I64, lanes: int) -> I64:
    """Samples t (k,), which stand at positions p (k,) of the stream, lane by lane."""
    return t[np.argsort(p % lanes, kind="stable")]


def batch_samples(order: Any, t0: int, t1: int) -> I64:
    """The samples of a batch [t0, t1) in the order in which rank_span cuts it."""
    if getattr(order, "lanes", 1) > 1:
        return order.layout(t0, t1)
    return np.arange(t0, t1, dtype=np.int64)


def batch_rows(order: Any, t0: int, t1: int, lo: int, hi: int) -> tuple[I64, I64]:
    """(epoch, row) at places [lo, hi) of the batch [t0, t1), two (hi - lo,) arrays."""
    if getattr(order, "lanes", 1) > 1:
        return order.at(order.layout(t0, t1)[lo:hi])
    return order.rows(t0 + lo, t0 + hi)


class Steps(Protocol):
    """What of a loader's plan says which rows a rank takes, and in which micro-batches:
    LoaderPlan."""

    @property
    def micro_batch(self) -> int: ...

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def steps(self) -> Iterator[tuple[int, int, int]]: ...

    def num_micro(self, rows: int) -> int: ...


class StepRows(NamedTuple):
    """What a rank takes in a step, whose samples are t0 <= t < t1."""

    step: int
    t0: int
    t1: int
    rows: I64
    """(k,) its rows of the split."""


class RowsAhead:
    """The rows of a rank in each step of a plan, worked out for thousands of samples at a time.

    An order is a few dozen numpy calls whatever it is asked for: at 64 rows a step they cost 2 to
    10 microseconds a row, at 4096 they cost 0.1 to 0.3.
    """

    def __init__(self, order: Any, plan: Steps) -> None:
        self._order, self._plan = order, plan
        self._steps = plan.steps()
        self._ahead: deque[StepRows] = deque()

    def take(
        self, most: int, may_follow: Callable[[StepRows], bool] = lambda _: True
    ) -> list[StepRows]:
        """The next steps, equally long ones, `most` at most; [] at the end of the plan.

        may_follow: whether a step may come with the one before it.
        """
        if not self._ahead:
            self._work_out()
        taken: list[StepRows] = []
        while self._ahead and len(taken) < most:
            one = self._ahead[0]
            if taken and one.t1 - one.t0 != taken[0].t1 - taken[0].t0:
                break
            if taken and not may_follow(one):
                break
            taken.append(self._ahead.popleft())
        return taken

    def _work_out(self) -> None:
        steps, samples, count = [], [], 0
        for step, t0, t1 in self._steps:
            lo, hi = rank_span(t1 - t0, self._plan.rank, self._plan.world_size)
            if getattr(self._order, "lanes", 1) > 1:
                samples.append(self._order.layout(t0, t1)[lo:hi])
            else:
                samples.append(np.arange(t0 + lo, t0 + hi, dtype=np.int64))
            steps.append((step, t0, t1))
            count += hi - lo
            # A rank may have no row in a step, and a plan no last one.
            if count >= _ROWS_AT_ONCE or len(steps) == _STEPS_AT_ONCE:
                break
        if steps:
            rows = self._order.at(np.concatenate(samples))[1]
            ends = np.cumsum([len(one) for one in samples])
            parts = np.split(rows, ends[:-1])
            self._ahead.extend(
                StepRows(*step, part) for step, part in zip(steps, parts, strict=True)
            )


def batch_places(order: Any, t0: int, t1: int) -> I64:
    """The place of each sample t0 <= t < t1 in its batch: the inverse of batch_samples."""
    places = np.empty(t1 - t0, np.int64)
    places[batch_samples(order, t0, t1) - t0] = np.arange(t1 - t0)
    return places


def shards_ahead(
    order: Any, row_start: I64, batches: Sequence[tuple[int, int]], share: tuple[int, int, int]
) -> list[int]:
    """Shards that some ranks need for these batches [t0, t1), in order of first use.

    share: (first rank, one past the last, ranks in all), such as the ranks of a node.
    """
    first, end, world = share
    rows = [np.empty(0, np.int64)]
    for t0, t1 in batches:
        lo, hi = first * (t1 - t0) // world, end * (t1 - t0) // world
        rows.append(batch_rows(order, t0, t1, lo, hi)[1])
    found = np.searchsorted(row_start, np.concatenate(rows), side="right") - 1
    shards, at = np.unique(found, return_index=True)
    return [int(shard) for shard in shards[np.argsort(at)]]
