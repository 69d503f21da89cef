"""How far a Trainer's limits let a run go, in optimizer steps and samples; pure arithmetic.

Lightning counts micro-batches and passes over a loader; a run counts optimizer steps and samples.
A pass here is what Lightning calls an epoch: with limit_train_batches so many micro-batches, each
pass going on where the last stopped; without it the whole run.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a Trainer was given."""

    max_steps: int = -1
    """Optimizer steps in all; -1: no limit."""
    max_epochs: int | None = None
    """Passes, or without limit_train_batches times that every row is seen; None, -1: no limit."""
    limit_train_batches: int | float = 1.0
    """Micro-batches of a pass; a float: this share of the steps that see every row once."""
    fast_dev_run: int = 0
    """Steps to try, from where the run stands; 0: no trial."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where the data stands before the first step, and where the loader was told to end."""

    step: int
    t: int
    """Samples consumed."""
    batch: int
    """Rows of a step."""
    num_micro: int
    """Micro-batches of a step on one rank."""
    num_rows: int
    """Rows of the training split."""
    end_step: int | None = None
    end_t: int | None = None


@dataclass(frozen=True, kw_only=True)
class Course:
    """Where training ends; end_step is below the first step if nothing is left to do."""

    end_step: int
    end_t: int | None
    pass_steps: int | None
    """Optimizer steps of a pass; None: the whole run is one."""


def plan_course(limits: Limits, at: Standing) -> Course:
    """The course of a run under a Trainer's limits: whichever ends first.

    Raises ConfigError, naming the option, for a limit that cuts a step in two or has no end.
    """
    if limits.fast_dev_run:
        ends = [at.step + limits.fast_dev_run, *_steps_left(at, at.end_t)]
        ends += [at.end_step] if at.end_step is not None else []
        return Course(end_step=min(ends), end_t=at.end_t, pass_steps=None)
    pass_steps = _pass_steps(limits.limit_train_batches, at)
    epochs = None if limits.max_epochs in (None, -1) else limits.max_epochs
    end_t = at.end_t
    ends = [step for step in (at.end_step, limits.max_steps) if step is not None and step >= 0]
    if epochs is not None and pass_steps is not None:
        ends.append(epochs * pass_steps)
    elif epochs is not None:
        last = epochs * at.num_rows
        end_t = last if end_t is None else min(end_t, last)
    ends += _steps_left(at, end_t)
    if not ends:
        raise ConfigError(
            "Trainer(max_steps=-1) without max_epochs has no end; set max_steps, or max_epochs"
        )
    return Course(end_step=min(ends), end_t=end_t, pass_steps=pass_steps)


def _steps_left(at: Standing, end_t: int | None) -> list[int]:
    """The step that ends at sample end_t, [] for no end; the last one may be short."""
    return [] if end_t is None else [at.step + max(0, -(-(end_t - at.t) // at.batch))]


def _pass_steps(limit: int | float, at: Standing) -> int | None:
    if isinstance(limit, float):
        if limit == 1.0:
            return None
        steps = int(limit * at.num_rows / at.batch)
        if steps < 1:
            raise ConfigError(
                f"Trainer(limit_train_batches={limit}) is less than one step of {at.batch} of the "
                f"{at.num_rows} rows; give at least {at.batch / at.num_rows:.3g}, or micro-batches"
            )
        return steps
    steps, rest = divmod(limit, at.num_micro)
    if limit < 1 or rest:
        below, above = steps * at.num_micro, (steps + 1) * at.num_micro
        nearest = above if below < 1 or above - limit < limit - below else below
        raise ConfigError(
            f"Trainer(limit_train_batches={limit}) would end a pass inside a step of "
            f"{at.num_micro} micro-batches, and those of half a step would be lost; the nearest "
            f"that ends with a step is {nearest}"
        )
    return steps
