"""Packed rows of local shards into micro-batches: mmap, one gather thread, no worker processes.

Which rows: step s consumes samples [t, t + B) of an order; data-parallel coordinate r of W takes
rows rank_span(B, r, W), cut into micro-batches. Every rank runs the same number of them; short
ones are padded with rows of no document, which weigh nothing.

The thread knows a step's rows ahead, so it also agrees with the other ranks, by one small
all-reduce a step on a gloo group of its own, on what the step needs: its valid targets, whether
someone asked to stop, whether someone failed. They agree on a step while the one before it is
computed, not earlier: so at most two more steps begin after a request to stop.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray

from dist.batch import Batch, make_batches, mark_trained
from dist.batch_layout import batch_rows
from dist.dataset import Dataset, SplitTable, first_rows
from dist.drain import end_soon, lost_peer
from dist.errors import describe
from dist.mesh import PeerFailed, host_group
from dist.open_shards import OpenShards
from dist.order import FirstRows, OrderState, num_micro_batches, rank_span
from dist.run_dir import RunDir
from dist.run_order import first_order
from dist.skips import SkippingOrder, Skips
from dist.stages import LOOK_AHEAD_STEPS, DerivedOrder
from dist.verify import ShardVerifier

SETTLE_TIMEOUT_S = 60.0


class RowOrder(Protocol):
    """Order or SequentialOrder of dist.order."""

    num_rows: int

    def rows(self, t0: int, t1: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...


@dataclass(frozen=True, kw_only=True)
class LoaderPlan:
    """What a loader delivers; the same on all ranks but for `rank` and `counts`."""

    batch: int
    """Global batch in rows."""
    micro_batch: int
    """Rows of a micro-batch on one rank."""
    rank: int = 0
    """Data-parallel coordinate."""
    world_size: int = 1
    """Data-parallel size."""
    counts: bool = True
    """Whether this rank's targets count: of ranks that share rows (tensor parallelism) one does."""
    start_step: int = 0
    """First step to deliver."""
    start_t: int = 0
    """Its first sample."""
    end_step: int | None = None
    """One past the last step; None for as many as the samples give."""
    end_t: int | None = None
    """One past the last sample; the last step may be short. None for no end."""

    def steps(self) -> Iterator[tuple[int, int, int]]:
        """(step, t0, t1) in order."""
        step, t = self.start_step, self.start_t
        while (self.end_step is None or step < self.end_step) and (
            self.end_t is None or t < self.end_t
        ):
            t1 = t + self.batch if self.end_t is None else min(t + self.batch, self.end_t)
            yield step, t, t1
            step, t = step + 1, t1

    def num_micro(self, rows: int) -> int:
        return num_micro_batches(rows, self.world_size, self.micro_batch)


