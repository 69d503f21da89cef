"""A run that goes on with a derived dataset: the same order, without the rows that were removed.

`leyden prep quarantine` derives a version whose rows keep their order. From the sample at which a
run switches to it, the run's order leaves the removed rows out, in this epoch and all later ones:
no row of the epoch comes twice, none but the removed is missed. Rows are still numbered as in the
dataset that the run began with, here `first`; the derived shards' numbers follow from them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist.cache import CacheConfig
from dist.data_pin import is_pin
from dist.dataset import Dataset, open_dataset
from dist.errors import ConfigError, DataRefused
from dist.examples import as_rows, keep_rows, records_of_rows, rows_as_trained, rows_of_records
from dist.manifest import parse_reference
from dist.order import Order
from dist.run_dir import RunDir
from dist.skips import Skips, merge_ranges

STAGES = "stages.jsonl"
LOOK_AHEAD_STEPS = 64
"""Steps whose shards the loader names ahead, also past the end of the run."""
I64 = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The switches of a run, as its stages.jsonl has them."""

    lines: list[dict[str, Any]]

    @property
    def digest(self) -> str | None:
        """The version that the run trains on; None if it never switched."""
        return self.lines[-1]["data_digest"] if self.lines else None

    @property
    def removed(self) -> list[int]:
        """Rows of train that are left out in the end, numbered as in the first dataset."""
        return sorted({row for line in self.lines for row in line["removed"]})

    def late(self, position: int) -> list[int]:
        """Rows that are left out, but only from later positions on than this one."""
        first: dict[int, int] = {}
        for line in self.lines:
            for row in line["removed"]:
                first[row] = min(first.get(row, line["position"]), line["position"])
        return sorted(row for row, begins in first.items() if begins > position)

    def reach(self, samples: int, num_rows: int, ranges: Sequence[Sequence[int]]) -> int:
        """A position in the stream, of `num_rows` an epoch, before which that many samples are left
        without `ranges` and the removed rows."""
        taken = samples + sum(p1 - p0 for p0, p1 in ranges)
        return max(2 * taken, taken * num_rows // (num_rows - len(self.removed)) + num_rows)

    def skipped(
        self, ranges: list[list[int]], num_rows: int, seed: int, end: int, order: Any = None
    ) -> list[Any]:
        """`ranges` and the removed rows' positions in the stream, up to position `end`.

        num_rows: of the first dataset; order: over its rows, where it is not the global one.
        """
        order = order or Order(num_rows, seed)
        found = list(ranges)
        for line in self.lines:
            rows = np.array(line["removed"], np.int64)
            for epoch in range(line["position"] // num_rows, end // num_rows + 1):
                at = order.positions(rows, epoch)
                found += [[p, p + 1] for p in at.tolist() if p >= line["position"]]
        return merge_ranges(found)


class DerivedOrder:
    """An order over the first dataset's rows, renumbered for a derived one without `removed`."""

    def __init__(self, order: Any, removed: Sequence[int]) -> None:
        """order: a SkippingOrder, or of a mixture's source a ThinnedOrder; removed: ascending."""
        self._order, self._removed = order, np.array(removed, np.int64)
        self.num_rows = order.num_rows - len(removed)
        self.lanes: int = getattr(order, "lanes", 1)

    def layout(self, t0: int, t1: int) -> I64:
        """As the first dataset's order lays a batch out."""
        return self._order.layout(t0, t1)

    def rows(self, t0: int, t1: int) -> tuple[I64, I64]:
        """(epoch, row of the derived dataset) of each sample t0 <= t < t1."""
        return self._renumbered(*self._order.rows(t0, t1))

    def at(self, t: I64) -> tuple[I64, I64]:
        """(epoch, row of the derived dataset) of samples t (k,)."""
        return self._renumbered(*self._order.at(t))

    def live_shards(self, t: int, lanes: Any = None) -> I64:
        """As WindowedOrder.live_shards, by number in the derived dataset's table.

        Which lacks the shards that held removed rows alone.
        """
        table = self._order.stream.row_start
        kept = np.diff(np.searchsorted(self._removed, table)) < np.diff(table)
        live = self._order.live_shards(t, lanes)
        return (np.cumsum(kept) - 1)[live[kept[live]]]

    def to_stream(self, t: I64) -> I64:
        """As ThinnedOrder.to_stream, of a mixture's source."""
        return self._order.to_stream(t)

    @property
    def row_start(self) -> I64:
        """Of the derived dataset's shards, (shards + 1,)."""
        table = self._order.stream.row_start
        return np.unique(table - np.searchsorted(self._removed, table))

    def _renumbered(self, epoch: I64, rows: I64) -> tuple[I64, I64]:
        before = np.searchsorted(self._removed, rows)
        met = before < len(self._removed)
        if met.any() and (self._removed[before[met]] == rows[met]).any():
            raise DataRefused(
                "the order holds a removed row: stages.jsonl, mixture.jsonl or guard/skipped.jsonl "
                "of the run was edited, or the run was made longer without a restart"
            )
        return epoch, rows - before


def read_stages(run: RunDir) -> Stages:
    """The switches of a run so far."""
    return Stages(lines=run.read_lines(STAGES))


def begin_stage(run: RunDir, identity: dict[str, Any], target: str, t: int, skipped: Any) -> Stages:
    """Record that the run goes on with `target` from sample t on; nothing if it does already.

    skipped: ranges of the stream left out before. Raises DataRefused unless `target` is derived
    from the version that the run is on.
    """
    stages = read_stages(run)
    dataset = open_dataset(target)
    # The stream without the removal: what stands before sample t stays as it is.
    position = int(Skips(skipped).to_stream(np.array([t]))[0])
    if stages.digest == dataset.data_digest:
        if late := stages.late(position):
            # An older checkpoint than that of a switch: its removal begins earlier.
            run.append(STAGES, {**stages.lines[-1], "position": position, "removed": late})
        return read_stages(run)
    current = stages.digest or identity["data_digest"]
    record = dataset.read_provenance() or {}
    if record.get("parent") != current or "removed" not in record:
        raise DataRefused(
            f"{dataset.reference} is not derived by `leyden prep quarantine` from what the run "
            f"{run.path} trains on, {current[:12]} (its parent: {record.get('parent')}); only "
            "such a version can be switched to"
        )
    removed = first_numbers(record["removed"]["rows"], stages.removed)
    if dataset.manifest.kind == "examples":
        # Of packed examples, records of the files are not rows.
        first = first_dataset(run, identity, dataset.storage.url)
        split = rows_as_trained(first, identity.get("config") or {}).split("train")
        gone = records_of_rows(split, stages.removed)
        records = first_numbers(record["removed"]["rows"], gone)
        try:
            removed = rows_of_records(split, records)
        except ValueError as error:
            raise ConfigError(
                f"{dataset.reference} lacks some examples only of a row that the run {run.path} "
                f"packs them into ({error}): it was derived for rows of another data.packing or "
                f"data.seq_len. Begin a run with --data.url {target}, or derive a version from a "
                "bundle of this run"
            ) from None
    removed = sorted({*removed, *stages.late(position)})  # all that the version of now lacks
    run.append(
        STAGES,
        {"t": t, "position": position, "data": dataset.reference, "removed": removed,
         "data_digest": dataset.data_digest, "parent": current},
    )  # fmt: skip
    return read_stages(run)


def first_dataset(run: RunDir, identity: dict[str, Any], near: str = "") -> Dataset:
    """The version that a run on one dataset began with: where it was, or beside the newest one."""
    place, _, digest = str(identity["data"]).rpartition("@")
    for url in (place, near):
        try:
            return open_dataset(f"{url}@{digest}")
        except (ConfigError, DataRefused) as error:
            said = error
    raise DataRefused(
        f"the run {run.path} began with {identity['data']}, which cannot be opened: {said}; its "
        "order needs that version's manifest (of examples also lengths/), so bring it back"
    )


def rows_of_run(run: RunDir, dataset: Dataset, data: Any) -> Dataset:
    """The newest version that a run switched to, or its only one, as the rows that it trains on.

    data: the config's packing and seq_len. Packed rows are those that the run began with.
    """
    made = as_rows(dataset, data.packing, data.seq_len)
    removed, identity = read_stages(run).removed, run.read_run()
    if not removed or identity is None or dataset.manifest.kind != "examples":
        return made
    return keep_rows(made, first_dataset(run, identity, dataset.storage.url), removed)


def first_numbers(rows: list[int], removed: list[int]) -> list[int]:
    """Rows of a dataset without `removed`, numbered as in the one with them."""
    # Before removed[i] there are removed[i] - i rows of the dataset without them.
    kept_before = np.array(removed, np.int64) - np.arange(len(removed))
    numbers = np.sort(np.array(rows, np.int64))
    return (numbers + np.searchsorted(kept_before, numbers, side="right")).tolist()


def open_as_begun(url: str, digest: str, cache: CacheConfig | None = None) -> Dataset:
    """What `url` names for a run that began with version `digest`: a LATEST that moved is not
    followed while that version is there. Says so; a caller refuses what is another version.
    """
    given = open_dataset(url, cache)
    place, prefix = parse_reference(url)
    if given.data_digest == digest or prefix is not None or is_pin(place):
        return given
    try:
        begun = open_dataset(f"{place}@{digest}", cache)
    except (ConfigError, DataRefused):
        return given
    print(
        f"data: {place} has a newer version, {given.data_digest[:12]}; the run goes on with "
        f"{digest[:12]}, which it began with",
        file=sys.stderr,
    )
    return begun


def open_run_dataset(run: RunDir, identity: dict[str, Any] | None, url: str) -> Dataset:
    """The dataset that a run trains on now: of its newest stage, or at `url`.

    `url` may name any version that the run was on.
    """
    stages = read_stages(run)
    if identity is None:
        return open_dataset(url)
    given = open_as_begun(url, identity["data_digest"])
    if stages.digest is None:
        return given
    known = {identity["data_digest"], *(line["data_digest"] for line in stages.lines)}
    if given.data_digest not in known:
        return given  # refused by the caller, by both names
    return open_dataset(stages.lines[-1]["data"])
