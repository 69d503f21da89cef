"""What we change in Lightning, all of it.

Changed by overriding private hooks (a test fails by name if one moves):
- its loop broadcasts a SIGTERM flag and waits for it on the host every batch: removed;
- its signal handlers run collectives: never registered; ours set a flag (dist.drain);
- it counts batches where we count optimizer steps: validation is due by step, and a resumed run
  starts with the counters that an uninterrupted one would have, whatever its accumulation;
- limit_train_batches, max_epochs, max_steps and fast_dev_run become a plan of the loader in steps
  and samples (dist.passes), so that passes neither repeat nor lose any;
- fit(ckpt_path=...) takes one of our checkpoint folders, or "last"; overfit_batches, which means
  to repeat samples, and Lightning's own checkpoints are refused by name.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from typing import Any, Protocol, runtime_checkable

from pytorch_lightning import Trainer
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.trainer.connectors.checkpoint_connector import _CheckpointConnector
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector

from dist.checkpoint_folder import COMMIT, check_files, find_checkpoint, read_record
from dist.errors import ConfigError, SetupError
from dist.folder_files import files_of
from dist.mesh import on_rank_zero
from dist.passes import Course, Limits, Standing, plan_course
from dist.run_recorder import RunRecorder
from dist.url_path import Place, place_of

# Private names of Lightning that this file stands on.
LIGHTNING_HOOKS: tuple[tuple[type, str], ...] = (
    (_TrainingEpochLoop, "_broadcast_sigterm_tensor"),
    (_TrainingEpochLoop, "_should_check_val_fx"),
    (_TrainingEpochLoop, "_accumulated_batches_reached"),
    (_TrainingEpochLoop, "reset"),
    (_SignalConnector, "register_signal_handlers"),
    (_SignalConnector, "_sigterm_notifier_fn"),
    (_CheckpointConnector, "_select_ckpt_path"),
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


@runtime_checkable
class Resumable(Protocol):
    """A callback that can go on from a checkpoint: RunRecorder, Checkpoints."""

    def go_on_from(self, folder: Place, record: dict[str, Any]) -> None: ...


class StepLoop(_TrainingEpochLoop):
    """Lightning's batch loop, counted in optimizer steps and without its SIGTERM broadcast."""

    def __init__(self, trainer: Trainer, recorder: RunRecorder, val_every_steps: int) -> None:
        super().__init__(trainer, max_steps=trainer.max_steps)
        self._recorder, self._val_every_steps = recorder, val_every_steps
        self._first_pass_done = 0
        """Micro-batches of the first pass that earlier attempts did."""

    def begin_at(self, step: int, course: Course) -> None:
        """Count as an uninterrupted run would at this step, whatever its accumulation was."""
        self.max_steps = max(course.end_step, 0)
        num_micro = self.trainer.accumulate_grad_batches
        passes, steps = divmod(step, course.pass_steps) if course.pass_steps else (0, step)
        self._first_pass_done = steps * num_micro
        total = self.batch_progress.total
        total.ready = total.started = total.processed = total.completed = step * num_micro
        optimizer = self.automatic_optimization.optim_progress.optimizer.step.total
        optimizer.ready = optimizer.completed = self._batches_that_stepped = step
        epochs = self.trainer.fit_loop.epoch_progress
        for one in (epochs.total, epochs.current):
            one.ready = one.started = one.processed = one.completed = passes

    def validation_due(self, step: int) -> bool:
        """Whether validation runs after `step` optimizer steps: regularly and at the end."""
        if not self.trainer.enable_validation:
            return False
        regular = self._val_every_steps > 0 and step % self._val_every_steps == 0
        return regular or step == self.max_steps

    def reset(self) -> None:
        super().reset()
        now, done = self.batch_progress.current, self._first_pass_done
        now.ready = now.started = now.processed = now.completed = done
        self._first_pass_done = 0

    def _accumulated_batches_reached(self) -> bool:
        # Not by Lightning's count: the batch itself knows, also in a short last step.
        return self._recorder.step_ends

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        return not self._should_accumulate() and self.validation_due(self.global_step)

    def _broadcast_sigterm_tensor(self) -> None:
        pass


class _NoSignals(_SignalConnector):
    def register_signal_handlers(self) -> None:
        self.received_sigterm = False

    def teardown(self) -> None:
        pass


class _OurCheckpoints(_CheckpointConnector):
    """Where fit(ckpt_path=...) arrives, before anything is set up or read."""

    def __init__(self, trainer: Trainer, recorder: RunRecorder, loop: StepLoop) -> None:
        super().__init__(trainer)
        self._recorder, self._loop = recorder, loop

    def _select_ckpt_path(self, state_fn: Any, ckpt_path: Any, **more: Any) -> Any:
        # Lightning would also pick up its own `hpc_ckpt_*` files in the working folder.
        given = ckpt_path if ckpt_path is not None else self._ckpt_path
        if given is not None:
            if state_fn != "fit":
                raise ConfigError(f"{state_fn.value}(ckpt_path={str(given)!r}): only fit takes it")
            _go_on_from(self.trainer, self._recorder, given)
        if state_fn == "fit":
            _set_course(self.trainer, self._recorder, self._loop)
        return None


