"""The Lightning callbacks that watch a run: meter, profiler, heartbeats for the watchdog."""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed
from pytorch_lightning import Callback, Trainer
from torch.nn.parallel import DistributedDataParallel

from dist.batch import Batch
from dist.communication import CommunicationClock, why_not_measured
from dist.loggers import check_loggers, open_loggers
from dist.meter import (
    MeterConfig,
    Peak,
    Speed,
    TokenFlops,
    ddp_communication_s,
    device_peak,
    mfu,
    peak_memory_gib,
    verdict,
)
from dist.profiling import PROFILE, Window
from dist.ranks import Ranks
from dist.run_dir import RunDir
from dist.run_recorder import RunRecorder
from dist.watchdog import Watchdog, watch_run


class Monitor(Callback):
    """Meters a run. What it needs of a step it takes from the recorder when that logs."""

    def __init__(self, recorder: RunRecorder, config: MeterConfig, *, dtype: torch.dtype) -> None:
        self._recorder, self._config, self._dtype = recorder, config, dtype
        self._peak = Peak(flops=0.0, source="not asked for yet")
        self._flops: TokenFlops | None = None
        self._trainer: Trainer | None = None
        self._started = self._said = 0.0
        # Sums since the start: steps, seconds in steps, seconds of waiting for data, tokens.
        self._steps = self._in_steps_s = self._wait_s = self._tokens = 0.0
        self._clock: CommunicationClock | None = None
        self._not_measured = ""
        # The clock measures the steps that are logged: since when, and what it found.
        self._sample_since: float | None = None
        self._shares: list[float] = []
        recorder.more_metrics.append(self._measure)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._trainer = trainer
        self._flops = pl_module.token_flops()
        self._peak = device_peak(trainer.strategy.root_device, self._dtype, self._config)
        self._started = self._said = time.monotonic()
        self._not_measured = why_not_measured(pl_module.config.parallel.strategy)
        by_clock = trainer.world_size > 1 and not isinstance(trainer.model, DistributedDataParallel)
        if by_clock and not self._not_measured:
            self._clock = CommunicationClock(trainer.strategy.root_device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self._clock is not None and batch.micro == 0 and self._recorder.logs(batch):
            self._sample_since = time.perf_counter()
            self._clock.start()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._say()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if self._clock is not None:
            self._clock.stop()
        if not isinstance(exception, Exception):  # stopped on request, or rolled back
            self._say()

    def _measure(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Meter the steps since the last log; all ranks call it together."""
        trainer = self._trainer
        assert trainer is not None and self._flops is not None
        tokens_per_s, step_s = metrics["tokens_per_s"], metrics["step_s"]
        share = self._communication(trainer, step_s)
        longest = torch.tensor([float(metrics["data_wait_s"]), -1.0 if share is None else share])
        if trainer.world_size > 1:
            longest = longest.to(trainer.strategy.root_device)
            torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX)
        wait_s, share = longest.tolist()
        if share >= 0.0:
            self._shares.append(share)
        steps = metrics["steps"]
        self._steps += steps
        self._in_steps_s += steps * step_s
        self._wait_s += steps * wait_s
        self._tokens += steps * step_s * tokens_per_s
        found = {
            "data_wait_share": min(1.0, wait_s / step_s),
            "mfu": mfu(tokens_per_s, self._flops.full, self._peak, trainer.world_size),
            "mfu_causal": mfu(tokens_per_s, self._flops.causal, self._peak, trainer.world_size),
            "communication_share": share if share >= 0.0 else None,
            "peak_memory_mib": 1024 * peak_memory_gib(trainer.strategy.root_device),
        }
        if self._config.every_min and time.monotonic() - self._said > 60 * self._config.every_min:
            self._say()
        return {name: value for name, value in found.items() if value is not None}

    def _communication(self, trainer: Trainer, step_s: float) -> float | None:
        """Part of the step that has just ended in which this rank waited for others."""
        if trainer.world_size == 1:
            return 0.0
        if isinstance(trainer.model, DistributedDataParallel):
            waited_s = ddp_communication_s(trainer.model)
            return None if waited_s is None else min(1.0, waited_s / step_s)
        if self._clock is None or self._sample_since is None:
            return None
        self._clock.stop()
        # Beside a GPU the host runs ahead: its own seconds say nothing of the step.
        on_cpu = trainer.strategy.root_device.type == "cpu"
        sampled_s = time.perf_counter() - self._sample_since if on_cpu else step_s
        self._sample_since = None
        return min(1.0, self._clock.read_s() / max(sampled_s, 1e-9))

    def speed(self) -> Speed | None:
        """The attempt so far; None before its first log."""
        trainer = self._trainer
        if trainer is None or self._flops is None or not self._steps:
            return None
        tokens_per_s = self._tokens / self._in_steps_s
        step_s = self._in_steps_s / self._steps
        elapsed_s = max(time.monotonic() - self._started, self._in_steps_s)
        return Speed(
            tokens_per_s=tokens_per_s, step_s=step_s,
            data_share=min(1.0, self._wait_s / self._in_steps_s),
            communication_share=statistics.mean(self._shares) if self._shares else None,
            not_measured=self._not_measured,
            outside_share=1.0 - self._in_steps_s / elapsed_s,
            mfu=mfu(tokens_per_s, self._flops.full, self._peak, trainer.world_size),
            mfu_causal=mfu(tokens_per_s, self._flops.causal, self._peak, trainer.world_size),
            peak_memory_gib=peak_memory_gib(trainer.strategy.root_device),
        )  # fmt: skip

    def _say(self) -> None:
        self._said = time.monotonic()
        speed = self.speed()
        if speed is None or self._trainer is None or not self._trainer.is_global_zero:
            return
        if not self._config.every_min:
            return
        line = verdict(speed, self._peak)
        print(f"meter: {line}", file=sys.stderr)
        record = {"event": "meter", "verdict": line, "time": time.time()}
        try:
            self._recorder.write_line("ledger.jsonl", record)
        except OSError as error:
            print(f"warning: the meter cannot write: {error}", file=sys.stderr)


class Heartbeats(Callback):
    """Tells the watchdog of a rank how far it is."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._watchdog.start_over()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._watchdog.beat(batch.step, "forward")

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Any) -> None:
        self._watchdog.beat(self._watchdog.step, "backward")

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        self._watchdog.beat(self._watchdog.step, "after backward")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if batch.ends_step:
            self._watchdog.step_done()
        self._watchdog.beat(batch.step + int(batch.ends_step), "data")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self._watchdog.beat(self._watchdog.step, "validation")

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._watchdog.close()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._watchdog.close()


class ProfileSteps(Callback):
    """Profiles the window of steps that a config asks for."""

    def __init__(self, window: Window) -> None:
        self._window = window

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        if batch.micro == 0:
            self._window.before_step(batch.step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if batch.ends_step:
            self._window.after_step(batch.step)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._window.close()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, torch.OutOfMemoryError):
            self._window.out_of_memory()
        self._window.close()


def observers(
    run: RunDir, recorder: RunRecorder, config: Any, ranks: Ranks, stack: ExitStack, *,
    attempt: int, device: torch.device, dtype: torch.dtype, watchdog: Watchdog | None = None,
) -> list[Callback]:  # fmt: skip
    """The callbacks that watch a run, by config.meter, .watchdog, .log and .profile."""
    check_loggers(config.log)
    watchdog = watchdog or watch_run(run, attempt, config.watchdog, ranks, stack)
    if ranks.is_first and (loggers := open_loggers(run, config.log, attempt=attempt)):
        loggers.config(asdict(config))
        recorder.metric_sinks.append(loggers.log)
        stack.callback(loggers.close)
    return [
        Monitor(recorder, config.meter, dtype=dtype),
        ProfileSteps(Window(run.path / PROFILE, config.profile, ranks.rank, device)),
        Heartbeats(watchdog),
    ]
