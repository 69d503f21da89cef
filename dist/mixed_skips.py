"""What rollbacks of a mixture left out, found again after its stages have changed.

A rollback writes down positions of the mixed stream as it was then. Weights or a source's version
that change before such a position is reached move other rows there; the rows that must not be met
again are found by their sources' own streams, which nothing moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dist.mixed_order import MixedOrder
from dist.mixture import NEVER
from dist.run_dir import RunDir
from dist.skips import SKIPPED, merge_ranges, read_skipped

Stages = list[dict[str, Any]]
Ranges = list[list[int]]


class RollbackRanges:
    """The ranges of a run that stands at a position, under any stages from there on."""

    def __init__(
        self, written: Sequence[tuple[Sequence[int], Stages]], behind: Sequence[Sequence[int]],
        position: int, order_of: Callable[[Stages], MixedOrder],
    ) -> None:  # fmt: skip
        """written: ranges [p0, p1) of rollbacks, each with the stages of its attempt ([]: not
        known, so it stays). behind: as the checkpoint's state has them; what lies before
        `position` stays so."""
        self._written = list(written)
        self._behind = [[p0, min(p1, position)] for p0, p1 in behind]
        self._position, self._order_of = position, order_of

    @classmethod
    def of(
        cls, run: RunDir, behind: Sequence[Sequence[int]], position: int,
        order_of: Callable[[Stages], MixedOrder],
    ) -> RollbackRanges:  # fmt: skip
        """Those that a run has written down."""
        read_skipped(run)  # refuses an edited file
        begun = {line["attempt"]: line.get("stages", []) for line in run.read_lines("order.jsonl")}
        written = [
            (line["stream"], begun.get(line.get("attempt"), [])) for line in run.read_lines(SKIPPED)
        ]
        return cls(written, behind, position, order_of)

    def under(self, stages: Stages) -> Ranges:
        """Disjoint, sorted ranges of the mixed stream of these stages."""
        ahead: Ranges = []
        for (p0, p1), then in self._written:
            if not then or then == stages:
                ahead.append([p0, p1])
            else:
                ahead += moved(p0, p1, self._order_of(then), self._order_of(stages))
        clipped = [[max(p0, self._position), p1] for p0, p1 in ahead]
        return merge_ranges([*self._behind, *clipped])


def moved(p0: int, p1: int, before: MixedOrder, after: MixedOrder) -> Ranges:
    """Where the rows at positions [p0, p1) of one order come in another one of these sources.

    None for those that do not come: of a source of weight 0 or not in it yet, or removed meanwhile.
    """
    source, own = before.own_places(np.arange(p0, p1))
    known = source < len(after.orders)
    found = after.from_own(source[known], own[known])
    return [[p, p + 1] for p in found[found != NEVER].tolist()]
