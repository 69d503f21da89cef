"""The Lightning callback that keeps a run's records, and where its data stands."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed
from pytorch_lightning import Callback, LightningModule, Trainer

from dist.batch import Batch
from dist.drain import end_soon, lost_peer
from dist.errors import ConfigError, DataRefused
from dist.loader import TokenLoader
from dist.order import OrderState
from dist.progress import Progress
from dist.run_dir import RunDir
from dist.sharding import num_parameters
from dist.source_loss import SourceLosses
from dist.url_path import Place
from dist.windowed import OrderMode


class RunRecorder(Callback):
    """A run's order.jsonl, consumed.jsonl, metrics.jsonl, progress bar, and where its data stands.

    Needs training_step to return {"loss": ..., "loss_sum": local sum}, and keeps the state that
    a checkpoint needs: what was consumed by completed steps, which only the consumer knows.
    """

    def __init__(
        self, run: RunDir, order: OrderState, loader: TokenLoader, *,
        attempt: int, seq_len: int, log_every_steps: int, max_steps: int,
    ) -> None:  # fmt: skip
        self.run, self.loader = run, loader
        self.order = dataclasses.replace(order, batch=loader.plan.batch)
        self.end_step = max_steps
        """The step that ends the run; a Trainer's limits may set it earlier than max_steps."""
        self.keeps_records = True
        """False in Lightning's fast_dev_run: nothing is written and the run stays where it is."""
        self.step_ends = False
        """Whether the micro-batch under way is the last of its step."""
        self.train_loss = float("nan")
        self.tokens_per_s = 0.0
        self._attempt, self._max_steps = attempt, max_steps
        self._seq_len, self._log_every_steps = seq_len, log_every_steps
        self.state_parts: dict[str, Callable[[], Any]] = {}
        """More for a checkpoint's record, JSON by name; the same on all ranks."""
        self.more_metrics: list[Callable[[dict[str, Any]], dict[str, Any]]] = []
        """Called on all ranks with the metrics so far; what they return is logged too."""
        self.metric_sinks: list[Callable[[int, dict[str, Any]], None]] = []
        """Called on rank 0 with (step, metrics)."""
        self._by_source = SourceLosses(loader.source_names, loader.source_rows)
        self._validated: SourceLosses | None = None
        self._exit = ExitStack()
        self._bar: Progress | None = None
        self._window = _Window()
        self._total = _Window()

    def facts(self, pl_module: Any) -> dict[str, Any]:
        """Where the run stands, for its outcome and its checkpoints."""
        loss, targets = pl_module.validation
        return {
            "step": self.order.step,
            "max_steps": self.end_step if self.keeps_records else self._max_steps,
            "samples": self.order.t,
            "tokens": self.order.t * self._seq_len,
            "train_loss": self.train_loss,
            "validation_loss": loss,
            "validation_targets": targets,
            "tokens_per_s": self.tokens_per_s,
            "params": num_parameters(pl_module.net),
        }

    def go_on_from(self, folder: Place, record: dict[str, Any]) -> None:
        """Stand where a checkpoint's record says; before the first batch. DataRefused for a
        checkpoint of other data."""
        order = OrderState.from_dict(record["order"])
        if (order.data_digest, order.seed) != (self.order.data_digest, self.order.seed):
            raise DataRefused(
                f"the checkpoint {folder} is of data {order.data_digest[:12]} in the order of seed "
                f"{order.seed}; this run trains on {self.order.data_digest[:12]}, seed "
                f"{self.order.seed}: resume from a checkpoint of this data, or start without one"
            )
        if OrderMode.of(order) != OrderMode.of(self.order):
            raise DataRefused(
                f"the checkpoint {folder} is of the order `{OrderMode.of(order)}`, this run has "
                f"`{OrderMode.of(self.order)}`: resume from a checkpoint of this order"
            )
        plan = dataclasses.replace(self.loader.plan, start_step=order.step, start_t=order.t)
        self.loader.replan(plan)
        self.order = dataclasses.replace(order, batch=plan.batch, stages=self.order.stages)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        plan = self.loader.plan
        if trainer.accumulate_grad_batches != plan.num_micro(plan.batch):
            raise ConfigError(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}), but a step "
                f"of {plan.batch} rows is {plan.num_micro(plan.batch)} micro-batches a rank; pass "
                "dist.order.num_micro_batches(batch, ranks, micro_batch)"
            )

    def on_sanity_check_end(self, trainer: Trainer, pl_module: Any) -> None:
        # A few rows are no validation.
        pl_module.validation = (None, 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.write_line("order.jsonl", self._segment(trainer))
            bar = Progress("train", self.end_step, "steps")
            self._bar = self._exit.enter_context(bar)
            self._bar.set(self.order.step)
        self._window.restart(self.loader.wait_s)

    def _segment(self, trainer: Trainer) -> dict[str, Any]:
        """From which step and sample on training goes on, and how: who saw what, when."""
        return {
            "step0": self.order.step,
            "t0": self.order.t,
            "batch": self.order.batch,
            # Data-parallel ranks decide the rows; `ranks` are all.
            "world_size": self.loader.plan.world_size,
            "ranks": trainer.world_size,
            "micro_batch": self.loader.plan.micro_batch,
            "accumulation": trainer.accumulate_grad_batches,
            "seed": self.order.seed,
            "data_digest": self.order.data_digest,
            **({"skipped": self.order.skipped} if self.order.skipped else {}),
            **OrderMode.of(self.order).to_dict(),
            **({"stages": self.order.stages} if self.order.stages else {}),
        }

    def write_line(self, name: str, record: dict[str, Any]) -> None:
        """A line of one of the run's logs; rank 0 calls it."""
        if self.keeps_records:
            self.run.append(name, {**record, "attempt": self._attempt})

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.step_ends = batch.ends_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        share = outputs["loss_sum"] / max(batch.step_targets, 1)
        self._window.loss = share if self._window.loss is None else self._window.loss + share
        losses = getattr(pl_module.net, "token_losses", None)
        if self.loader.source_names and losses is not None:
            self._by_source.add(batch, losses)
        if not batch.ends_step:
            return
        self._consumed(trainer, batch)
        step = batch.step + 1
        if self.logs(batch):
            self._log(trainer, step, pl_module)

    def logs(self, batch: Batch) -> bool:
        """Whether metrics are logged after this batch's step."""
        step = batch.step + 1
        return step % self._log_every_steps == 0 or step == self.end_step or batch.stop

    def _consumed(self, trainer: Trainer, batch: Batch) -> None:
        """A step is done: the run stands after it, and its line is with the kernel."""
        rows = batch.t1 - batch.t0
        self._window.steps += 1
        self._window.tokens += rows * self._seq_len
        if not self.keeps_records:
            return
        # Short because the samples end, or because the batch is another one from here on.
        if rows != self.order.batch and batch.t1 != self.loader.plan.end_t:
            self.order = dataclasses.replace(self.order, batch=rows)
            if trainer.is_global_zero:
                segment = {**self._segment(trainer), "accumulation": batch.num_micro}
                self.write_line("order.jsonl", segment)
        self.order = dataclasses.replace(self.order, step=batch.step + 1, t=batch.t1)
        if trainer.is_global_zero:
            record = {"step": batch.step, "t0": batch.t0, "t1": batch.t1, "batch": rows}
            more = {"targets": batch.step_targets, "time": time.time()}
            self.write_line("consumed.jsonl", {**record, **more})

    def _log(self, trainer: Trainer, step: int, pl_module: Any) -> None:
        """Means over the steps since the last log; the one place that waits for the device."""
        window = self._window
        assert window.loss is not None
        # Ranks of a tensor-parallel group have the same rows: one of them counts.
        loss = window.loss.detach()
        by_source = self._by_source.take().to(loss).flatten()
        # One all-reduce and one wait for all of them.
        sums = torch.cat((loss.view(1), by_source)) * self.loader.plan.counts
        if trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        loss_sum, *source_sums = sums.tolist()
        self.train_loss = loss_sum / window.steps
        elapsed_s = max(time.perf_counter() - window.since, 1e-9)
        metrics = {
            "step": step,
            "steps": window.steps,
            "loss": self.train_loss,
            **self._by_source.means(source_sums, "loss"),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "grad_norm": float(pl_module.grad_norm),
            "tokens_per_s": window.tokens / elapsed_s,
            "step_s": elapsed_s / window.steps,
            "data_wait_s": (self.loader.wait_s - window.wait_s) / window.steps,
            **_peak_memory(pl_module.device),
        }
        for more in self.more_metrics:
            metrics |= more(metrics)
        self._total.tokens += window.tokens
        self._total.seconds += elapsed_s
        self.tokens_per_s = self._total.tokens / self._total.seconds
        if trainer.is_global_zero:
            self.write_line("metrics.jsonl", metrics)
            self._tell_sinks(metrics)
        if self._bar is not None:
            note = f"loss {self.train_loss:.3f}, {metrics['tokens_per_s']:,.0f} tokens/s"
            self._bar.set(step, note)
        window.restart(self.loader.wait_s)

    def _tell_sinks(self, metrics: dict[str, Any]) -> None:
        for sink in self.metric_sinks:
            sink(metrics["step"], metrics)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        losses = getattr(pl_module.net, "token_losses", None)
        if self.loader.source_names and losses is not None:
            if self._validated is None:
                rows = trainer.val_dataloaders.source_rows  # type: ignore[union-attr]
                self._validated = SourceLosses(self.loader.source_names, rows)
            self._validated.add(batch, losses)

    def _validation_by_source(self, trainer: Trainer) -> dict[str, float]:
        """validation_loss/<source>; all ranks must call it."""
        if self._validated is None:
            return {}
        sums = self._validated.take() * self.loader.plan.counts
        if trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        return self._validated.means(sums.flatten().tolist(), "validation_loss")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        by_source = self._validation_by_source(trainer)
        if trainer.is_global_zero and not trainer.sanity_checking:
            loss, targets = pl_module.validation
            facts = {"validation_loss": loss, **by_source, "validation_targets": targets}
            if self._window.paused_at is not None:
                facts["validation_s"] = time.perf_counter() - self._window.paused_at
            record = {"step": self.order.step, **facts}
            self.write_line("metrics.jsonl", record)
            self._tell_sinks(record)
            if self._bar is not None:
                self._bar.set(self.order.step, f"validation loss {loss:.3f}")
        self.pause()

    def pause(self) -> None:
        """Leave what happened since the last log out of the step time (validation, a save)."""
        now = time.perf_counter()
        if self._window.paused_at is not None:
            self._window.since += now - self._window.paused_at
            self._window.paused_at = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.set(self.order.step, f"loss {self.train_loss:.3f}, validating")
        self._window.paused_at = time.perf_counter()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: Any) -> None:
        if lost_peer(exception) is not None:
            end_soon()  # the callbacks after this one may wait for a save that cannot end
        # With the kind of the exception the bar says "stopped".
        self._exit.__exit__(type(exception), exception, None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._exit.close()


class _Window:
    """Sums since the last log."""

    def __init__(self) -> None:
        self.loss: torch.Tensor | None = None
        self.seconds = 0.0
        self.paused_at: float | None = None
        self.tokens = 0
        self.restart(0.0)

    def restart(self, wait_s: float) -> None:
        self.loss, self.steps, self.tokens = None, 0, 0
        self.since, self.wait_s = time.perf_counter(), wait_s


def _peak_memory(device: torch.device) -> dict[str, int]:
    """Peak memory of this process: of its GPU, else resident. {} where the system tells none."""
    if device.type == "cuda":
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device)}
    try:
        # Not getrusage: its maximum is inherited from the process that started this one.
        with open("/proc/self/status", "rb") as file:
            _, _, peak = file.read().partition(b"VmHWM:")
    except OSError:
        return {}
    return {"peak_rss_bytes": int(peak.split(None, 1)[0]) * 1024} if peak else {}
