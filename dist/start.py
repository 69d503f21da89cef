"""How a training run starts, goes on and ends: identity, checks, attempt, lease, outcome."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dist.checkpoint import check_same_run, find_checkpoint, read_record
from dist.config import config_digest, to_yaml
from dist.dataset import open_dataset
from dist.errors import ConfigError, DataRefused, describe
from dist.ranks import Ranks
from dist.run_dir import RunDir
from dist.verify import FULL_BELOW_BYTES, check_presence, verify_full


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which dataset, and when its bytes are checked."""

    url: str = ""
    """Dataset folder: URL (its newest version) or URL@hexprefix (that version)."""
    verify: Literal["auto", "full", "ahead"] = "auto"
    """full: hash all shards first; ahead: each before its first use; auto: full below 10 GiB."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What rank 0 found and decided before training; the same on all ranks."""

    data: str
    """Dataset pinned to its version."""
    attempt: int = -1
    checkpoint: Path | None = None
    """Where to go on; None for a new run."""
    record: dict[str, Any] | None = None
    """The checkpoint's record."""
    outcome: dict[str, Any] | None = None
    """Set if the run is complete already; nothing else is then."""


def start_run(
    run: RunDir, config: Any, *, recipe: str, may_change: Iterable[str], stack: ExitStack
) -> Start:
    """Check the dataset, take the run, find the checkpoint to go on from. On rank 0 alone.

    `config` has `data: DataConfig` and `max_steps`. The lease is held until `stack` is left.
    Raises ConfigError or DataRefused where the run was started with other settings or data.
    """
    if not config.data.url:
        raise ConfigError("data.url is empty; pass --data.url FOLDER (what `leyden prep` wrote)")
    dataset = open_dataset(config.data.url)
    dataset.manifest.shards_of("train")
    check_presence(dataset)
    identity = run.read_run()
    if identity is not None:
        if identity["data_digest"] != dataset.data_digest:
            raise DataRefused(
                f"the run {run.path} trains on {identity['data']}, but {config.data.url} is now "
                f"version {dataset.data_digest[:12]}; pass --data.url {identity['data']}, or "
                "start another run (another --run, or --fresh)"
            )
        check_same_run(identity["config"], asdict(config), may_change, f"the run {run.path}")
    outcome = run.read_outcome()
    if outcome and outcome["status"] == "completed" and outcome["step"] >= config.max_steps:
        return Start(data=dataset.reference, outcome=outcome)
    attempt = run.new_attempt(to_yaml(config))
    stack.enter_context(run.lease(attempt))
    if identity is None:
        identity = {
            "recipe": recipe,
            "data": dataset.reference,
            "data_digest": dataset.data_digest,
            "config": asdict(config),
            "config_digest": config_digest(config),
        }
        run.write_run(identity, to_yaml(config))
    total_bytes = sum(shard.bytes for shard in dataset.manifest.shards)
    full = config.data.verify == "full"
    if full or (config.data.verify == "auto" and total_bytes < FULL_BELOW_BYTES):
        verify_full(dataset)
    checkpoint, passed_over = find_checkpoint(run.checkpoints)
    for reason in passed_over:
        print(f"passed over the checkpoint {reason}", file=sys.stderr)
    record = read_record(checkpoint) if checkpoint is not None else None
    if record is not None and record["order"]["step"] >= config.max_steps:
        # Killed between the last save and its outcome.
        run.write_outcome(attempt, "completed", **record["facts"])
        return Start(data=dataset.reference, outcome=record["facts"])
    return Start(data=dataset.reference, attempt=attempt, checkpoint=checkpoint, record=record)


@contextmanager
def failure_recorded(run: RunDir, attempt: int, ranks: Ranks) -> Iterator[None]:
    """Write the outcome of an attempt that ends by an error, which goes on."""
    try:
        yield
    except Exception as error:
        if ranks.is_first:
            message, code = describe(error) or (repr(error), 1)
            run.write_outcome(attempt, "data_refused" if code == 3 else "failed", error=message)
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
