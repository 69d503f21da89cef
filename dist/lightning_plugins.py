"""What we change in Lightning, all of it.

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
import warnings
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.trainer.connectors.checkpoint_connector import _CheckpointConnector
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector

from dist.errors import ConfigError, SetupError

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
