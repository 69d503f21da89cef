"""Retries of dist/transfer.py: when not to, and whose random numbers."""

from __future__ import annotations

import os
import random
import tempfile
from typing import Any

import pytest

from dist import transfer
from dist.errors import SetupError
from dist.http_files import HttpError
from dist.local_files import HUGE_PAGE_BYTES


def test_a_retry_draws_no_number_of_the_program() -> None:
    """Augmentations that nobody can repeat, as a retry of a thread moved the user's generator; and
    ranks that seed alike and come back at the same moment."""
    random.seed(6)
    before = random.getstate()
    transfer.Retries().pause_s(1)
    assert random.getstate() == before


def test_a_file_is_written_in_whole_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces as the network brings them, 64 KiB each: a cached shard that Linux maps by 4 KiB."""
    pwrite, places = os.pwrite, []
    size = 2 * transfer.PART_BYTES + 12345
    data = random.Random(7).randbytes(size)

    def note(handle: int, part: Any, place: int) -> int:
        places.append((place, len(part)))
        return pwrite(handle, part, place)

    class Web:
        url = "http://host"

        def copy_range(self, _: str, start: int, end: int, take: Any) -> None:
            for at in range(start, end, 64 << 10):
                take(data[at : min(at + (64 << 10), end)])

    monkeypatch.setattr(os, "pwrite", note)
    with tempfile.TemporaryFile() as file:
        transfer.fetch_file(Web(), "shard", size, file.fileno())  # type: ignore[arg-type]
        assert os.pread(file.fileno(), size + 1, 0) == data
    pages = range(0, size, HUGE_PAGE_BYTES)
    assert sorted(places) == [(at, min(HUGE_PAGE_BYTES, size - at)) for at in pages]


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
