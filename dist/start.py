"""How a training run starts, goes on and ends: identity, checks, attempt, lease, outcome."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dist.cache import CacheConfig
from dist.checkpoint import check_same_run, find_checkpoint, read_record
from dist.config import config_digest, to_yaml
from dist.dataset import Dataset, MixedDataset
from dist.drain import clear_request, end_soon, lost_peer
from dist.errors import ConfigError, DataRefused, SetupError, describe
from dist.examples import ExampleDataset, Packing
from dist.folder_files import files_of
from dist.mixed_skips import RollbackRanges
from dist.mixture_stages import Standing, plan_stages, record_stages
from dist.open_shards import remote_notes
from dist.order_choice import OrderName
from dist.ranks import Ranks
from dist.run_dir import RunDir
from dist.run_order import first_order, mixed_order, order_of_start
from dist.skips import Skips, read_skipped
from dist.source_versions import first_tables, listed_sources, rows_removed
from dist.sources import SourceConfig, StageConfig, open_sources
from dist.stages import (
    LOOK_AHEAD_STEPS,
    begin_stage,
    open_run_dataset,
    read_stages,
    rows_of_run,
)
from dist.url_path import Place, UrlPath, place_of
from dist.verify import FULL_BELOW_BYTES, check_presence, verify_full
from dist.windowed import OrderMode


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which dataset, and when its bytes are checked."""

    url: str = ""
    """Dataset folder: URL (its newest version) or URL@hexprefix (that version)."""
    verify: Literal["auto", "full", "ahead"] = "auto"
    """full: hash all shards first; ahead: each before its first use; auto: full below 10 GiB of
    local data."""
    cache_dir: str = ""
    """Of a remote dataset: folder on a disk of the node; empty: $XDG_CACHE_HOME/leyden/shards."""
    cache_gb: float = 0.0
    """Of a remote dataset: 10^9 bytes that the folder may hold; 0: free space but for a margin."""
    order: OrderName = "auto"
    """global: any row next to any; windowed: few shards at a time, for object stores and network
    file systems; auto: by where the data lies. Decided when a run begins."""
    lanes: int = 0
    """Spans of rows that a windowed order reads side by side, a power of two up to 64, best a
    multiple of the nodes; 0: the largest that divides global_batch."""
    window: int = 0
    """Shards that rows of a lane are mixed over, half of those live in it; 0: by the lanes."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Several datasets with weights, instead of url: [{name: ..., url: ..., weight: ...}, ...]."""
    stages: list[StageConfig] = field(default_factory=list)
    """Other weights from a step or a sample on: [{from_step: ..., weights: {NAME: ...}}, ...]."""
    packing: Packing = "packed"
    """Of a dataset of examples. packed: as many as fit share a row; padded: one a row."""
    seq_len: int = 0
    """Of a dataset of examples: input tokens of a row; 0: its max_length."""

    def cache(self) -> CacheConfig:
        """Where shards of a remote dataset are kept."""
        return CacheConfig(folder=self.cache_dir, limit_gb=self.cache_gb)


@dataclass(frozen=True, kw_only=True)
class Start:
    """What rank 0 found and decided before training; the same on all ranks."""

    data: str
    """Dataset pinned to its version."""
    attempt: int = -1
    checkpoints: Place = Path()
    """Where its checkpoints are written."""
    checkpoint: Place | None = None
    """Where to go on; None for a new run."""
    record: dict[str, Any] | None = None
    """The checkpoint's record."""
    outcome: dict[str, Any] | None = None
    """Set if the run is complete already; nothing else is then."""
    max_steps: int = 0
    """Optimizer steps in all, earlier attempts included."""
    end_t: int | None = None
    """One past the last sample, where epochs were asked for."""
    skipped: list[list[int]] = field(default_factory=list)
    """Ranges of the data's stream that rollbacks and removed rows leave out."""
    removed: list[int] = field(default_factory=list)
    """Rows of train that the run's first dataset has and this one lacks."""
    order: dict[str, Any] = field(default_factory=dict)
    """Fields of OrderState that were frozen when the run began; {} for the global order."""