class TokenLoader:
    """Iterable of Batch. Each `iter()` starts at the plan's first step with a thread of its own.

    Raises in the consumer what failed in the thread: DataRefused for a damaged shard on this
    rank, PeerFailed where another rank failed. Close it (or use it as a context manager).
    """

    def __init__(
        self,
        dataset: Dataset,
        split: SplitTable,
        order: RowOrder,
        plan: LoaderPlan,
        *,
        verifier: ShardVerifier | None = None,
        agree: Agreement | None = None,
        pin: bool = False,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.plan, self.split, self.order = plan, split, order
        self.source_names: tuple[str, ...] = getattr(dataset, "names", ())
        """Of a mixture."""
        self.source_rows = first_rows(dataset, split.name)
        """(sources + 1,) where the rows of each source begin; its source derives from a row."""
        self.wait_s = 0.0
        """Seconds that the consumer waited for data, in all."""
        self.goes_on = False
        """Whether a further `iter()` goes on where the last one stopped, not at the start."""
        self._seq_len = int(dataset.schema["seq_len"])
        self._dtype = np.dtype(dataset.schema["token_dtype"])
        self._has_masks = dataset.manifest.kind == "examples"
        self._shards = OpenShards(dataset, split, verifier)
        self._agree, self._pin, self._stop_requested = agree, pin, stop_requested
        self._channel: _Channel | None = None
        self._thread: threading.Thread | None = None
        self._delivered = self._left_behind = self._ended = False

    def __len__(self) -> int:
        """Micro-batches of steps 0 to the last, also those before the start: what a loop that
        counts from the run's beginning will have seen at the end."""
        plan = self.plan
        if plan.end_step is None and plan.end_t is None:
            raise TypeError("a loader without end_step and end_t has no length")
        if plan.end_t is None:
            return int(plan.end_step or 0) * plan.num_micro(plan.batch)
        before = plan.start_step * plan.num_micro(plan.batch)
        return before + sum(plan.num_micro(t1 - t0) for _, t0, t1 in plan.steps())

    def replan(self, plan: LoaderPlan) -> None:
        """Deliver something else; only before the first `iter()`."""
        if self._channel is not None:
            raise RuntimeError("the loader has begun; its plan cannot change")
        names = ("start_step", "start_t", "batch", "rank", "world_size")
        if any(getattr(plan, name) != getattr(self.plan, name) for name in names):
            self._shards.end()  # it fetches ahead for other rows
        self.plan = plan

    def __iter__(self) -> Iterator[Batch]:
        if self._channel is not None and (self.goes_on or not self._delivered):
            # Lightning asks twice before the first batch. A second thread would bring its own
            # all-reduces into the first one's group, and ranks could pair those of two steps.
            return self._deliver(self._channel)
        self.close()
        if self._agree is not None and self._left_behind:
            raise RuntimeError("the last pass over this loader still waits for other ranks")
        self._delivered = self._ended = False
        ahead = self.plan.num_micro(self.plan.batch)
        channel = _Channel(max(2, min(ahead, 16)))
        thread = threading.Thread(target=self._run, args=(channel,), name="gather", daemon=True)
        self._channel, self._thread = channel, thread
        thread.start()
        return self._deliver(channel)

    def _deliver(self, channel: _Channel) -> Iterator[Batch]:
        while not self._ended:
            start = time.perf_counter()
            item = channel.get()
            self.wait_s += time.perf_counter() - start
            if item is None:
                self._ended = True
                return
            if isinstance(item, BaseException):
                raise item
            channel.begin(item.step)
            self._delivered = True
            yield item

    def fetch_ahead(self) -> None:
        """Begin to fetch remote shards now, while the model is being made."""
        self._shards.begin(self.order, self.plan)

    def settle(self) -> None:
        """Wait until the thread has agreed with the other ranks on the step after this one.

        Ranks that all settle before they close leave none behind in an all-reduce.
        """
        if self._channel is not None:
            self._channel.wait_filled(SETTLE_TIMEOUT_S)

    def close(self) -> None:
        """End the thread. It may sit in a collective with a dead peer: then it is left behind."""
        if self._channel is not None:
            self._channel.close()
        self._shards.cancel()
        if self._thread is not None:
            self._thread.join(timeout=2.0)
            self._left_behind = self._thread.is_alive()
        self._shards.end()
        self._channel = self._thread = None

    def __enter__(self) -> TokenLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, channel: _Channel) -> None:
        try:
            self._shards.begin(self.order, self.plan)
            for step, t0, t1 in self.plan.steps():
                self._shards.reach(step)
                failure: BaseException | None = None
                batches: list[Batch] = []
                try:
                    batches = self._gather_step(step, t0, t1)
                except Exception as error:
                    failure = error
                targets = sum(batch.num_targets for batch in batches)
                first = step == self.plan.start_step
                if self._agree is not None and not (first or channel.wait_begun(step - 1)):
                    return
                stop = self._stop_requested()
                if self._agree is not None:
                    counted = targets if self.plan.counts else 0
                    targets, stop = self._agree.step(counted, stop, failure)
                if failure is not None:
                    raise failure
                for batch in batches:
                    batch.step_targets, batch.stop = targets, stop
                    if not channel.put(batch.pin() if self._pin else batch):
                        return
                if stop:
                    break
            channel.put(None)
        except BaseException as error:  # delivered to the consumer, who raises it
            if lost_peer(error) is not None:
                end_soon()
            channel.put(error)
        finally:
            self._shards.end()

    def _gather_step(self, step: int, t0: int, t1: int) -> list[Batch]:
        """All micro-batches of this rank's part of one step."""
        plan = self.plan
        lo, hi = rank_span(t1 - t0, plan.rank, plan.world_size)
        _, rows = batch_rows(self.order, t0, t1, lo, hi)
        size = min(plan.micro_batch, -(-(t1 - t0) // plan.world_size))
        num_rows = plan.num_micro(t1 - t0) * size
        # tokens: (num_rows, seq + 1); rows that this rank lacks are padding.
        tokens = np.empty((num_rows, self._seq_len + 1), self._dtype)
        tokens[len(rows) :] = 0
        shard_of, row_in_shard = self.split.locate(rows)
        open_shard = self._shards.get
        lens = [
            open_shard(number).read_row(row, out)
            for number, row, out in zip(
                shard_of.tolist(), row_in_shard.tolist(), tokens, strict=False
            )
        ]
        row_splits = np.zeros(num_rows + 1, np.int64)
        np.cumsum([len(one) for one in lens], out=row_splits[1 : len(rows) + 1])
        row_splits[len(rows) + 1 :] = row_splits[len(rows)]
        keys = np.full(num_rows, -1, np.int64)
        keys[: len(rows)] = rows
        doc_lens = np.concatenate(lens) if lens else np.empty(0, np.int32)
        batches = make_batches(tokens, keys, doc_lens, row_splits, size)
        if self._has_masks:
            at = zip(shard_of.tolist(), row_in_shard.tolist(), strict=True)
            mark_trained(batches, [open_shard(number).trained_runs(row) for number, row in at])
        for batch in batches:
            batch.step, batch.t0, batch.t1 = step, t0, t1
        return batches


class Agreement:
    """What all ranks must know of a step, by one int64 all-reduce in the gather thread."""

    def __init__(self, group: torch.distributed.ProcessGroup | None) -> None:
        self._group = group

    def step(self, targets: int, stop: bool, failure: BaseException | None) -> tuple[int, bool]:
        """(valid targets on all ranks, whether any rank wants to stop).

        Raises PeerFailed on the ranks that did not fail themselves, if one did.
        """
        if self._group is None:
            return targets, stop
        code = 0
        if failure is not None:
            said = describe(failure)
            code = said[1] if said else 1
        sums = torch.tensor([targets, int(stop), int(failure is not None), code])
        torch.distributed.all_reduce(sums, group=self._group)
        targets, stops, failures, codes = sums.tolist()
        if failures and failure is None:
            raise PeerFailed(f"{failures} other ranks could not read their data", codes // failures)
        return targets, stops > 0


class _Channel:
    """A bounded queue that either side can close."""

    def __init__(self, capacity: int) -> None:
        self._items: deque[Any] = deque()
        self._capacity, self._closed = capacity, False
        self._begun = -1
        self._changed = threading.Condition()

    def put(self, item: Any) -> bool:
        """Wait for room and append; False if the channel was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._capacity)
            if self._closed:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def get(self) -> Any:
        """Wait for an item; None at the end and after close."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._items)
            if not self._items:
                return None
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def begin(self, step: int) -> None:
        """The consumer has taken the first micro-batch of a step (or a later one)."""
        with self._changed:
            if step > self._begun:
                self._begun = step
                self._changed.notify_all()

    def wait_begun(self, step: int) -> bool:
        """Wait until a step has begun; False if the channel was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._begun >= step)
            return not self._closed

    def wait_filled(self, timeout_s: float) -> None:
        """Wait until an item is there, or the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._items, timeout_s)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


def planned_shards(split: SplitTable, order: RowOrder, start_t: int, look_ahead: int) -> list[int]:
    """Shard numbers in the order of their first use within `look_ahead` samples, then the rest."""
    _, rows = order.rows(start_t, start_t + look_ahead)
    used, first = np.unique(split.locate(rows)[0], return_index=True)
    ordered = used[np.argsort(first)].tolist()
    return ordered + sorted(set(range(len(split.shards))) - set(ordered))


def training_loader(
    dataset: Dataset, seed: int, plan: LoaderPlan, run: Path, stack: ExitStack,
    stop_requested: Callable[[], bool], skipped: Sequence[Sequence[int]] = (),
    removed: Sequence[int] = (), state: OrderState | None = None,
) -> TokenLoader:  # fmt: skip
    """Rows of `train` in the order of `seed`, verified before use; all ranks must call it.

    skipped: ranges of the order's stream to leave out; removed: rows that the dataset lacks of
    the one that the order is of; state: the order's mode, `global` without one.
    """
    split = dataset.split("train")
    order: RowOrder = SkippingOrder(
        first_order(RunDir(run), dataset, seed, state, len(removed)), Skips(skipped)
    )
    if removed:
        order = DerivedOrder(order, list(removed))
    verifier = ShardVerifier(dataset, split, run / "verified")
    if not dataset.is_remote:  # the cache verifies what it fetches
        verifier.start(planned_shards(split, order, plan.start_t, LOOK_AHEAD_STEPS * plan.batch))
        stack.callback(verifier.close)
    loader = TokenLoader(
        dataset, split, order, plan, verifier=verifier, agree=Agreement(host_group()),
        pin=torch.cuda.is_available(), stop_requested=stop_requested,
    )  # fmt: skip
    loader.fetch_ahead()
    stack.callback(loader.close)
    return loader


def validation_loader(
    dataset: Dataset, plan: LoaderPlan, num_rows: int, run: Path, stack: ExitStack
) -> TokenLoader | None:
    """The first `num_rows` rows (0: all) of `validation` of each source, each once.

    None without that split.
    """
    if "validation" not in dataset.manifest.splits():
        return None
    split = dataset.split("validation")
    order = FirstRows(first_rows(dataset, "validation"), num_rows or split.num_rows)
    plan = dataclasses.replace(plan, start_step=0, start_t=0, end_step=None, end_t=order.num_rows)
    verifier = ShardVerifier(dataset, split, run / "verified")
    loader = TokenLoader(
        dataset, split, order, plan, verifier=verifier, pin=torch.cuda.is_available()
    )
    stack.callback(loader.close)
    return loader
