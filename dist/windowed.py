"""The windowed order: few shards are live at once, and a node needs only its share of them.

For data that random reads are slow on: object stores, network file systems. The shards of an
epoch are permuted and laid end to end; their rows are cut into C lanes, equal spans. Position p of
the epoch is index p // C of lane p mod C. In a lane two blocked permutations run over blocks of R
rows, the second one staggered by half a block, so that a row moves by up to 1.5 blocks. All is
closed form with random access and an inverse; memory is the epoch's table of shards.

What is live. Index i lies in one staggered block, which overlaps two neighbouring blocks. Rows
before these two are used up, rows after them are not yet begun. So the live shards of a lane
overlap 2R consecutive rows: k + 2 shards that do contain k whole ones between two cut ones. R is
chosen so that no 2W - 1 shards and two rows fit in: at most 2W are live in a lane, at every index.

Rank locality. A batch is laid out lane by lane before rank_span cuts it (dist/batch_layout.py). A
batch of B samples with C | B holds B / C of every lane, and if the number of ranks divides C, each
rank takes whole lanes. Lanes are numbered by the stream (`p mod C` counted over the whole run), so
a rank's lanes are whole also in the batch in which an epoch ends.

Golden values in tests/golden/order_windowed_v1.json hold the algorithm for ever.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist.batch_layout import lane_by_lane
from dist.errors import ConfigError
from dist.order import (
    U64,
    Order,
    _decrypt,
    _encrypt,
    _halves,
    _mix,
    derive_key,
    each_value,
    permute,
    permute_inverse,
)

I64 = NDArray[np.int64]
MAX_LANES = 64
LIVE_SHARDS = 256
"""Shards live over all lanes with the window that `auto` takes, at most."""
KEPT_EPOCHS = 3
"""Tables of shards that an order keeps: an epoch's end needs two, an audit passes over many."""


