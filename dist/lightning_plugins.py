"""What we change in Lightning, all of it, and the callbacks that keep a run's records.

Changed by overriding private hooks (a test fails by name if one moves):
- its loop broadcasts a SIGTERM flag and waits for it on the host every batch: removed;
- its signal handlers run collectives: never registered; ours set a flag (dist.drain);
- it counts batches where we count optimizer steps: validation is due by step, and a resumed run
  starts with the counters that an uninterrupted one would have, whatever its accumulation;
- its options that repeat or cut samples, and its own checkpoints (fit(ckpt_path=...)), are refused
  by name (check_options).
"""

from __future__ import annotations

import logging
import time
import warnings
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.trainer.connectors.checkpoint_connector import _CheckpointConnector
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector

from dist.batch import Batch
from dist.drain import end_soon, lost_peer
from dist.errors import ConfigError, SetupError
from dist.loader import TokenLoader
from dist.order import OrderState
from dist.progress import Progress
from dist.run_dir import RunDir

# Private names of Lightning that this file stands on.
LIGHTNING_HOOKS: tuple[tuple[type, str], ...] = (
    (_TrainingEpochLoop, "_broadcast_sigterm_tensor"),
    (_TrainingEpochLoop, "_should_check_val_fx"),
    (_TrainingEpochLoop, "_should_accumulate"),
    (_TrainingEpochLoop, "reset"),
    (_SignalConnector, "register_signal_handlers"),
    (_SignalConnector, "_sigterm_notifier_fn"),
    (_CheckpointConnector, "_parse_ckpt_path"),
)


class StopRun(BaseException):
    """Leave the training loop after a checkpoint. Not an Exception: `should_stop` would run a
    whole validation first, and nothing on the way may swallow it."""


def quiet_lightning() -> None:
    """Only errors: no banners, tips or hints about things that this file decides."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric)\b.*")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")


def check_lightning() -> None:
    """SetupError naming each private hook that the installed Lightning lacks."""
    gone = [
        f"{owner.__name__}.{name}" for owner, name in LIGHTNING_HOOKS if name not in vars(owner)
    ]
    if gone:
        raise SetupError(
            f"the installed pytorch-lightning has no {', '.join(gone)}; Leyden needs "
            "pytorch-lightning>=2.6.6,<2.7: run `make setup`"
        )


class StepLoop(_TrainingEpochLoop):
    """Lightning's batch loop, counted in optimizer steps and without its SIGTERM broadcast."""

    def __init__(self, trainer: Trainer, start_step: int, val_every_steps: int) -> None:
        super().__init__(trainer, max_steps=trainer.max_steps)
        self._start_step, self._val_every_steps = start_step, val_every_steps

    def validation_due(self, step: int) -> bool:
        """Whether validation runs after `step` optimizer steps: regularly and at the end."""
        if not self.trainer.enable_validation:
            return False
        regular = self._val_every_steps > 0 and step % self._val_every_steps == 0
        return regular or step == self.max_steps

    def reset(self) -> None:
        super().reset()
        done = self._start_step * self.trainer.accumulate_grad_batches
        for tracker in (self.batch_progress.total, self.batch_progress.current):
            tracker.ready = tracker.started = tracker.processed = tracker.completed = done
        steps = self.automatic_optimization.optim_progress.optimizer.step.total
        steps.ready = steps.completed = self._start_step
        self._batches_that_stepped = self._start_step

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        return not self._should_accumulate() and self.validation_due(self.global_step)

    def _broadcast_sigterm_tensor(self) -> None:
        pass


class _NoSignals(_SignalConnector):
    def register_signal_handlers(self) -> None:
        self.received_sigterm = False

    def teardown(self) -> None:
        pass


class _NoCheckpointPath(_CheckpointConnector):
    def _parse_ckpt_path(self, state_fn: Any, ckpt_path: Any, **more: Any) -> Any:
        # Lightning would also pick up its own `hpc_ckpt_*` files in the working folder.
        if ckpt_path is not None:
            raise ConfigError(
                f"fit(ckpt_path={str(ckpt_path)!r}) would restore Lightning's counters, which do "
                "not hold where the data stands; give the folder to Checkpoints(resume_from=...) "
                "and the step and sample of its record to LoaderPlan"
            )
        return None


def check_options(trainer: Trainer) -> None:
    """ConfigError naming a Trainer option that would repeat, skip or cut samples.

    Others keep the order of samples: num_sanity_val_steps, limit_val_batches, max_steps.
    """
    more_epochs = trainer.max_epochs not in (None, -1, 1)
    refused = {
        "fast_dev_run": (trainer.fast_dev_run, "set max_steps"),
        "overfit_batches": (trainer.overfit_batches, "set max_steps"),
        "limit_train_batches": (trainer.limit_train_batches != 1.0, "set max_steps"),
        "max_epochs": (more_epochs, "one pass over our loader is the whole run: set max_steps"),
        "max_steps=-1": (trainer.max_steps < 0, "set the number of optimizer steps"),
    }
    for name, (given, instead) in refused.items():
        if given:
            raise ConfigError(
                f"Trainer({name}) counts micro-batches or epochs of a loader, so a resumed run "
                f"would repeat or lose samples; {instead} (an epoch is N rows: LoaderPlan.end_t)"
            )


def take_over(trainer: Trainer, start_step: int, val_every_steps: int) -> None:
    """Put our loop and no signal handlers into a Trainer; call it before fit."""
    check_lightning()
    check_options(trainer)
    trainer.fit_loop.epoch_loop = StepLoop(trainer, start_step, val_every_steps)
    trainer._signal_connector = _NoSignals(trainer)
    trainer._checkpoint_connector = _NoCheckpointPath(trainer)


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
            "params": sum(parameter.numel() for parameter in pl_module.net.parameters()),
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
            "world_size": trainer.world_size,
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
        loss = window.loss.detach().clone()
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
