"""Which sample, when: a permutation in closed form, with random access and an inverse.

`t` counts samples over the whole run; epoch = t // N, position = t % N, and the row at a position
is a pseudo-random permutation of it: a generalized Feistel network on Z_a x Z_b with cycle
walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002), 6 rounds of the
murmur3 64-bit finaliser. No memory, no start-up, the same on every rank and machine. Golden
values in tests/golden/order_v1.json hold the algorithm for ever.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist.errors import ConfigError

ALGORITHM_VERSION = 1
ROUNDS = 6
MODES = ("global", "windowed")
U64 = NDArray[np.uint64]
# Numbers that stand beside arrays are arrays of no dimension: numpy makes one of any other at
# each call, which takes it as long as the work on a hundred of them.
_SHIFT = np.array(33, np.uint64)
_FIRST_FACTOR = np.array(0xFF51AFD7ED558CCD, np.uint64)
_SECOND_FACTOR = np.array(0xC4CEB9FE1A85EC53, np.uint64)


def derive_key(seed: int, epoch: int, source: int, purpose: str) -> U64:
    """Round keys, (6,) uint64, from blake2b; never seed + epoch, which would alias runs."""
    text = f"leyden.order.v{ALGORITHM_VERSION}/{seed}/{epoch}/{source}/{purpose}"
    digest = hashlib.blake2b(text.encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, "<u8")


def _mix(x: U64) -> U64:
    """murmur3's 64-bit finaliser; arithmetic wraps."""
    x = x.copy()
    _mix_in_place(x, np.empty_like(x))
    return x


def _mix_in_place(x: U64, spare: U64) -> None:
    """`_mix` into x itself; spare: an array of its shape that is overwritten."""
    np.right_shift(x, _SHIFT, out=spare)
    np.bitwise_xor(x, spare, out=x)
    np.multiply(x, _FIRST_FACTOR, out=x)
    np.right_shift(x, _SHIFT, out=spare)
    np.bitwise_xor(x, spare, out=x)
    np.multiply(x, _SECOND_FACTOR, out=x)
    np.right_shift(x, _SHIFT, out=spare)
    np.bitwise_xor(x, spare, out=x)