@dataclass(frozen=True, kw_only=True)
class OrderMode:
    """How rows are ordered; frozen when a run begins."""

    mode: str = "global"
    lanes: int = 0
    window: int = 0
    """Shards."""
    block_rows: int = 0
    """R, rows of a block."""

    @classmethod
    def of(cls, record: Any) -> OrderMode:
        """From an OrderState, or a dict that holds some of its fields."""
        get = record.get if isinstance(record, dict) else lambda name, _: getattr(record, name)
        return cls(
            mode=get("mode", "global"), lanes=get("lanes", 0), window=get("window", 0),
            block_rows=get("block_rows", 0),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """For a log or a state; {} for the mode that runs had before there was another."""
        return {} if self.mode == "global" else dict(vars(self))

    def __str__(self) -> str:
        if self.mode == "global":
            return "global"
        return (
            f"windowed, {self.lanes} lanes, at most {2 * self.window} live shards in each, blocks "
            f"of {self.block_rows:,} rows"
        )


def make_order(row_start: I64, seed: int, mode: OrderMode, source: int = 0) -> Any:
    """The order of one source in a mode. row_start: (shards + 1,) of its shards."""
    if mode.mode == "global":
        return Order(int(row_start[-1]), seed, source)
    return WindowedOrder(
        row_start, seed, source=source, lanes=mode.lanes, block_rows=mode.block_rows
    )


def auto_lanes(global_batch: int) -> int:
    """The largest power of two, at most 64, that divides the global batch."""
    return min(global_batch & -global_batch, MAX_LANES)


def auto_window(lanes: int) -> int:
    """Shards of a window, so that 256 are live over all lanes, and at least 2 of each."""
    return max(2, LIVE_SHARDS // (2 * lanes))


def block_rows_of(row_start: I64, lanes: int, window: int) -> int:
    """R: the largest blocks that keep at most 2 * window shards of a lane live."""
    sizes = np.sort(np.diff(row_start))
    longest = -(-int(row_start[-1]) // lanes)
    if len(sizes) <= 2 * window:
        return longest
    # 2W + 1 shards that overlap 2R rows hold 2W - 1 whole ones and a row of each end.
    fits = int(sizes[: 2 * window - 1].sum()) + 1
    return min(max(fits // 2, 1), longest)


def check_lanes(lanes: int, window: int) -> None:
    """ConfigError for lanes or windows that the order does not have."""
    if not 1 <= lanes <= MAX_LANES or lanes & (lanes - 1):
        raise ConfigError(f"data.lanes is {lanes}; it must be a power of two from 1 to {MAX_LANES}")
    if window < 1:
        raise ConfigError(f"data.window is {window}; it must be at least one shard")


class WindowedOrder:
    """The training order of one source in mode `windowed`."""

    def __init__(
        self, row_start: I64, seed: int, *, source: int = 0, lanes: int, block_rows: int
    ) -> None:
        """row_start: (shards + 1,) cumulative rows of the source's shards."""
        check_lanes(lanes, 1)
        self.row_start = np.asarray(row_start, np.int64)
        self.num_rows = int(self.row_start[-1])
        if self.num_rows < 1 or block_rows < 1:
            raise ConfigError(
                f"a windowed order over {self.num_rows} rows in blocks of {block_rows}: each must "
                "be at least 1"
            )
        self.seed, self.source, self.lanes, self.block_rows = seed, source, lanes, block_rows
        self._tables: OrderedDict[int, tuple[I64, I64]] = OrderedDict()

    def rows(self, t0: int, t1: int) -> tuple[I64, I64]:
        """(epoch, row) of each sample t0 <= t < t1, two (t1 - t0,) arrays."""
        if not 0 <= t0 <= t1:
            raise ValueError(f"samples [{t0}, {t1}) do not exist")
        return self.at(np.arange(t0, t1, dtype=np.int64))

    def at(self, t: I64) -> tuple[I64, I64]:
        """(epoch, row) of samples t (k,), in any order."""
        epoch, position = np.divmod(t, self.num_rows)
        row = np.empty_like(position)
        for e, here in each_value(epoch):
            row[here] = self._row_at(position[here], e)
        return epoch, row

    def when(self, row: int, epoch: int) -> int:
        """The sample counter t at which a row comes in an epoch: the audit query."""
        return int(self.positions(np.array([row]), epoch)[0])

    def positions(self, rows: NDArray[np.integer], epoch: int) -> I64:
        """`when` of many rows, (k,) -> (k,)."""
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.num_rows:
            raise ValueError(f"rows {rows.min()}..{rows.max()} are not all in [0, {self.num_rows})")
        _, start = self._table(epoch)
        shard = np.searchsorted(self.row_start, rows, side="right") - 1
        num_shards = len(self.row_start) - 1
        place = permute_inverse(shard, num_shards, self._key(epoch, "shard"))
        at = start[place] + rows - self.row_start[shard]
        q, r = divmod(self.num_rows, self.lanes)
        lane = np.where(at < r * (q + 1), at // (q + 1), r + (at - r * (q + 1)) // max(q, 1))
        index = at - (lane * q + np.minimum(lane, r))
        index = self._in_block(_decrypt, index, lane, epoch, staggered=False)
        index = self._in_block(_decrypt, index, lane, epoch, staggered=True)
        return epoch * self.num_rows + index * self.lanes + lane

    def layout(self, t0: int, t1: int) -> I64:
        """Samples [t0, t1) of a batch in the order in which ranks take them: lane by lane."""
        t = np.arange(t0, t1, dtype=np.int64)
        return lane_by_lane(t, t, self.lanes)

    def live_shards(self, t: int, lanes: Iterable[int] | None = None) -> I64:
        """Shards that lanes (None: all) may have begun and not used up at sample t, sorted.

        lanes: numbers of the stream, t mod C; rank r of W has [r * C // W, (r + 1) * C // W).
        A shard that is neither here nor planned ahead may be dropped.
        """
        nearest = t + np.arange(self.lanes)
        if lanes is not None:
            nearest = nearest[np.isin(nearest % self.lanes, list(lanes))]
        live = []
        for p in nearest.tolist():
            epoch, position = divmod(p, self.num_rows)
            index, lane = divmod(position, self.lanes)
            first, end = self._live_rows(index, lane)
            order, start = self._table(epoch)
            a = np.searchsorted(start, first, side="right") - 1
            b = np.searchsorted(start, end, side="left")
            live.append(order[a:b])
        return np.unique(np.concatenate(live)) if live else np.empty(0, np.int64)

    def _live_rows(self, index: int, lane: int) -> tuple[int, int]:
        """Rows [first, end) of the epoch's line of shards that are in play at a lane's index."""
        q, r = divmod(self.num_rows, self.lanes)
        size, half = self.block_rows, self.block_rows // 2
        block = (index + size - half) // size  # the staggered block
        begin, length = lane * q + min(lane, r), q + (lane < r)
        return begin + max(block - 1, 0) * size, begin + min((block + 1) * size, length)

    def _row_at(self, position: I64, epoch: int) -> I64:
        order, start = self._table(epoch)
        index, lane = np.divmod(position, np.int64(self.lanes))
        index = self._in_block(_encrypt, index, lane, epoch, staggered=True)
        index = self._in_block(_encrypt, index, lane, epoch, staggered=False)
        q, r = divmod(self.num_rows, self.lanes)
        at = lane * q + np.minimum(lane, r) + index
        place = np.searchsorted(start, at, side="right") - 1
        return self.row_start[order[place]] + at - start[place]

    def _in_block(self, step: Any, index: I64, lane: I64, epoch: int, *, staggered: bool) -> I64:
        """Permute the index within its block of the lane, (k,) -> (k,)."""
        size = self.block_rows
        shift = size - size // 2 if staggered else 0
        q, r = divmod(self.num_rows, self.lanes)
        length = q + (lane < r)
        block = (index + shift) // size
        begin = np.maximum(block * size - shift, 0)
        n = np.minimum((block + 1) * size - shift, length) - begin
        key = self._key(epoch, "staggered" if staggered else "block")
        tweak = _mix((block * MAX_LANES + lane + 1).astype(np.uint64))
        inner = np.empty_like(index)
        for one, here in each_value(n):  # a lane has a first, a last and whole blocks; two lengths
            inner[here] = _walk(step, index[here] - begin[here], one, key, tweak[here])
        return begin + inner

    def _table(self, epoch: int) -> tuple[I64, I64]:
        """The epoch's shards in order, (S,), and where their rows start, (S + 1,)."""
        table = self._tables.get(epoch)
        if table is None:
            num_shards = len(self.row_start) - 1
            order = permute(np.arange(num_shards), num_shards, self._key(epoch, "shard"))
            start = np.concatenate(([0], np.cumsum(np.diff(self.row_start)[order])))
            table = self._tables[epoch] = order, start
            if len(self._tables) > KEPT_EPOCHS:
                self._tables.popitem(last=False)
        return table

    def _key(self, epoch: int, purpose: str) -> U64:
        return derive_key(self.seed, epoch, self.source, purpose)


def _walk(step: Any, x: I64, n: int, key: U64, tweak: U64) -> I64:
    """Permute [0, n) by a key that each element's tweak makes another one, (k,) -> (k,)."""
    a, b = _halves(n)
    y = step(x.astype(np.uint64), a, b, key[:, None] ^ tweak)
    outside = np.flatnonzero(y >= n)
    while outside.size:
        y[outside] = step(y[outside], a, b, key[:, None] ^ tweak[outside])
        outside = outside[y[outside] >= n]
    return y.astype(np.int64)
