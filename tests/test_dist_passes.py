"""dist/passes.py: a Trainer's limits in steps and samples."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist.errors import ConfigError
from dist.passes import Course, Limits, Standing, plan_course

AT = Standing(step=0, t=0, batch=8, num_micro=4, num_rows=50)


@pytest.mark.parametrize(
    ("limits", "course"),
    [
        ({"max_steps": 7}, (7, None, None)),
        ({"max_steps": 9, "max_epochs": 1}, (7, 50, None)),  # 50 rows in steps of 8
        ({"max_steps": 3, "max_epochs": 1}, (3, 50, None)),
        ({"max_epochs": 2}, (13, 100, None)),
        ({"max_epochs": 2, "limit_train_batches": 12}, (6, None, 3)),
        ({"max_steps": 5, "max_epochs": 2, "limit_train_batches": 12}, (5, None, 3)),
        ({"max_steps": 5, "max_epochs": -1, "limit_train_batches": 4}, (5, None, 1)),
        ({"max_steps": 50, "limit_train_batches": 0.5}, (50, None, 3)),  # 3.1 steps
        ({"max_steps": 2, "limit_train_batches": 2, "fast_dev_run": 2}, (2, None, None)),
        ({"max_epochs": 0}, (0, 0, None)),
    ],
)
def test_course_of_limits(limits: dict[str, float], course: tuple[int, int, int]) -> None:
    """max_steps read as micro-batches, or an epoch as one more or one less than every row."""
    assert dataclasses.astuple(plan_course(Limits(**limits), AT)) == course  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_steps": 9, "limit_train_batches": 5}, r"limit_train_batches=5\).* is 4$"),
        ({"max_steps": 9, "limit_train_batches": 7}, r"limit_train_batches=7\).* is 8$"),
        ({"max_steps": 9, "limit_train_batches": 1}, r"limit_train_batches=1\).* is 4$"),
        ({"max_steps": 9, "limit_train_batches": 0.1}, r"limit_train_batches=0.1\).* 0.16"),
        ({"limit_train_batches": 8}, r"max_steps=-1\) without max_epochs"),
        ({"max_epochs": -1}, r"max_steps=-1\) without max_epochs"),
    ],
)
def test_limits_that_cut_a_step_or_never_end_are_refused(
    limits: dict[str, float], said: str
) -> None:
    """The micro-batches of a cut step would be consumed and never trained on."""
    with pytest.raises(ConfigError, match=re.compile(said)):
        plan_course(Limits(**limits), AT)  # type: ignore[arg-type]


@given(
    steps=st.integers(1, 60), epochs=st.integers(1, 4), pass_steps=st.integers(1, 9),
    batch=st.integers(1, 20), num_micro=st.integers(1, 4), num_rows=st.integers(1, 60),
    passes=st.booleans(), stop=st.integers(0, 60),
)  # fmt: skip
def test_the_end_does_not_depend_on_where_a_run_was_interrupted(
    steps: int, epochs: int, pass_steps: int, batch: int, num_micro: int, num_rows: int,
    passes: bool, stop: int,
) -> None:  # fmt: skip
    """An end counted from the resume would train a killed run for longer."""
    at = Standing(step=0, t=0, batch=batch, num_micro=num_micro, num_rows=num_rows)
    limit = pass_steps * num_micro if passes else 1.0
    limits = Limits(max_steps=steps, max_epochs=epochs, limit_train_batches=limit)
    whole = plan_course(limits, at)
    step = min(stop, whole.end_step - 1)
    resumed = plan_course(limits, dataclasses.replace(at, step=step, t=step * batch))
    assert resumed == whole
    trial = plan_course(dataclasses.replace(limits, fast_dev_run=2), at)
    assert trial == Course(end_step=2, end_t=None, pass_steps=None)
