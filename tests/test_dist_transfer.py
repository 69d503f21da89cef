"""Retries of dist/transfer.py: when not to, and whose random numbers."""

from __future__ import annotations

import random

import pytest

from dist import transfer
from dist.errors import SetupError
from dist.http_files import HttpError


def test_a_retry_draws_no_number_of_the_program() -> None:
    """Augmentations that nobody can repeat, as a retry of a thread moved the user's generator; and
    ranks that seed alike and come back at the same moment."""
    random.seed(6)
    before = random.getstate()
    transfer.Retries().pause_s(1)
    assert random.getstate() == before


def test_a_redirect_that_leads_nowhere_is_not_asked_again() -> None:
    """Twenty seconds of retries for a loop of redirects, which no pause will open."""
    asked = 0

    def read() -> bytes:
        nonlocal asked
        asked += 1
        raise HttpError(302, "Found", "http://host/LATEST")

    with pytest.raises(SetupError):
        transfer.retried(read, "http://host/LATEST", retries=transfer.Retries(first_pause_s=0.001))
    assert asked == 1