def start_run(
    run: RunDir, config: Any, *, recipe: str, may_change: Iterable[str], stack: ExitStack,
    facts: dict[str, str] | None = None,
) -> Start:  # fmt: skip
    """Check the dataset, take the run, find the checkpoint to go on from. On rank 0 alone.

    `config` has `data: DataConfig`, `global_batch`, `max_steps`, `max_epochs` and,
    if its checkpoints may lie elsewhere, `checkpoint_url`. The lease is held until `stack` is left.
    `facts`: what else the run is bound to, such as the digest of its base model.
    Raises ConfigError or DataRefused where the run was started with other settings or data.
    """
    if not config.data.url and not config.data.sources:
        raise ConfigError("data.url is empty; pass --data.url FOLDER (what `leyden prep` wrote)")
    checkpoint_url = str(getattr(config, "checkpoint_url", ""))  # not every recipe has it
    check_place(checkpoint_url)
    if config.max_epochs < 0:
        raise ConfigError(f"max_epochs is {config.max_epochs}; it must be 0 (max_steps) or more")
    identity = run.read_run()
    if identity is not None and not config.data.sources:
        _switch(run, identity, _switched(config))
    dataset = rows_of_run(run, _open_data(run, identity, config), config.data)
    for source in dataset.sources:
        source.manifest.shards_of("train")
        check_presence(source)
    # max_epochs = E means E * N samples, so its last step may be short.
    # In rows of the run's first dataset, whose order it keeps.
    stages = read_stages(run)
    num_rows = dataset.split("train").num_rows + len(stages.removed)
    mode = order_of_start(run, identity, config, dataset)
    if Ranks.from_environment().world_size > num_rows:
        raise ConfigError(
            f"{Ranks.from_environment().world_size} ranks and {num_rows} rows to train on; start "
            "fewer ranks, or give more data"
        )
    order = None
    if stages.lines:
        order = first_order(run, dataset, config.seed, mode, len(stages.removed))
    end_t = config.max_epochs * num_rows or None
    most = (end_t or config.max_steps * config.global_batch) + num_rows
    most += LOOK_AHEAD_STEPS * config.global_batch
    rolled_back = read_skipped(run)
    end = stages.reach(most, num_rows, rolled_back)
    skipped = stages.skipped(rolled_back, num_rows, config.seed, end, order)
    if end_t is not None:
        end_t -= Skips(skipped).left_out_before(end_t)

    def finished(step: int, t: int) -> bool:
        return t >= end_t if end_t else step >= config.max_steps

    if identity is not None:
        mixed = isinstance(dataset, MixedDataset)  # whose sources have been held against the run's
        if not mixed and (stages.digest or identity["data_digest"]) != dataset.data_digest:
            raise DataRefused(
                f"the run {run.path} trains on {identity['data']}, but {config.data.url} is now "
                f"version {dataset.data_digest[:12]}; pass --data.url {identity['data']}, or "
                "start another run (another --run, or --fresh)"
            )
        defaults = asdict(type(config)())
        check_same_run(
            identity["config"], asdict(config), may_change, f"the run {run.path}", defaults
        )
        for name, value in (facts or {}).items():
            if identity.get(name) != value:
                raise ConfigError(
                    f"the run {run.path} was started with the {name.replace('_', ' ')} "
                    f"{identity.get(name)}, which is now {value}; give it the old one, or start "
                    "another run (another --run, or --fresh)"
                )
    outcome = run.read_outcome()
    if (
        outcome
        and outcome["status"] == "completed"
        and finished(outcome["step"], outcome["samples"])
    ):
        return Start(data=dataset.reference, outcome=outcome)
    attempt = run.new_attempt(to_yaml(config))
    stack.enter_context(run.lease(attempt))
    clear_request(run.path)
    if identity is None:
        identity = {
            "recipe": recipe,
            "data": dataset.reference,
            "data_digest": dataset.data_digest,
            "config": asdict(config),
            "config_digest": config_digest(config),
            # What a model needs that is used without its dataset.
            "schema": dataset.schema,
            "tokenizer_digest": dataset.manifest.tokenizer_digest,
            **(facts or {}),
        }
        if mode.to_dict():
            identity["order"] = mode.to_dict()
        if isinstance(dataset, MixedDataset):
            identity["sources"] = listed_sources(dataset)
        if checkpoint_url:
            identity["checkpoint_url"] = str(place_of(checkpoint_url))
        run.write_run(identity, to_yaml(config))
    total_bytes = sum(shard.bytes for shard in dataset.manifest.shards)
    full = config.data.verify == "full"
    auto = config.data.verify == "auto" and not dataset.is_remote  # the cache hashes what it gets
    if full or (auto and total_bytes < FULL_BELOW_BYTES):
        for source in dataset.sources:
            verify_full(source)
    for source in dataset.sources:
        for note in remote_notes(source, mode.mode):
            print(note, file=sys.stderr)
        if isinstance(source, ExampleDataset):
            for name in source.manifest.splits():
                print(source.describe(name), file=sys.stderr)
    checkpoints = run.checkpoints
    checkpoint, passed_over = find_checkpoint(checkpoints)
    for reason in passed_over:
        print(f"passed over the checkpoint {reason}", file=sys.stderr)
    record = read_record(checkpoint) if checkpoint is not None else None
    step, t = (record["order"]["step"], record["order"]["t"]) if record is not None else (0, 0)
    if record is not None and finished(step, t):
        # Killed between the last save and its outcome.
        run.write_outcome(attempt, "completed", **record["facts"])
        return Start(data=dataset.reference, outcome=record["facts"])
    fields = mode.to_dict()
    if isinstance(dataset, MixedDataset):
        at = Standing.of(record)
        fields["stages"], skipped = _mixture_from(run, identity, dataset, config, mode, at)
        record_stages(run, attempt, t, dataset, fields["stages"], mode)
    max_steps = config.max_steps
    if end_t is not None:
        max_steps = step + math.ceil((end_t - t) / config.global_batch)
    return Start(
        data=dataset.reference, attempt=attempt, checkpoints=checkpoints, checkpoint=checkpoint,
        record=record, max_steps=max_steps, end_t=end_t, skipped=skipped, removed=stages.removed,
        order=fields,
    )  # fmt: skip


