"""Progress: a job that says nothing for a minute is taken for dead."""

from __future__ import annotations

import time

import pytest

import dist.progress
from dist.progress import Progress


def test_lines_come_even_when_nothing_advances(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines printed only by update() stop exactly when the job hangs."""
    monkeypatch.setattr(dist.progress, "LINE_EVERY_S", 0.05)
    with Progress("pack", 10, "shards") as bar:
        bar.update(3, note="all well")
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3
    assert lines[-1].startswith("pack: 3/10 shards (30 %), all well, ")


def test_failure_is_not_shown_as_done_and_silence_is_possible(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A last line without 'stopped' looks like success; ranks beside the first must be quiet."""
    with pytest.raises(ValueError, match="x"), Progress("pack", 10):
        raise ValueError("x")
    assert "stopped" in capsys.readouterr().err
    with Progress("pack", 10, enabled=False) as bar:
        bar.set(4)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bar's fields are only checked when it is drawn."""
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("pack", 10, "shards") as bar:
        bar.update(5, note="half")
        bar.set(7, total=20)
    assert "pack" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("done", "total", "said"),
    [
        (0.24, 0.24, "0.2/0.2 MB (100 %)"),
        (0, 1.5, "0.0/1.5 MB (0 %)"),
        (3, 10, "3/10 MB (30 %)"),
        (99.6, 12_345.6, "100/12,346 MB (1 %)"),
        (7.25, None, "7.2 MB"),
    ],
)  # fmt: skip
def test_amounts_of_any_size_can_be_read(
    done: float, total: float | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A total rounded to nothing: `verify: 0.2/0 MB`."""
    with Progress("verify", total, "MB") as bar:
        bar.set(done)
    assert capsys.readouterr().err.startswith(f"verify: {said}, ")