def _halves(n: int) -> tuple[U64, U64]:
    a = math.isqrt(n - 1) + 1  # ceil(sqrt(n))
    return np.array(a, np.uint64), np.array(-(-n // a), np.uint64)


def _hash_below(half: U64, key: U64, n: U64, found: U64, spare: U64) -> None:
    """Hash a half with a round's key into `found`, modulo n.

    numpy divides uint64 by a scalar with SIMD instructions, but takes remainders one by one: the
    quotient, a product and a difference are three times as fast as `%`.
    """
    np.bitwise_xor(half, key, out=found)
    _mix_in_place(found, spare)
    np.floor_divide(found, n, out=spare)
    np.multiply(spare, n, out=spare)
    np.subtract(found, spare, out=found)


def _encrypt(x: U64, a: U64, b: U64, key: U64) -> U64:
    right = x // a  # x = right * a + left; left < a, right < b
    left = x - right * a
    found, spare = np.empty_like(x), np.empty_like(x)
    for number in range(len(key)):
        half, other, n = (left, right, a) if number % 2 == 0 else (right, left, b)
        _hash_below(other, key[number, ...], n, found, spare)
        # half + found < 2n: of it and it - n, which wraps below n, the smaller is the remainder.
        np.add(half, found, out=half)
        np.subtract(half, n, out=spare)
        np.minimum(half, spare, out=half)
    right *= a
    right += left
    return right


def _decrypt(x: U64, a: U64, b: U64, key: U64) -> U64:
    right = x // a
    left = x - right * a
    found, spare = np.empty_like(x), np.empty_like(x)
    for number in reversed(range(len(key))):
        half, other, n = (left, right, a) if number % 2 == 0 else (right, left, b)
        _hash_below(other, key[number, ...], n, found, spare)
        # half - found wraps where it is negative; n added then wraps back, else it only grows.
        np.subtract(half, found, out=half)
        np.add(half, n, out=spare)
        np.minimum(half, spare, out=half)
    right *= a
    right += left
    return right


def _walk(step: Any, x: NDArray[np.integer], n: int, key: U64) -> NDArray[np.int64]:
    """Permute [0, a*b) until every value is below n; a*b - n < a, so rarely twice."""
    if not 0 < n < 1 << 62:
        raise ValueError(f"a permutation of {n} items; it must be from 1 to 2**62 - 1")
    x = np.asarray(x)
    if x.size and (int(x.min()) < 0 or int(x.max()) >= n):
        raise ValueError(f"positions {int(x.min())}..{int(x.max())} are not all in [0, {n})")
    a, b = _halves(n)
    y = step(x.astype(np.uint64), a, b, key)
    outside = np.flatnonzero(y >= n)
    while outside.size:
        y[outside] = step(y[outside], a, b, key)
        outside = outside[y[outside] >= n]
    return y.astype(np.int64)


def permute(position: NDArray[np.integer], n: int, key: U64) -> NDArray[np.int64]:
    """Row at each position, (k,) -> (k,); a bijection of [0, n)."""
    return _walk(_encrypt, position, n, key)


def permute_inverse(row: NDArray[np.integer], n: int, key: U64) -> NDArray[np.int64]:
    """Position at which each row comes, (k,) -> (k,)."""
    return _walk(_decrypt, row, n, key)


def each_value(values: NDArray[np.int64]) -> Iterator[tuple[int, Any]]:
    """Each of a few values, such as epochs, and where in (k,) it stands."""
    if len(values) and (values == values[0]).all():  # nearly always; np.unique would sort them
        yield int(values[0]), slice(None)
    else:
        for value in np.unique(values):
            yield int(value), values == value


class Order:
    """The training order of one source of `num_rows` rows (mode `global`)."""

    def __init__(self, num_rows: int, seed: int, source: int = 0) -> None:
        if num_rows < 1:
            raise ConfigError(f"an order over {num_rows} rows; the split is empty")
        self.num_rows, self.seed, self.source = num_rows, seed, source

    def rows(self, t0: int, t1: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(epoch, row) of each sample t0 <= t < t1, two (t1 - t0,) arrays."""
        if not 0 <= t0 <= t1:
            raise ValueError(f"samples [{t0}, {t1}) do not exist")
        return self.at(np.arange(t0, t1, dtype=np.int64))

    def at(self, t: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(epoch, row) of samples t (k,), in any order."""
        epoch, position = np.divmod(t, self.num_rows)
        row = np.empty_like(position)
        for e, here in each_value(epoch):
            row[here] = permute(position[here], self.num_rows, self._key(e))
        return epoch, row

    def when(self, row: int, epoch: int) -> int:
        """The sample counter t at which a row comes in an epoch: the audit query."""
        return int(self.positions(np.array([row]), epoch)[0])

    def positions(self, rows: NDArray[np.integer], epoch: int) -> NDArray[np.int64]:
        """`when` of many rows, (k,) -> (k,)."""
        return epoch * self.num_rows + permute_inverse(rows, self.num_rows, self._key(epoch))

    def _key(self, epoch: int) -> U64:
        return derive_key(self.seed, epoch, self.source, "row")


class SequentialOrder:
    """Rows as they lie, once: the order of validation."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def rows(self, t0: int, t1: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(epoch 0, row t) of each sample t0 <= t < t1 <= num_rows."""
        if not 0 <= t0 <= t1 <= self.num_rows:
            raise ValueError(f"samples [{t0}, {t1}) are not in [0, {self.num_rows})")
        return self.at(np.arange(t0, t1, dtype=np.int64))

    def at(self, t: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(epoch 0, row t) of samples t (k,)."""
        return np.zeros_like(t), t


class FirstRows(SequentialOrder):
    """The first rows of each source, as they lie, once."""

    def __init__(self, row_offset: NDArray[np.int64], most: int) -> None:
        """row_offset: (sources + 1,) where the rows of each source begin; most: rows of each."""
        ends = np.minimum(row_offset[:-1] + most, row_offset[1:])
        rows = [np.arange(a, b) for a, b in zip(row_offset[:-1], ends, strict=True)]
        self._rows = np.concatenate(rows)
        super().__init__(len(self._rows))

    def at(self, t: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(epoch 0, row) of samples t (k,)."""
        return np.zeros_like(t), self._rows[t]


def rank_span(batch: int, coordinate: int, num_coordinates: int) -> tuple[int, int]:
    """Rows [lo, hi) of a batch for one data-parallel coordinate; sizes differ by one at most."""
    lo = coordinate * batch // num_coordinates
    return lo, (coordinate + 1) * batch // num_coordinates


def num_micro_batches(batch: int, num_coordinates: int, micro_batch: int) -> int:
    """Micro-batches that every coordinate runs for one step; short ones are padded."""
    if min(batch, num_coordinates, micro_batch) < 1:
        raise ConfigError(
            f"global batch {batch}, {num_coordinates} data-parallel ranks, micro-batch "
            f"{micro_batch}: each must be at least 1"
        )
    largest = -(-batch // num_coordinates)
    return -(-largest // micro_batch)


@dataclass(frozen=True, kw_only=True)
class OrderState:
    """Where a run stands in its data; the same on all ranks, a few hundred bytes."""

    data_digest: str
    seed: int
    step: int = 0
    """Optimizer steps completed."""
    t: int = 0
    """Samples consumed."""
    batch: int
    """Global batch of the segment that starts here."""
    algorithm: int = ALGORITHM_VERSION
    mode: str = "global"
    """global, or windowed (dist/windowed.py)."""
    lanes: int = 0
    window: int = 0
    """Shards; what was asked for."""
    block_rows: int = 0
    """Rows of a block, which `window` decided when the run began."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[list[int]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        if self.mode == "global":  # the record is what it was before there was another mode
            del record["block_rows"]
        return record

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> OrderState:
        """Parse a stored state; refuses another algorithm or a mode that this version lacks."""
        known = {f.name for f in dataclasses.fields(cls)}
        if set(record) - known:
            raise ConfigError(f"the order state holds unknown keys {sorted(set(record) - known)}")
        state = cls(**record)
        if state.algorithm != ALGORITHM_VERSION or state.mode not in MODES:
            raise ConfigError(
                f"the order state is of algorithm {state.algorithm}, mode {state.mode!r}; this "
                f"Leyden has algorithm {ALGORITHM_VERSION}, modes {', '.join(MODES)}"
            )
        return state
