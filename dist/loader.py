"""Rows of mapped shards into micro-batches: threads, no worker processes.

Which rows: step s consumes samples [t, t + B) of an order; data-parallel coordinate r of W takes
rows rank_span(B, r, W), cut into micro-batches. Every rank runs the same number of them; short
ones are padded with rows of no document, which weigh nothing.

One thread gathers, as far ahead as some memory allows. Where there are other ranks, another thread
agrees with them, by one small all-reduce a step on a gloo group of its own, on what the step needs:
its valid targets, whether someone asked to stop, whether someone failed. It can, as a step's rows
are known ahead. Ranks agree on a step while the one before it is computed, not earlier: so at most
two more steps begin after a request to stop.
"""

from __future__ import annotations

import atexit
import dataclasses
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dist.agreement import Agreement
from dist.batch import Batch
from dist.channel import Channel
from dist.dataset import Dataset, first_rows
from dist.drain import end_soon, lost_peer
from dist.mesh import host_group
from dist.open_shards import OpenShards
from dist.order import FirstRows, OrderState, num_micro_batches
from dist.run_dir import RunDir
from dist.run_order import first_order
from dist.skips import SkippingOrder, Skips
from dist.split_table import SplitTable
from dist.stages import LOOK_AHEAD_STEPS, DerivedOrder
from dist.step_gather import StepGatherer
from dist.verify import ShardVerifier

SETTLE_TIMEOUT_S = 60.0
GATHERED_BYTES, GATHERED_STEPS = 32 << 20, 16
"""What waits for the ranks to agree, at most, or else steps that were gathered together: for so
long may a disk be slow, or a machine busy."""
LEAST_BYTES = GATHERED_BYTES // GATHERED_STEPS


class RowOrder(Protocol):
    """Order or SequentialOrder of dist.order."""

    num_rows: int

    def rows(self, t0: int, t1: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...

    def at(self, t: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...


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


_open: weakref.WeakSet[TokenLoader] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread in native code aborts an interpreter that ends meanwhile."""
    for loader in list(_open):
        loader.close()


def tell_step(batches: list[Batch], targets: int, stop: bool) -> None:
    """Write into a step's micro-batches what holds for all of it."""
    for batch in batches:
        batch.step_targets, batch.stop = targets, stop


class TokenLoader:
    """Iterable of Batch. Each `iter()` starts at the plan's first step with threads of its own.

    Raises in the consumer what failed in a thread: DataRefused for a damaged shard on this
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
        self._shards = OpenShards(dataset, split, verifier)
        self._gatherer = StepGatherer(dataset, split, self._shards)
        self._agree, self._pin, self._stop_requested = agree, pin, stop_requested
        self._channel: Channel | None = None
        self._gathered = Channel(GATHERED_BYTES)
        self._steps: deque[list[Batch]] = deque()
        """That came, and were not begun."""
        self._pending: deque[Batch] = deque()
        """Of the step that was begun, what has not been taken yet."""
        self._threads: list[threading.Thread] = []
        self._delivered = self._left_behind = self._ended = False
        _open.add(self)

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
        self._channel = channel = self._gathered = gathered = Channel(GATHERED_BYTES)
        self._threads = [
            threading.Thread(target=self._gather, args=(gathered,), name="gather", daemon=True)
        ]
        if self._agree is not None:
            self._channel = channel = Channel(2)
            agree, args = self._agree_on_steps, (self._agree, gathered, channel)
            self._threads.append(
                threading.Thread(target=agree, args=args, name="agree", daemon=True)
            )
        for thread in self._threads:
            thread.start()
        return self._deliver(channel)

    def _deliver(self, channel: Channel) -> Iterator[Batch]:
        while self._pending or not self._ended:
            if not self._pending:
                if not self._steps:
                    start = time.perf_counter()
                    item = channel.get()
                    self.wait_s += time.perf_counter() - start
                    if item is None:
                        self._ended = True
                        return
                    if isinstance(item, BaseException):
                        raise item
                    self._steps.extend(item)
                batches = self._steps.popleft()
                if self._agree is None:
                    self._ended = self._stop_requested()
                    tell_step(batches, sum(batch.num_targets for batch in batches), self._ended)
                else:  # who agrees waits for it; who gathers would wake in vain
                    channel.begin(batches[0].step)
                self._pending.extend(batches)
            self._delivered = True
            yield self._pending.popleft()

    def fetch_ahead(self) -> None:
        """Begin to fetch remote shards now, while the model is being made."""
        self._shards.begin(self.order, self.plan)

    def settle(self) -> None:
        """Wait until a thread has agreed with the other ranks on the step after this one.

        Ranks that all settle before they close leave none behind in an all-reduce.
        """
        if self._channel is not None:
            self._channel.wait_filled(SETTLE_TIMEOUT_S)

    def close(self) -> None:
        """End the threads. One may sit in a collective with a dead peer: then it is left behind."""
        if self._channel is not None:
            self._channel.close()
        self._gathered.close()
        self._shards.cancel()
        for thread in self._threads:
            thread.join(timeout=2.0)
        self._left_behind = any(thread.is_alive() for thread in self._threads)
        self._shards.end()
        self._steps.clear()
        self._pending.clear()
        self._channel, self._threads = None, []

    def __enter__(self) -> TokenLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _gather(self, gathered: Channel) -> None:
        """A thread: the micro-batches of one step after the other, as far as room allows; at last
        None, or what went wrong."""
        try:
            self._shards.begin(self.order, self.plan)
            for steps in self._gatherer.steps(self.order, self.plan):
                if self._pin:
                    steps = [[batch.pin() for batch in batches] for batches in steps]
                sizes = [sum(batch.tokens.nbytes for batch in batches) for batches in steps]
                # Together: to wake another thread costs as much as gathering a dozen rows.
                if not gathered.put(steps, sum(max(size, LEAST_BYTES) for size in sizes)):
                    return
            gathered.put(None)
        except BaseException as error:  # told to the other ranks, if any, and to the consumer
            gathered.put(error)
        finally:
            self._gatherer.close()
            self._shards.end()

    def _agree_on_steps(self, agree: Agreement, gathered: Channel, channel: Channel) -> None:
        """Another thread: what all ranks must know of a step, then its micro-batches."""
        try:
            for batches, failure in self._gathered_steps(gathered):
                targets = sum(batch.num_targets for batch in batches)
                if not self._may_agree(batches, channel):
                    return
                counted = targets if self.plan.counts else 0
                targets, stop = agree.step(counted, self._stop_requested(), failure)
                if failure is not None:
                    raise failure
                tell_step(batches, targets, stop)
                if not channel.put([batches]):
                    return
                if stop:
                    break
            channel.put(None)
        except BaseException as error:  # delivered to the consumer, who raises it
            if lost_peer(error) is not None:
                end_soon()
            channel.put(error)
        finally:
            gathered.close()

    @staticmethod
    def _gathered_steps(
        gathered: Channel,
    ) -> Iterator[tuple[list[Batch], BaseException | None]]:
        """The micro-batches of one step after the other, or at last what went wrong."""
        while (found := gathered.get()) is not None:
            if isinstance(found, BaseException):
                yield [], found
            else:
                yield from ((batches, None) for batches in found)

    def _may_agree(self, batches: list[Batch], channel: Channel) -> bool:
        """Wait until the step before this one is computed; False where the consumer has left."""
        if not batches or batches[0].step == self.plan.start_step:
            return True
        return channel.wait_begun(batches[0].step - 1)


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
