"""The Lightning callback that acts on bad steps: bundle, warn, end, or go back; by dist.guard."""

from __future__ import annotations

import gc
import math
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import xxhash
from pytorch_lightning import Callback, Trainer
from torch.distributed.tensor import DTensor

from dist.audit import ReplayedRow
from dist.batch import Batch
from dist.bundle import BUNDLE_JSON, kept_facts, rows_of_step, write_bundle
from dist.checkpoint_callback import Checkpoints
from dist.dataset import Dataset
from dist.errors import LeydenError
from dist.guard import BadStep, Guard, GuardTripped, obeys_found_inf, too_many
from dist.loader import TokenLoader
from dist.mesh import PeerFailed
from dist.randomness import derive_seed
from dist.ranks import Ranks
from dist.run_dir import RunDir
from dist.run_recorder import RunRecorder
from dist.skips import SKIPPED, Skips, count_rollbacks

KEPT_STEPS = 4
"""Steps whose samples are remembered until the host knows the verdict."""


class RollBack(BaseException):
    """End this attempt, and start the next one at once. Not an Exception: see StopRun."""

    def __init__(self, run: Path) -> None:
        super().__init__(str(run))
        self.run = run


class RunGuard(Callback):
    """Acts on what the guard of a run finds; stands between the recorder and the checkpoints.

    All ranks act alike in the same step, as verdicts are the same on all of them.
    """

    def __init__(
        self, run: RunDir, guard: Guard, recorder: RunRecorder, checkpoints: Checkpoints, *,
        dataset: Dataset, loader: TokenLoader, attempt: int, config: Any,
        record: dict[str, Any] | None,
    ) -> None:  # fmt: skip
        """config: the recipe's (guard, seed, save_every_steps, max_steps); record: the
        checkpoint's that the run resumes from."""
        self._run, self._guard, self._recorder, self._checkpoints = (
            run, guard, recorder, checkpoints,
        )  # fmt: skip
        self._dataset, self._loader, self._attempt = dataset, loader, attempt
        self._config = config
        self._skipped: list[int] = []
        self._samples: dict[int, tuple[int, int]] = {}
        saved = (record or {}).get("guard")
        if saved is not None:
            guard.load_state_dict(saved["device"])
            self._skipped = list(saved["skipped"])
        recorder.state_parts["guard"] = self._state
        recorder.more_metrics.append(self._metrics)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        optimizer = trainer.optimizers[0]
        if self._guard.enabled and trainer.is_global_zero and not obeys_found_inf(optimizer):
            consequence = "every step waits for the device once"
            if self._config.parallel.strategy == "deepspeed":
                consequence = "a bad step is found after its update, and ends the attempt unsaved"
            print(
                f"guard: {type(optimizer).__name__} does not take found_inf (a fused optimizer "
                f"does), so {consequence}",
                file=sys.stderr,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not batch.ends_step:
            return
        self._samples[batch.step] = (batch.t0, batch.t1)
        self._samples.pop(batch.step - KEPT_STEPS, None)
        step, every = batch.step + 1, self._config.save_every_steps
        # What is saved has been judged: no checkpoint is newer than a bad step.
        saves = batch.stop or step == self._config.max_steps or (every > 0 and step % every == 0)
        for bad in self._guard.poll(wait=saves):
            self._act(trainer, pl_module, bad)

    def _act(self, trainer: Trainer, pl_module: Any, bad: BadStep) -> None:
        bundle = self._bundle(trainer, pl_module, bad)
        policy = self._config.guard.policy
        if trainer.is_global_zero:
            event = {"event": "bad_step", "step": bad.step, "policy": policy, "text": bad.text}
            record = {**event, "bundle": bundle, "time": time.time()}
            _in_spite_of_disk(lambda: self._recorder.write_line("ledger.jsonl", record))
        if policy == "raise":
            self._end(trainer, bad, bundle, "guard.policy is raise")
        if policy == "rollback":
            self._go_back(trainer, pl_module, bad, bundle)
        self._skipped.append(bad.step)
        if too_many(self._skipped, self._config.guard):
            guard = self._config.guard
            why = f"{guard.max_skips} skipped steps within {guard.window_steps} (guard.max_skips)"
            self._end(trainer, bad, bundle, why)
        if trainer.is_global_zero:
            print(f"guard: skipped {bad.text}; {bundle}", file=sys.stderr)

    def _end(self, trainer: Trainer, bad: BadStep, bundle: str, why: str) -> None:
        text = (
            f"the guard ended the run, as {why}: {bad.text}. No checkpoint holds its update. "
            f"{bundle}; go on with --guard.policy skip or rollback, or mend the cause"
        )
        if trainer.is_global_zero:
            raise GuardTripped(text)
        raise PeerFailed(text, GuardTripped.exit_code)

    def _go_back(self, trainer: Trainer, pl_module: Any, bad: BadStep, bundle: str) -> None:
        limit = self._config.guard.max_rollbacks
        done = count_rollbacks(self._run)
        if done >= limit:
            self._end(trainer, bad, bundle, f"it went back {limit} times (guard.max_rollbacks)")
        # All ranks have counted before one of them adds to the file.
        if trainer.world_size > 1:
            torch.distributed.barrier()
        stream = self._stream_range(bad.step)
        # A save that is under way is part of what the next attempt may go on from, and no rank
        # may leave while others wait for it in the loader's all-reduce.
        self._checkpoints.on_train_end(trainer, pl_module)
        self._loader.settle()
        if trainer.is_global_zero:
            line = {
                "step": bad.step,
                "attempt": self._attempt,
                "stream": stream,
                "time": time.time(),
            }
            (self._run.path / SKIPPED).parent.mkdir(exist_ok=True)
            self._run.append(SKIPPED, line)
            reason = f"guard: rolled back, {bad.text}"
            facts = {**self._recorder.facts(pl_module), "rolled_back": True}
            self._run.write_outcome(self._attempt, "stopped", **facts, reason=reason)
            print(
                f"guard: going back to the newest checkpoint ({done + 1} of at most {limit} "
                f"times), without samples {stream[0]} to {stream[1] - 1} of the stream: "
                f"{bad.text}; {bundle}",
                file=sys.stderr,
            )
        raise RollBack(self._run.path)

    def _stream_range(self, step: int) -> list[int]:
        """[p0, p1) of the rows that a rollback leaves out."""
        t0, t1 = self._samples[step]
        t1 = max(t1, t0 + self._config.guard.rollback_skip_steps * self._config.global_batch)
        skips = Skips(self._recorder.order.skipped)
        p0, last = skips.to_stream(np.array([t0, t1 - 1])).tolist()
        return [p0, last + 1]

    def _bundle(self, trainer: Trainer, pl_module: Any, bad: BadStep) -> str:
        """Write the repro bundle (all ranks call it); returns what to say of it."""
        rank, world_size = trainer.global_rank, trainer.world_size
        coordinate = self._loader.plan.rank
        mine = {
            "rank": rank,
            "host": socket.gethostname(),
            "losses": [_plain(loss) for loss in bad.losses],
            "seeds": [
                derive_seed(self._config.seed, bad.step, micro, coordinate)
                for micro in range(len(bad.losses))
            ],
            "weights_xxh3_128": weights_digest(pl_module.net),
        }
        ranks: list[Any] = [mine]
        if world_size > 1:
            ranks = [None] * world_size
            torch.distributed.all_gather_object(ranks, mine)
        if not trainer.is_global_zero:
            return ""
        t0, t1 = self._samples[bad.step]
        facts = {
            "run": str(self._run.path), "attempt": self._attempt, "step": bad.step,
            "time": time.time(), "data": self._dataset.reference, "t0": t0, "t1": t1,
            "world_size": world_size, "policy": self._config.guard.policy,
            "reasons": list(bad.reasons), "loss": _plain(bad.loss),
            "grad_norm": _plain(bad.grad_norm), "loss_limit": _plain(bad.loss_limit),
            "grad_norm_limit": _plain(bad.grad_norm_limit), "ranks": ranks,
            "seed": self._config.seed, "weights_of_step": self._recorder.order.step,
            **kept_facts(self._dataset),
        }  # fmt: skip
        try:
            folder = write_bundle(
                self._run.path / "guard" / f"step-{bad.step}", facts, self._rows(t0, t1),
                asdict(self._config),
            )  # fmt: skip
        except (OSError, LeydenError) as error:
            return f"no repro bundle ({error})"
        return f"repro bundle: leyden data replay {self._run.path} --bundle {folder}"

    def _rows(self, t0: int, t1: int) -> list[ReplayedRow]:
        plan = self._loader.plan
        return rows_of_step(
            self._dataset, self._loader.split, self._loader.order, t0, t1,
            world_size=plan.world_size, micro_batch=plan.micro_batch,
        )  # fmt: skip

    def _state(self) -> dict[str, Any]:
        recent = [
            s for s in self._skipped if s > self._skipped[-1] - self._config.guard.window_steps
        ]
        return {"device": self._guard.state_dict(), "skipped": recent}

    def _metrics(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"skipped_steps": len(self._skipped)} if self._skipped else {}


def run_attempts(run: Callable[[Any, Ranks, ExitStack], int], config: Any, ranks: Ranks) -> int:
    """Call a recipe's run(config, ranks, stack); again, in the same processes, as often as its
    guard goes back. Each time is an attempt of its own, resumed like any other."""
    while True:
        try:
            with ExitStack() as stack:
                return run(config, ranks, stack)
        except RollBack as back:
            # The name may have been made up by the first attempt.
            config = replace(config, run=str(back.run.absolute()))
        # Here the exception, and with it the old model and optimizer, can be freed.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def weights_digest(model: torch.nn.Module) -> str:
    """xxh3-128 of this rank's part of the parameters, in the order of their names."""
    digest = xxhash.xxh3_128()
    for name, parameter in sorted(model.named_parameters()):
        local = parameter.detach()
        local = local.to_local() if isinstance(local, DTensor) else local
        digest.update(name.encode())
        digest.update(local.contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def bundle_path(run: RunDir, step: int) -> Path:
    """Where the first bundle of a step lies."""
    return run.path / "guard" / f"step-{step}" / BUNDLE_JSON


def _plain(number: float) -> float | str:
    """JSON has no nan and inf."""
    return number if math.isfinite(number) else repr(number)


def _in_spite_of_disk(write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        print(f"warning: the guard cannot write: {error}", file=sys.stderr)