def _open_data(run: RunDir, identity: dict[str, Any] | None, config: Any) -> Dataset:
    """data.url or data.sources, as far as it may be what the run trains on."""
    if not config.data.sources:
        if identity is not None and "sources" in identity:
            raise ConfigError(
                f"the run {run.path} trains on several sources "
                f"({', '.join(one['name'] for one in identity['sources'])}); pass data.sources"
            )
        if config.data.stages:
            raise ConfigError("data.stages are weights of data.sources, and there are none")
        dataset = open_run_dataset(run, identity, config.data.url)
        return replace(dataset, cache_config=config.data.cache())
    if config.max_epochs:
        raise ConfigError(
            f"max_epochs is {config.max_epochs} with data.sources: each source ends its epochs at "
            "another sample; set max_steps"
        )
    return open_sources(run, identity, config.data, _switched(config))


def _switched(config: Any) -> str:
    return str(getattr(config, "switch_data", None) or "")


def _mixture_from(
    run: RunDir, identity: dict[str, Any], dataset: MixedDataset, config: Any, mode: OrderMode,
    at: Standing,
) -> tuple[list[dict[str, Any]], list[list[int]]]:  # fmt: skip
    """(stages, ranges of the mixed stream that are left out) of a run that stands `at`."""
    tables = first_tables(run, identity, dataset)

    def order_of(stages: list[dict[str, Any]]) -> Any:
        return mixed_order(tables, config.seed, mode, stages)

    ranges = RollbackRanges.of(run, at.skipped, at.position, order_of)
    stages = plan_stages(
        dataset.names, config, mode, tables, at=at, ranges=ranges, order_of=order_of,
        removed=rows_removed(run, identity, dataset),
    )  # fmt: skip
    return stages, ranges.under(stages)


def check_place(checkpoint_url: str) -> None:
    """Refuse, before anything is taken, a place that cannot hold a run's checkpoints."""
    place = place_of(checkpoint_url)
    if checkpoint_url and isinstance(place, UrlPath):
        files_of(place)  # an unknown scheme or a missing package
        if place.url.startswith("memory://") and Ranks.from_environment().world_size > 1:
            raise ConfigError(
                f"checkpoint_url {checkpoint_url}: memory is not shared between ranks; give a "
                "folder or an object store (s3://...)"
            )


def _switch(run: RunDir, identity: dict[str, Any], target: str) -> None:
    """Go on with a derived dataset from the newest checkpoint on (or from an older one)."""
    stages = read_stages(run)
    target = target or (stages.lines[-1]["data"] if stages.lines else "")
    if not target:
        return
    checkpoint, _ = find_checkpoint(run.checkpoints)
    t, skipped = 0, []
    if checkpoint is not None:
        order = read_record(checkpoint)["order"]
        t, skipped = order["t"], order["skipped"]
    begin_stage(run, identity, target, t, skipped)


@contextmanager
def failure_recorded(run: RunDir, attempt: int, ranks: Ranks) -> Iterator[None]:
    """Write the outcome of an attempt that ends by an error, which goes on.

    What a collective raises when another rank is gone becomes a short PeerLost. Threads may be
    left in collectives that nobody joins, so the process ends in seconds, come what may.
    """
    try:
        yield
    except Exception as error:
        end_soon()
        lost = lost_peer(error)
        if ranks.is_first:
            message, code = describe(lost or error) or (repr(error), 1)
            status = {3: "data_refused", 93: "no_restart"}.get(code, "failed")
            try:
                run.write_outcome(attempt, status, error=message)
            except (OSError, SetupError) as unwritten:
                # What ended the run is what the person must see, not that its folder is full.
                print(f"warning: {unwritten}", file=sys.stderr)
        if lost is not None:
            raise lost from error
        raise


def summary_line(outcome: dict[str, Any]) -> str:
    """A training outcome in one line."""
    validation = "not validated"
    if outcome["validation_targets"]:
        validation = (
            f"validation loss {outcome['validation_loss']:.3f} nats/token on "
            f"{outcome['validation_targets']:,} targets"
        )
    return (
        f"step {outcome['step']}/{outcome['max_steps']}, {outcome['tokens']:,} tokens, "
        f"{outcome['params'] / 1e6:.1f}M parameters, train loss {outcome['train_loss']:.3f}, "
        f"{validation}, {outcome['tokens_per_s']:,.0f} tokens/s"
    )
