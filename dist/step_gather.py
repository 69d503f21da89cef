"""The rows that a rank takes in each step, from mapped shards into micro-batches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist.batch import Batch, Documents, documents_of, make_batches, mark_trained
from dist.batch_layout import RowsAhead, StepRows, Steps
from dist.dataset import Dataset
from dist.example_gather import gather_examples
from dist.open_shards import OpenShards
from dist.row_gather import GatheredRows, gather_rows, join_rows_at
from dist.side_thread import SideThread
from dist.split_table import SplitTable

STEPS_TOGETHER, _BYTES_TOGETHER, _SECONDS_TOGETHER = 32, 32 << 20, 0.02
"""Steps are gathered together while they are no more, and take no longer: of a small step most of
the time goes into calling numpy."""
_BYTES_APART = 8 << 20
"""Their tokens are copied in parts of whole steps, by whichever thread has nothing else to do. From
4 MiB on numpy asks for huge pages: a row took about a tenth less CPU time."""
_BYTES_KEPT = 31 << 20


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next steps.

    It gives memory back to the system past twice the largest block that it has mapped and freed
    (mallopt(3), M_MMAP_THRESHOLD; 32 MB count at most). A page of it that is asked for anew costs
    as much as to copy a row or more: 0.2 of those a row made steps a third slower.
    """
    np.empty(_BYTES_KEPT, np.uint8)


class _Begun(NamedTuple):
    """Steps that are being gathered."""

    steps: list[StepRows]
    rows: NDArray[np.int64]
    """(steps, rows of this rank): rows, then -1 for padding."""
    found: GatheredRows
    documents: list[Documents]


class StepGatherer:
    """Gathers the steps of plans, several small ones at a time."""

    def __init__(self, dataset: Dataset, split: SplitTable, shards: OpenShards) -> None:
        """shards: of that split."""
        self._split, self._shards = split, shards
        self._seq_len = int(dataset.schema["seq_len"])
        self._dtype = np.dtype(dataset.schema["token_dtype"])
        self._has_masks = dataset.manifest.kind == "examples"
        self._row_bytes = (self._seq_len + 1) * self._dtype.itemsize
        self._is_remote = dataset.is_remote
        self._side = SideThread("copy")
        keep_freed_memory()

    def close(self) -> None:
        """End its thread."""
        self._side.close()

    def steps(self, order: Any, plan: Steps) -> Iterator[list[list[Batch]]]:
        """The micro-batches of one step after the other; steps gathered together come together."""
        ahead, count = RowsAhead(order, plan), 1
        waiting: _Begun | None = None
        while steps := ahead.take(count, self._is_at_hand):
            self._shards.reach(steps[0].step)
            started = time.perf_counter()
            try:
                begun, failure = self._begin(steps, plan), None
            except Exception as error:
                begun, failure = None, error
            took_s = time.perf_counter() - started
            if waiting is not None:  # its tokens were copied meanwhile
                yield from self._finish(waiting)
                waiting = None
            if begun is None and failure is not None:
                if len(steps) == 1:
                    raise failure
                for step in steps:  # what cannot be read fails its own step, not those before
                    self._shards.reach(step.step)
                    yield from self._finish(self._begin([step], plan))
            elif begun is not None and not self._is_remote and took_s < _SECONDS_TOGETHER:
                waiting = begun
            elif begun is not None:
                yield from self._finish(begun)
            if took_s > _SECONDS_TOGETHER:
                count = max(1, len(steps) // 2)
            elif took_s < _SECONDS_TOGETHER / 2:
                bytes_each = begun.rows.size // len(steps) * self._row_bytes if begun else 0
                most = min(STEPS_TOGETHER, _BYTES_TOGETHER // max(bytes_each, 1))
                count = max(1, min(2 * count, most))
        if waiting is not None:
            yield from self._finish(waiting)

    def _is_at_hand(self, step: StepRows) -> bool:
        """A step must not wait for shards of a later one that have to be fetched."""
        if not self._is_remote:
            return True
        return self._shards.are_here(np.unique(self._split.locate(step.rows)[0]).tolist())

    def _begin(self, steps: list[StepRows], plan: Steps) -> _Begun:
        """Gather equally long steps; their tokens may still be under way."""
        length = steps[0].t1 - steps[0].t0
        size = min(plan.micro_batch, -(-length // plan.world_size))
        taken = len(steps[0].rows)
        rows = np.full((len(steps), plan.num_micro(length) * size), -1)
        rows[:, :taken] = [step.rows for step in steps]
        apart = max(1, _BYTES_APART // max(1, taken * self._row_bytes)) * taken
        found = self._gather_rows(rows[:, :taken].reshape(-1), apart)
        if taken < rows.shape[1]:
            found = found.among_padding(np.flatnonzero(rows.reshape(-1) >= 0), rows.size)
        documents = documents_of(found.lengths, found.row_splits, self._seq_len + 1, size)
        return _Begun(steps, rows, found, documents)

    def _finish(self, begun: _Begun) -> Iterator[list[list[Batch]]]:
        """All micro-batches of this rank's part of each step."""
        steps, rows, found, documents = begun
        num_micro = len(documents) // len(steps)
        first = 0
        finished: list[Batch] = []
        try:
            for tokens in found.parts():
                end = first + len(tokens) // rows.shape[1]
                own = documents[first * num_micro : end * num_micro]
                places = [(one.step, one.t0, one.t1) for one in steps[first:end]]
                finished += make_batches(tokens, rows[first:end].reshape(-1), own, places)
                first = end
            if found.runs is not None and found.run_splits is not None:  # comes in one part
                mark_trained(finished, found.runs, found.run_splits)
        finally:  # a part that failed is not to hide the steps before it
            if finished:
                yield [finished[at : at + num_micro] for at in range(0, len(finished), num_micro)]

    def _gather_rows(self, rows: NDArray[np.int64], part_rows: int) -> GatheredRows:
        """Rows of the split (k,), from as many shards at a time as may be open."""
        shard_of, row_in_shard = self._split.locate(rows)
        is_used = np.zeros(len(self._split.shards), np.int64)
        is_used[shard_of] = 1
        used = np.flatnonzero(is_used)
        which = (np.cumsum(is_used) - 1)[shard_of]
        parts, places = [], []
        first = 0
        for shards in self._shards.groups(used.tolist()):
            if len(shards) == len(used):
                return self._copy(shards, which, row_in_shard, self._side, part_rows)
            end = first + len(shards)
            at = np.flatnonzero((first <= which) & (which < end))
            # Their maps must go before others come: nothing is left to a thread.
            parts.append(self._copy(shards, which[at] - first, row_in_shard[at], None, part_rows))
            places.append(at)
            first = end
            del shards
        return join_rows_at(parts, places)

    def _copy(
        self, shards: list[Any], which: NDArray[np.int64], rows: NDArray[np.int64],
        side: SideThread | None, part_rows: int,
    ) -> GatheredRows:  # fmt: skip
        width = self._seq_len + 1
        if self._has_masks:
            return gather_examples(shards, which, rows, width)
        places = [shard.places for shard in shards]
        return gather_rows(places, which, rows, width, self._dtype, side, part_rows)
