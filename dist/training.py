"""What every recipe does around its model and its Trainer: the callbacks of a run, its main."""

from __future__ import annotations

import faulthandler
import gc
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pytorch_lightning import Callback, Trainer

from dist.attention import describe_attention
from dist.checkpoint_callback import Checkpoints
from dist.compile import Compile, decide_compile
from dist.config import parse_config
from dist.dataset import Dataset
from dist.drain import StopFlag, die_with_launcher, end_if_peer_lost, end_process
from dist.errors import ConfigError
from dist.guard import Guard
from dist.loader import TokenLoader
from dist.mesh import PeerFailed, on_rank_zero, stop_process_group
from dist.monitor import observers
from dist.numerics import Numerics
from dist.order import OrderState
from dist.precision import Precision, decide_precision
from dist.ranks import Ranks
from dist.replica_check import ReplicaCheck
from dist.run_dir import RunDir
from dist.run_guard import RunGuard, run_attempts
from dist.run_recorder import RunRecorder
from dist.start import Start, summary_line
from dist.start_watch import cancel_start_watch, watch_start
from dist.strategies import StepTimeout
from dist.watchdog import Watchdog

Config = TypeVar("Config")
FIRST_SPEAKS_WITHIN_S = 60.0
"""So long do other ranks wait with an error that rank 0 has too. The first rank that ends has the
launcher end all others, and on a busy machine rank 0 may not have read its config yet."""

# What a run may change when it goes on; anything else would make it another run. A dataset may
# move: its digest decides.
MAY_CHANGE = (
    # The order is frozen in its own way: `auto` may mean what the run has.
    "data.url", "data.verify", "data.cache_dir", "data.cache_gb", "data.order", "data.lanes",
    "data.window", "data.sources", "data.stages",
    "switch_data", "parallel", "activation_checkpointing", "micro_batch", "compile",
    "max_steps", "max_epochs", "val_every_steps", "val_rows",
    "save_every_steps", "log_every_steps", "guard", "meter", "watchdog", "log", "profile", "keep",
    "keep_best", "async_save", "max_failed_saves", "run", "run_root",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Numeric:
    """How a run computes, decided alike on all ranks; the text of each gives the reason."""

    precision: Precision
    compiled: Compile
    attention: str


def decide_numerics(config: Any, device: torch.device) -> Numeric:
    """By config.precision, .compile and .model.attention_dropout (if any), and by the hardware."""
    dropout = getattr(getattr(config, "model", None), "attention_dropout", 0.0)
    precision = on_rank_zero(lambda: decide_precision(config.precision, device))
    return Numeric(
        precision=precision,
        compiled=decide_compile(config.compile or "off", device),
        attention=describe_attention(device, precision.compute_dtype, dropout),
    )


class LongLived(Callback):
    """Leaves what exists when training starts out of garbage collections.

    A full one looks through 400,000 objects, most of them the imports': a rank stands still for
    0.25 s and all others wait for it, each rank at a moment of its own.
    """

    def __init__(self, stack: ExitStack) -> None:
        stack.callback(gc.unfreeze)  # or a process that trains twice keeps the first model

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        gc.collect()
        gc.freeze()


def run_callbacks(
    run: RunDir, start: Start, config: Any, ranks: Ranks, stack: ExitStack, *,
    dataset: Dataset, loader: TokenLoader, state: OrderState, guard: Guard, numeric: Numeric,
    device: torch.device, may_change: tuple[str, ...], watchdog: Watchdog | None = None,
) -> tuple[RunRecorder, list[Callback]]:  # fmt: skip
    """The recorder, and all callbacks in the order that they need: records, guard, checkpoints
    (so that nothing is saved that was not judged), then what only watches."""
    recorder = RunRecorder(
        run, state, loader, attempt=start.attempt, seq_len=dataset.schema["seq_len"],
        log_every_steps=config.log_every_steps, max_steps=config.max_steps,
    )  # fmt: skip
    checkpoints = Checkpoints(
        run, recorder,
        record={"config": asdict(config), "data": start.data, "seed": config.seed},
        attempt=start.attempt, config=config, folder=start.checkpoints,
        resume_from=(start.checkpoint, start.record) if start.checkpoint else None,
        may_change=may_change,
    )  # fmt: skip
    kernels = {
        "precision": str(numeric.precision),
        "attention": numeric.attention,
        "compile": str(numeric.compiled),
    }
    acting = RunGuard(
        run, guard, recorder, checkpoints, dataset=dataset, loader=loader,
        attempt=start.attempt, config=config, record=start.record,
    )  # fmt: skip
    watching = observers(
        run, recorder, config, ranks, stack,
        attempt=start.attempt, device=device, dtype=numeric.precision.compute_dtype,
        watchdog=watchdog,
    )  # fmt: skip
    timeout = StepTimeout(config.parallel.step_timeout_s)
    numerics = Numerics(run, start.attempt, kernels)
    replicas = ReplicaCheck(recorder, config)
    judging = [recorder, numerics, acting, replicas, checkpoints]
    return recorder, [LongLived(stack), *judging, timeout, *watching]


def end_of_run(
    run: RunDir, start: Start, config: Any, ranks: Ranks, recorder: RunRecorder, module: Any,
    trainer: Trainer, stop: StopFlag, *, precision: Precision, seconds: float,
) -> int:  # fmt: skip
    """Write the attempt's outcome and the closing line; the exit code."""
    facts = {
        **recorder.facts(module),
        "seconds": seconds,
        "ranks": ranks.world_size,
        "strategy": config.parallel.strategy,
        "precision": str(precision),
        "data": start.data,
    }
    completed = facts["step"] >= facts["max_steps"]
    if ranks.is_first:
        status = "completed" if completed else "stopped"
        run.write_outcome(start.attempt, status, **facts)
        print(f"{run.path}: {status}: {summary_line(facts)}")
    return 0 if completed or (trainer.fast_dev_run and not stop()) else stop.exit_code


def main_of(
    cls: type[Config], run: Callable[[Config, Ranks, ExitStack], int], *,
    prog: str, description: str, configs: Path, prefix: str,
) -> int:  # fmt: skip
    """Parse the command line and run; only rank 0 reports what is wrong for all."""
    # A rank that C code kills (a damaged library, a signal) says in which call it was.
    faulthandler.enable(2)
    die_with_launcher()
    ranks = Ranks.from_environment()
    try:
        config = parse_config(
            cls,
            [word for word in sys.argv[1:] if word != "--"],
            prog=prog, description=description, configs=configs, prefix=prefix,
        )  # fmt: skip
    except ConfigError:
        if not ranks.is_first:
            time.sleep(FIRST_SPEAKS_WITHIN_S)  # the launcher ends this rank meanwhile
        raise
    watchdog = getattr(config, "watchdog", None)
    if watchdog is not None:
        name = str(getattr(config, "run", ""))
        folder = Path(name) if "/" in name else Path(getattr(config, "run_root", "")) / name
        limit_s = watchdog.start_timeout_s if watchdog.timeout_s else 0.0
        watch_start(limit_s, ranks, folder if name else None)
    try:
        code = run_attempts(run, config, ranks)
    except PeerFailed as error:
        code = error.exit_code
    except Exception as error:
        end_if_peer_lost(error)
        raise
    finally:
        cancel_start_watch()
    if ranks.world_size > 1:
        # All is written. A gather thread may sit in an all-reduce of a step that nobody takes:
        # destroying its group, or the interpreter, under it is an abort now and then.
        end_process(code)
    stop_process_group()
    return code
