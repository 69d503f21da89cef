"""The Lightning callback that keeps a run's records, and where its data stands."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed
from pytorch_lightning import Callback, LightningModule, Trainer

from dist.batch import Batch
from dist.drain import end_soon, lost_peer
from dist.errors import ConfigError
from dist.loader import TokenLoader
from dist.order import OrderState
from dist.progress import Progress
from dist.run_dir import RunDir
from dist.sharding import num_parameters


class RunRecorder(Callback):
    """A run's order.jsonl, consumed.jsonl, metrics.jsonl, progress bar, and where its data stands.

    Needs training_step to return {"loss": ..., "loss_sum": local sum}, and keeps the state that
    a checkpoint needs: what was consumed by completed steps, which only the consumer knows.
    """

    def __init__(
        self, run: RunDir, order: OrderState, loader: TokenLoader, *,
        attempt: int, seq_len: int, log_every_steps: int, max_steps: int,
    ) -> None:  # fmt: skip
        self.order = order
        self.train_loss = float("nan")
        self.tokens_per_s = 0.0
        self._run, self._loader, self._attempt = run, loader, attempt
        self._seq_len, self._log_every_steps, self._max_steps = seq_len, log_every_steps, max_steps
        self._exit = ExitStack()
        self._bar: Progress | None = None
        self._window = _Window()
        self._total = _Window()

    def facts(self, pl_module: Any) -> dict[str, Any]:
        """Where the run stands, for its outcome and its checkpoints."""
        loss, targets = pl_module.validation
        return {
            "step": self.order.step,
            "max_steps": self._max_steps,
            "samples": self.order.t,
            "tokens": self.order.t * self._seq_len,
            "train_loss": self.train_loss,
            "validation_loss": loss,
            "validation_targets": targets,
            "tokens_per_s": self.tokens_per_s,
            "params": num_parameters(pl_module.net),
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        plan = self._loader.plan
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
            self._run.append("order.jsonl", self._segment(trainer))
            bar = Progress("train", self._max_steps, "steps")
            self._bar = self._exit.enter_context(bar)
            self._bar.set(self.order.step)
        self._window.restart(self._loader.wait_s)

    def _segment(self, trainer: Trainer) -> dict[str, Any]:
        """From which step and sample on this attempt trains, and how: who saw what, when."""
        return {
            "step0": self.order.step,
            "t0": self.order.t,
            "batch": self.order.batch,
            # Data-parallel ranks decide the rows; `ranks` are all.
            "world_size": self._loader.plan.world_size,
            "ranks": trainer.world_size,
            "accumulation": trainer.accumulate_grad_batches,
            "attempt": self._attempt,
            "seed": self.order.seed,
            "data_digest": self.order.data_digest,
        }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        share = outputs["loss_sum"] / max(batch.step_targets, 1)
        self._window.loss = share if self._window.loss is None else self._window.loss + share
        if not batch.ends_step:
            return
        step = batch.step + 1
        self.order = OrderState(**{**self.order.to_dict(), "step": step, "t": batch.t1})
        self._window.steps += 1
        self._window.tokens += (batch.t1 - batch.t0) * self._seq_len
        if trainer.is_global_zero:
            record = {"step": batch.step, "t0": batch.t0, "t1": batch.t1}
            more = {"batch": batch.t1 - batch.t0, "targets": batch.step_targets}
            self._run.append("consumed.jsonl", {**record, **more, "attempt": self._attempt})
        if step % self._log_every_steps == 0 or step == self._max_steps or batch.stop:
            self._log(trainer, step, pl_module)

    def _log(self, trainer: Trainer, step: int, pl_module: Any) -> None:
        """Means over the steps since the last log; the one place that waits for the device."""
        window = self._window
        assert window.loss is not None
        # Ranks of a tensor-parallel group have the same rows: one of them counts.
        loss = window.loss.detach() * self._loader.plan.counts
        if trainer.world_size > 1:
            torch.distributed.all_reduce(loss)
        self.train_loss = loss.item() / window.steps
        elapsed_s = max(time.perf_counter() - window.since, 1e-9)
        metrics = {
            "step": step,
            "loss": self.train_loss,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "grad_norm": float(pl_module.grad_norm),
            "tokens_per_s": window.tokens / elapsed_s,
            "step_s": elapsed_s / window.steps,
            "data_wait_s": (self._loader.wait_s - window.wait_s) / window.steps,
        }
        self._total.tokens += window.tokens
        self._total.seconds += elapsed_s
        self.tokens_per_s = self._total.tokens / self._total.seconds
        if trainer.is_global_zero:
            self._run.append("metrics.jsonl", {**metrics, "attempt": self._attempt})
        if self._bar is not None:
            note = f"loss {self.train_loss:.3f}, {metrics['tokens_per_s']:,.0f} tokens/s"
            self._bar.set(step, note)
        window.restart(self._loader.wait_s)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            loss, targets = pl_module.validation
            facts = {"validation_loss": loss, "validation_targets": targets}
            record = {"step": self.order.step, **facts, "attempt": self._attempt}
            self._run.append("metrics.jsonl", record)
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
