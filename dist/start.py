"""How a training run starts, goes on and ends: identity, checks, attempt, lease, outcome."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dist.checkpoint import check_same_run, find_checkpoint, read_record
from dist.config import config_digest, to_yaml
from dist.drain import clear_request, end_soon, lost_peer
from dist.errors import ConfigError, DataRefused, SetupError, describe
from dist.examples import ExampleDataset, Packing, as_rows
from dist.folder_files import files_of
from dist.ranks import Ranks
from dist.run_dir import RunDir
from dist.skips import Skips, read_skipped
from dist.stages import begin_stage, open_run_dataset, read_stages
from dist.url_path import Place, UrlPath, place_of
from dist.verify import FULL_BELOW_BYTES, check_presence, verify_full


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which dataset, and when its bytes are checked."""

    url: str = ""
    """Dataset folder: URL (its newest version) or URL@hexprefix (that version)."""
    verify: Literal["auto", "full", "ahead"] = "auto"
    """full: hash all shards first; ahead: each before its first use; auto: full below 10 GiB."""
    packing: Packing = "packed"
    """Of a dataset of examples. packed: as many as fit share a row; padded: one a row."""
    seq_len: int = 0
    """Of a dataset of examples: input tokens of a row; 0: its max_length."""


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


def start_run(
    run: RunDir, config: Any, *, recipe: str, may_change: Iterable[str], stack: ExitStack
) -> Start:
    """Check the dataset, take the run, find the checkpoint to go on from. On rank 0 alone.

    `config` has `data: DataConfig`, `global_batch`, `max_steps`, `max_epochs` and,
    if its checkpoints may lie elsewhere, `checkpoint_url`. The lease is held until `stack` is left.
    Raises ConfigError or DataRefused where the run was started with other settings or data.
    """
    if not config.data.url:
        raise ConfigError("data.url is empty; pass --data.url FOLDER (what `leyden prep` wrote)")
    checkpoint_url = str(getattr(config, "checkpoint_url", ""))  # not every recipe has it
    check_place(checkpoint_url)
    if config.max_epochs < 0:
        raise ConfigError(f"max_epochs is {config.max_epochs}; it must be 0 (max_steps) or more")
    identity = run.read_run()
    if identity is not None:
        _switch(run, identity, str(getattr(config, "switch_data", None) or ""))
    dataset = open_run_dataset(run, identity, config.data.url)
    dataset = as_rows(dataset, config.data.packing, config.data.seq_len)
    dataset.manifest.shards_of("train")
    check_presence(dataset)
    # max_epochs = E means E * N samples, so its last step may be short.
    # In rows of the run's first dataset, whose order it keeps.
    stages = read_stages(run)
    num_rows = dataset.split("train").num_rows + len(stages.removed)
    end_t = config.max_epochs * num_rows or None
    most = (end_t or config.max_steps * config.global_batch) + num_rows
    skipped = stages.skipped(read_skipped(run), num_rows, config.seed, 2 * most)
    if end_t is not None:
        end_t -= Skips(skipped).left_out_before(end_t)

    def finished(step: int, t: int) -> bool:
        return t >= end_t if end_t else step >= config.max_steps

    if identity is not None:
        if (stages.digest or identity["data_digest"]) != dataset.data_digest:
            raise DataRefused(
                f"the run {run.path} trains on {identity['data']}, but {config.data.url} is now "
                f"version {dataset.data_digest[:12]}; pass --data.url {identity['data']}, or "
                "start another run (another --run, or --fresh)"
            )
        defaults = asdict(type(config)())
        check_same_run(
            identity["config"], asdict(config), may_change, f"the run {run.path}", defaults
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
        }
        if checkpoint_url:
            identity["checkpoint_url"] = str(place_of(checkpoint_url))
        run.write_run(identity, to_yaml(config))
    total_bytes = sum(shard.bytes for shard in dataset.manifest.shards)
    full = config.data.verify == "full"
    if full or (config.data.verify == "auto" and total_bytes < FULL_BELOW_BYTES):
        verify_full(dataset)
    if isinstance(dataset, ExampleDataset):
        for name in dataset.manifest.splits():
            print(dataset.describe(name), file=sys.stderr)
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
    max_steps = config.max_steps
    if end_t is not None:
        max_steps = step + math.ceil((end_t - t) / config.global_batch)
    return Start(
        data=dataset.reference, attempt=attempt, checkpoints=checkpoints, checkpoint=checkpoint,
        record=record, max_steps=max_steps, end_t=end_t, skipped=skipped, removed=stages.removed,
    )  # fmt: skip


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
