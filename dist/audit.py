"""Who saw what: every step at which a row or a source is trained on, and a step's exact batch.

Both come from the order's closed form and the run's segments: no loader, no torch, no log of
rows. A test holds them against the rows that a real recipe's model received.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np

from dist.batch_layout import batch_samples
from dist.checked_shards import checked_rows
from dist.dataset import Dataset, open_dataset
from dist.errors import ConfigError, DataRefused
from dist.examples import rows_as_trained
from dist.lineage import RowRef, input_paths, refs_of
from dist.mixed_order import MixedOrder
from dist.order import Order
from dist.run_dir import RunDir
from dist.run_history import I64, History, Segment, read_config, read_history
from dist.run_order import mixed_order
from dist.skips import SkippingOrder, Skips
from dist.source_versions import open_run_sources
from dist.switched_rows import removed_rows, rows_of_run_key
from dist.tokenizer import TextTokenizer
from dist.windowed import make_order

TRAIN = "train"


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """One time at which a row is trained on."""

    split: str
    row: int
    epoch: int
    t: int
    step: int
    rank: int
    """Data-parallel rank of `world_size`."""
    world_size: int
    micro: int
    index: int
    """Row of the micro-batch."""
    attempt: int
    consumed: bool
    planned: bool
    """False for a step after the planned end: it would come if the run were made longer."""
    source: str = ""
    """Of a mixture; `epoch` is its own."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What who_saw found."""

    data: str
    key: str
    rows: list[RowRef]
    sightings: list[Sighting]
    """By sample; none for rows that are not of the split `train`."""
    epochs: int
    steps_done: int
    planned_steps: int | None
    removed: dict[int, str] = field(default_factory=dict)
    """Rows that later stages of the run left out, each with the version that lacks it."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of a document in a row."""

    input: int
    path: str
    """Of the input file, as the provenance names it; '' if the provenance is gone."""
    offset: int
    tokens: int
    text: str | None
    """None without a tokenizer."""


@dataclass(frozen=True, kw_only=True)
class ReplayedRow:
    """A row of a step's batch, with its place and its source documents."""

    t: int
    epoch: int
    rank: int
    micro: int
    index: int
    row: int
    shard: str
    row_in_shard: int
    pieces: list[Piece]
    source: str = ""
    """Of a mixture; `epoch` is its own."""
    source_row: int = -1
    """Row of the source's split; `row` runs on from one source to the next."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The exact global batch of a step."""

    data: str
    step: int
    attempt: int
    t0: int
    t1: int
    world_size: int
    consumed: bool
    rows: list[ReplayedRow]


def who_saw(
    run: RunDir, key: str, *, epochs: int | None = None, data: str = "", progress: bool = True
) -> Answer:
    """Every (epoch, step, rank, micro-batch) at which what `key` names is trained on.

    key: `SPLIT:ROW`, `SHARD_DIGEST_PREFIX:ROW`, or an input's path, or PATH@OFFSET of a document;
    of a mixture's source as `SOURCE/KEY`.
    epochs: how many to answer for (None: as many as the run consumed or plans). data: where the
    dataset lies now, if it was moved. Raises ConfigError for a key that names nothing.
    """
    dataset = open_run_data(run, data)
    num_rows = dataset.split(TRAIN).num_rows
    history = read_history(run, num_rows)
    rows = rows_of_run_key(run, dataset, key, progress=progress)
    order = order_of_segment(dataset, history.segments[-1])
    if epochs is None:
        epochs = epochs_of(order, history.end_t)
    numbers = np.array([ref.row for ref in rows if ref.split == TRAIN], np.int64)
    sightings = sightings_of(history, num_rows, numbers, epochs, order)
    sources = {ref.row: ref.source for ref in rows if ref.split == TRAIN}
    sightings = [replace(one, source=sources[one.row]) for one in sightings]
    return Answer(
        data=dataset.reference, key=key, rows=rows, sightings=sightings, epochs=epochs,
        steps_done=history.next_step, planned_steps=history.planned_steps,
        removed={row: one for row, one in removed_rows(run, dataset).items() if row in numbers},
    )  # fmt: skip


