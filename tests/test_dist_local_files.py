"""dist/local_files.py: files written in whole huge pages."""

from __future__ import annotations

import errno
import os
import tempfile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist import local_files
from dist.local_files import HUGE_PAGE_BYTES, HugePageWriter


@given(
    sizes=st.lists(st.integers(0, 40), max_size=12),
    page=st.integers(1, 16),
    at=st.integers(0, 3),
    most=st.integers(1, 40),
)
def test_the_file_is_what_was_written(sizes: list[int], page: int, at: int, most: int) -> None:
    """Bytes that are lost, doubled or moved where pieces and pages end at other places, or where
    the system takes a part of a write."""
    pieces = [os.urandom(size) for size in sizes]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryFile() as file:
        pwrite, places = os.pwrite, []

        def some(handle: int, data: Any, place: int) -> int:
            places.append(place)
            return pwrite(handle, data[:most], place)

        patch.setattr(local_files, "HUGE_PAGE_BYTES", page)
        patch.setattr(os, "pwrite", some)
        writer = HugePageWriter(file.fileno(), at * page)
        for piece in pieces:
            writer.write(piece)
        writer.flush()
        assert os.pread(file.fileno(), 10_000, 0) == bytes(at * page) * any(sizes) + b"".join(
            pieces
        )
        # Each page in one call, if the system takes it: Linux makes no huge page of two.
        whole = sum(sizes) // page
        assert most < page or places == [(at + n) * page for n in range(whole)] + (
            [(at + whole) * page] if sum(sizes) % page else []
        )


def test_a_full_disk_is_an_error_and_not_a_shorter_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that swallows the error of a page: a shard that lacks its middle."""

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with tempfile.TemporaryFile() as file:
        writer = HugePageWriter(file.fileno())
        writer.write(b"begun")
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            writer.write(bytes(HUGE_PAGE_BYTES))