def _go_on_from(trainer: Trainer, recorder: RunRecorder, given: Any) -> None:
    """Let the callbacks go on from a checkpoint folder, or the run's newest valid one."""
    callbacks = [one for one in trainer.callbacks if isinstance(one, Resumable)]  # type: ignore[attr-defined]
    if len(callbacks) < 2:
        raise ConfigError(
            "fit(ckpt_path=...) needs dist.checkpoint_callback.Checkpoints among the callbacks"
        )

    def choose() -> tuple[Place, dict[str, Any]] | None:
        folder = _checkpoint_of(given, recorder)
        if folder is None:
            return None
        record = read_record(folder)
        for callback in callbacks:
            callback.go_on_from(folder, record)  # refuses another run or data, on rank 0 alone
        return folder, record

    chosen = on_rank_zero(choose)
    if chosen is not None:
        for callback in callbacks:
            callback.go_on_from(*chosen)


def _checkpoint_of(given: Any, recorder: RunRecorder) -> Place | None:
    """The folder that a ckpt_path means; None for "last" of a run without checkpoints."""
    if given == "last":
        return find_checkpoint(recorder.run.checkpoints)[0]
    folder = place_of(str(given))
    if COMMIT not in files_of(folder).sizes():
        raise ConfigError(
            f"fit(ckpt_path={str(given)!r}) is not a checkpoint of Leyden (a folder with "
            f"{COMMIT}); Lightning's own files do not hold where the data stands. Give "
            'RUN/checkpoints/step-<n>-a<attempt>, or "last" for the newest valid one of the run'
        )
    if problem := check_files(folder):
        raise ConfigError(f"fit(ckpt_path={str(given)!r}) is damaged: {problem}")
    return folder


def _set_course(trainer: Trainer, recorder: RunRecorder, loop: StepLoop) -> None:
    """Turn the Trainer's limits into the loader's plan, and let everyone count by it."""
    loader, plan = recorder.loader, recorder.loader.plan
    limits = Limits(
        max_steps=trainer.max_steps,
        max_epochs=trainer.max_epochs,
        limit_train_batches=trainer.limit_train_batches,
        fast_dev_run=int(trainer.fast_dev_run),
    )
    at = Standing(
        step=plan.start_step, t=plan.start_t, batch=plan.batch,
        num_micro=plan.num_micro(plan.batch), num_rows=loader.split.num_rows,
        end_step=plan.end_step, end_t=plan.end_t,
    )  # fmt: skip
    course = plan_course(limits, at)
    loader.replan(dataclasses.replace(plan, end_step=course.end_step, end_t=course.end_t))
    loader.goes_on = True
    trainer.limit_train_batches = course.pass_steps * at.num_micro if course.pass_steps else 1.0
    if course.pass_steps is None:
        trainer.fit_loop.max_epochs = -1  # its one pass ends with the last step
    recorder.end_step = course.end_step
    recorder.keeps_records = not trainer.fast_dev_run
    loop.begin_at(at.step, course)


def check_options(trainer: Trainer) -> None:
    """ConfigError for the Trainer option that means to repeat samples.

    The others keep the order of samples: max_steps, max_epochs, limit_train_batches,
    limit_val_batches, num_sanity_val_steps, fast_dev_run.
    """
    if trainer.overfit_batches:
        raise ConfigError(
            f"Trainer(overfit_batches={trainer.overfit_batches}) repeats the same samples, which "
            "a run's order never does; for a small run set max_steps or limit_train_batches, or "
            "prepare a small dataset"
        )


def take_over(trainer: Trainer, start_step: int, val_every_steps: int) -> None:
    """Put our loop, our checkpoints and no signal handlers into a Trainer; call it before fit.

    Its callbacks must hold a RunRecorder, which knows the loader; it stands at `start_step`.
    """
    check_lightning()
    check_options(trainer)
    recorder = next((one for one in trainer.callbacks if isinstance(one, RunRecorder)), None)  # type: ignore[attr-defined]
    if recorder is None or recorder.order.step != start_step:
        raise ConfigError(
            f"take_over(trainer, {start_step}, ...) needs a RunRecorder at step {start_step} among "
            "the Trainer's callbacks"
        )
    loop = StepLoop(trainer, recorder, val_every_steps)
    trainer.fit_loop.epoch_loop = loop
    trainer._signal_connector = _NoSignals(trainer)
    trainer._checkpoint_connector = _OurCheckpoints(trainer, recorder, loop)