def order_of_segment(dataset: Dataset, segment: Segment) -> SkippingOrder:
    """The order of a run's rows, as it was when a segment began. dataset: the run's first."""
    skips = Skips(segment.skipped)
    if segment.stages:
        stages = list(segment.stages)
        tables = [part.split(TRAIN).row_start for part in dataset.sources]
        return SkippingOrder(mixed_order(tables, segment.seed, segment.mode, stages), skips)
    order = make_order(dataset.split(TRAIN).row_start, segment.seed, segment.mode)
    return SkippingOrder(order, skips)


def epochs_of(order: SkippingOrder, end_t: int) -> int:
    """Epochs that the samples before end_t touch, of the source that has most; at least 1."""
    if not isinstance(order.stream, MixedOrder):
        # Rows that were left out are part of the stream that epochs are cut from.
        last = int(order.skips.to_stream(np.array([max(end_t, 1) - 1]))[0])
        return last // order.stream.num_rows + 1
    mixed = order.stream
    end = int(order.skips.to_stream(np.array([end_t]))[0])
    counts = mixed.mixture.counts_at(-(-end // mixed.lanes))
    return max(1, *(mixed.epochs_of(s, count * mixed.lanes) for s, count in enumerate(counts)))


def sightings_of(
    history: History, num_rows: int, rows: I64, epochs: int, order: Any = None
) -> list[Sighting]:
    """Sightings of train rows (k,) in epochs 0 to `epochs`, by sample; `rows` of `num_rows`.

    order: of the run's rows, where it is not the global one.
    """
    first = history.segments[0]
    stream = order.stream if order is not None else Order(num_rows, first.seed)
    # What later rollbacks left out changed nothing for the segments before them.
    skips = Skips(history.segments[-1].skipped)
    found = []
    for epoch in range(epochs):
        t = skips.to_sample(stream.positions(rows, epoch))
        by_time = np.argsort(t)[np.count_nonzero(t < 0) :]  # -1: left out by a rollback
        place = history.places(t[by_time], order)
        columns = zip(
            rows[by_time].tolist(), t[by_time].tolist(), place.step.tolist(),
            place.rank.tolist(), place.world_size.tolist(), place.micro.tolist(),
            place.index.tolist(), place.attempt.tolist(), strict=True,
        )  # fmt: skip
        found += [
            Sighting(
                split=TRAIN, row=row, epoch=epoch, t=t_, step=step, rank=rank,
                world_size=world_size, micro=micro, index=index, attempt=attempt,
                consumed=step < history.next_step,
                planned=history.planned_steps is None or step < history.planned_steps,
            )
            for row, t_, step, rank, world_size, micro, index, attempt in columns
        ]  # fmt: skip
    return found


def replay(
    run: RunDir, step: int, *, rank: int | None = None, data: str = "", text: bool = True
) -> Replay:
    """The global batch of a step, or one rank's part of it, read from the shards.

    Raises ConfigError for a step that the run neither consumed nor plans, or another rank.
    """
    dataset = open_run_data(run, data)
    split = dataset.split(TRAIN)
    history = read_history(run, split.num_rows)
    if not 0 <= step < history.known_steps:
        raise ConfigError(
            f"step {step} is not a step of the run {run.path}: it has steps 0 to "
            f"{history.known_steps - 1} ({history.next_step} done)"
        )
    t0, t1 = history.samples_of(step)
    segment = history.segment_of(step)
    if rank is not None and not 0 <= rank < segment.world_size:
        raise ConfigError(
            f"rank {rank}: step {step} ran on {segment.world_size} data-parallel ranks, "
            f"0 to {segment.world_size - 1} (attempt {segment.attempt})"
        )
    order = order_of_segment(dataset, segment)
    epoch, numbers = order.rows(t0, t1)
    place = history.places(np.arange(t0, t1), order)
    # As the ranks take them, rank by rank.
    mine = batch_samples(order, t0, t1) - t0
    mine = mine if rank is None else mine[place.rank[mine] == rank]
    refs = refs_of(split, numbers[mine], dataset)
    pieces = read_pieces(dataset, refs, text=text)
    rows = [
        ReplayedRow(
            t=t0 + i, epoch=int(epoch[i]), rank=int(place.rank[i]), micro=int(place.micro[i]),
            index=int(place.index[i]), row=ref.row, shard=ref.shard,
            row_in_shard=ref.row_in_shard, pieces=cut, source=ref.source,
            source_row=ref.source_row,
        )
        for i, ref, cut in zip(mine.tolist(), refs, pieces, strict=True)
    ]  # fmt: skip
    return Replay(
        data=dataset.reference, step=step, attempt=segment.attempt, t0=t0, t1=t1,
        world_size=segment.world_size, consumed=step < history.next_step, rows=rows,
    )  # fmt: skip


def open_run_data(run: RunDir, data: str = "") -> Dataset:
    """The dataset that the run trained on: at `data`, where it was, or where it moved to.

    Raises DataRefused for another version than the run's.
    """
    identity = run.read_run()
    if identity is None:
        raise ConfigError(f"{run.path} has no run.json: it is not a run, or it never started")
    if "sources" in identity:
        mixed = open_run_sources(run, identity, data)
        return rows_as_trained(mixed, identity.get("config") or {})
    digest = identity["data_digest"]
    moved = str((read_config(run).get("data") or {}).get("url") or "").partition("@")[0]
    places = [data] if data else [identity["data"].partition("@")[0], *([moved] if moved else [])]
    for number, url in enumerate(places):
        try:
            dataset = open_dataset(f"{url.partition('@')[0]}@{digest}")
            return rows_as_trained(dataset, identity.get("config") or {})
        except (ConfigError, DataRefused) as error:
            if number == len(places) - 1:
                raise DataRefused(
                    f"the data of the run {run.path} cannot be opened: {error}; if it was moved, "
                    "pass --data FOLDER"
                ) from None
    raise AssertionError("unreachable: there is always a place to look")


def read_pieces(dataset: Dataset, refs: list[RowRef], *, text: bool) -> list[list[Piece]]:
    """Pieces of each row, decoded if asked and if the dataset has its tokenizer."""
    names = getattr(dataset, "names", ("",))
    paths = {name: input_paths(one) for name, one in zip(names, dataset.sources, strict=True)}
    tokenizer = None
    if text and dataset.manifest.tokenizer_digest is not None:
        tokenizer = TextTokenizer(dataset.read_tokenizer())
    pieces: list[list[Piece]] = [[] for _ in refs]
    # Shard by shard: one map is open at a time, however many the batch touches.
    by_shard = sorted(range(len(refs)), key=lambda i: (refs[i].shard, refs[i].source))
    for (name, mixed_in), numbers in groupby(
        by_shard, key=lambda i: (refs[i].shard, refs[i].source)
    ):
        here, own = list(numbers), paths[mixed_in]
        split = dataset.sources[names.index(mixed_in)].split(refs[here[0]].split)
        at = next(i for i, shard in enumerate(split.shards) if shard.name == name)
        wanted = np.array([refs[number].row_in_shard for number in here])
        path = checked_rows(dataset.sources[names.index(mixed_in)], split, at, wanted)
        shard = split.open_shard(at, path)
        for number in here:
            row, start = refs[number].row_in_shard, 0
            tokens = shard.tokens(row, row + 1)[0]
            for source, offset, length in shard.lineage(row):
                said = tokenizer.decode(tokens[start : start + length]) if tokenizer else None
                name = (own[source][0] or own[source][1]) if source < len(own) else ""
                pieces[number].append(
                    Piece(input=source, path=name, offset=offset, tokens=length, text=said)
                )
                start += length
        shard.close()
    return pieces
