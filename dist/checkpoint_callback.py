"""The Lightning callback that loads what a run resumes from, and saves and retires checkpoints."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any, Protocol

from pytorch_lightning import Callback, Trainer

from dist.batch import Batch
from dist.checkpoint import (
    CheckpointSaver,
    Saved,
    SaveFailed,
    check_same_run,
    load_checkpoint,
)  # fmt: skip
from dist.checkpoint_folder import checkpoint_name, newer_than, remove_leftovers, retire
from dist.errors import LeydenError
from dist.folder_files import files_of
from dist.lightning_plugins import StopRun
from dist.mesh import PeerFailed
from dist.run_dir import RunDir
from dist.run_recorder import RunRecorder
from dist.url_path import Place

# A rank that failed in training lets its save end, for as long as a stopping job has time.
LAST_SAVE_TIMEOUT_S = 10.0


class SaveConfig(Protocol):
    """What this file reads of a recipe's config."""

    @property
    def save_every_steps(self) -> int: ...
    @property
    def max_steps(self) -> int: ...
    @property
    def keep(self) -> int: ...
    @property
    def keep_best(self) -> int: ...
    @property
    def async_save(self) -> bool: ...
    @property
    def max_failed_saves(self) -> int: ...


class Checkpoints(Callback):
    """Loads what a run resumes from, saves by optimizer step, stops where all ranks agreed.

    A save that is due together with a validation comes after it. Files are written while
    training goes on; the next save, the end of the run and a stop wait until they are durable.
    A failed save is a warning, max_failed_saves of them in a row are SaveFailed; a save fails too
    where the run's logs cannot be written. `record` is JSON that goes with the tensors, `folder`
    where all checkpoints of the run are (None: as run.json says).
    """

    def __init__(
        self, run: RunDir, recorder: RunRecorder, record: dict[str, Any], *,
        attempt: int, config: SaveConfig, folder: Place | None = None,
        resume_from: Any = None, may_change: Iterable[str] = (),
    ) -> None:  # fmt: skip
        self._folder = folder if folder is not None else run.checkpoints
        self._run, self._recorder, self._record = run, recorder, record
        self._attempt, self._config, self._resume_from = attempt, config, resume_from
        self._may_change = tuple(may_change)
        self._saver: CheckpointSaver | None = None
        self._damaged: frozenset[str] = frozenset()
        self._validated_step = -1
        self._failed_saves = 0
        self.saved_step = -1

    def go_on_from(self, folder: Place, record: dict[str, Any]) -> None:
        """Load this checkpoint when fit starts; ConfigError if it is of other settings."""
        now = self._record["config"]
        check_same_run(record["config"], now, self._may_change, f"the run of {folder}")
        self._resume_from = (folder, record)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._saver = CheckpointSaver(trainer.strategy.root_device)
        files_of(self._folder)  # a store whose package this rank lacks is found out now
        found = self._resume_from[0] if self._resume_from is not None else None
        if trainer.is_global_zero:
            self._clean_up(found)
        if found is None:
            return
        load_checkpoint(found, pl_module.net, trainer.optimizers[0])
        self._recorder.train_loss = self._resume_from[1]["facts"]["train_loss"]
        states = self._resume_from[1]["schedulers"]
        for config, state in zip(trainer.lr_scheduler_configs, states, strict=True):
            config.scheduler.load_state_dict(state)
            # The schedule is a function of the step: longer runs change it from here on.
            rates = config.scheduler.get_last_lr()
            for group, rate in zip(config.scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not batch.ends_step:
            return
        step = batch.step + 1
        if batch.stop and step < self._recorder.end_step:
            self.save(trainer, pl_module, step, durable=True)
            raise StopRun
        if self._due(step) and not trainer.fit_loop.epoch_loop.validation_due(step):
            self.save(trainer, pl_module, step)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        step = self._validated_step = self._recorder.order.step
        if self._due(step):
            self.save(trainer, pl_module, step)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._settle(trainer)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if self._saver is not None and not isinstance(exception, (StopRun, KeyboardInterrupt)):
            self._saver.wait(LAST_SAVE_TIMEOUT_S)

    def save(self, trainer: Trainer, pl_module: Any, step: int, *, durable: bool = False) -> None:
        """Save now (all ranks): copies of the tensors, written in the background.

        Waits for the previous save first, and for this one at the end of the run or if `durable`.
        Raises SaveFailed (PeerFailed on other ranks than 0) after max_failed_saves in a row.
        """
        if not self._recorder.keeps_records:
            return  # fast_dev_run
        start = time.perf_counter()
        self._settle(trainer)
        last = durable or step >= self._recorder.end_step
        while step != self.saved_step:
            self._start(trainer, pl_module, step)
            if last or not self._config.async_save:
                self._settle(trainer)
            if not last:
                break
        self._recorder._window.since += time.perf_counter() - start

    def _due(self, step: int) -> bool:
        every = self._config.save_every_steps
        return step == self._recorder.end_step or (every > 0 and step % every == 0)

    def _start(self, trainer: Trainer, pl_module: Any, step: int) -> None:
        assert self._saver is not None
        record = {
            **self._record,
            "order": self._recorder.order.to_dict(),
            "facts": self._recorder.facts(pl_module),
            **{name: part() for name, part in self._recorder.state_parts.items()},
            "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
            "lightning": {
                "global_step": trainer.global_step,
                "accumulate_grad_batches": trainer.accumulate_grad_batches,
            },
        }
        self.saved_step = step
        self._saver.start(
            self._folder / checkpoint_name(step, self._attempt),
            pl_module.net,
            trainer.optimizers[0],
            record,
            validation_loss=pl_module.validation[0] if self._validated_step == step else None,
            # consumed.jsonl must hold every step that a checkpoint covers.
            before_commit=self._run.flush,
            then=self._after,
        )

    def _settle(self, trainer: Trainer) -> None:
        """Wait for the save that is under way; all ranks count a failed one alike."""
        saved = self._saver.wait() if self._saver is not None else None
        if saved is None:
            return
        if not saved.failure:
            self._failed_saves = 0
            return
        self.saved_step = -1
        self._failed_saves += 1
        if self._failed_saves < self._config.max_failed_saves:
            return
        text = (
            f"{self._failed_saves} saves in a row failed (max_failed_saves); the last: "
            f"{saved.failure}. Older checkpoints are untouched: make room or make the folder "
            "writable, then give the same command again"
        )
        raise SaveFailed(text) if trainer.is_global_zero else PeerFailed(text, SaveFailed.exit_code)

    def _after(self, saved: Saved) -> None:
        """On rank 0's thread, when a save has ended."""
        if saved.failure:
            limit = self._config.max_failed_saves
            count = f"{self._failed_saves + 1} of at most {limit} in a row"
            print(f"warning: {saved.failure} ({count})", file=sys.stderr)
        facts = {"failure": saved.failure, "stall_s": saved.stall_s, "write_s": saved.write_s}
        record = {"event": "save", "checkpoint": saved.folder.name, **facts, "time": time.time()}
        try:
            if not saved.failure:
                keep, keep_best = self._config.keep, self._config.keep_best
                retire(self._folder, keep, keep_best, ignore=self._damaged)
            self._run.append("ledger.jsonl", {**record, "attempt": self._attempt})
        except (OSError, LeydenError) as error:
            print(f"warning: after {saved.folder.name}: {error}", file=sys.stderr)

    def _clean_up(self, found: Place | None) -> None:
        """Before the first save: what dead attempts left half-written goes."""
        try:
            self._damaged = newer_than(self._folder, found, self._attempt)
            for name in remove_leftovers(self._folder, self._attempt):
                print(f"deleted the unfinished checkpoint {name}", file=sys.stderr)
        except (OSError, LeydenError) as error:
            print(f"warning: cannot delete unfinished checkpoints: {error}", file=sys.stderr)
