"""Progress of a long job: a bar on a terminal, else a line at least every 10 s."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

LINE_EVERY_S = 8.0


class Progress:
    """Context manager; `update` and `set` may be called from any thread."""

    def __init__(
        self, title: str, total: float | None = None, unit: str = "", enabled: bool = True
    ) -> None:
        self._title, self._total, self._unit, self._enabled = title, total, unit, enabled
        self._done, self._note = 0.0, ""
        self._bar: Any = None
        self._task: Any = None
        self._started = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if not self._enabled:
            return self
        if sys.stderr.isatty():
            self._start_bar()
        else:
            self._thread = threading.Thread(target=self._lines, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.stop()
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._print("" if kind is None else ", stopped")

    def update(self, n: float = 1, note: str = "") -> None:
        """Advance by n."""
        self.set(self._done + n, note)

    def set(self, done: float, note: str = "", total: float | None = None) -> None:
        """Set what is done; an empty note keeps the last one."""
        self._done, self._note = done, note or self._note
        self._total = total if total is not None else self._total
        if self._bar is not None:
            self._bar.update(
                self._task, completed=done, total=self._total, shown=self._amount(), note=self._note
            )

    def _start_bar(self) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[shown]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(
            self._title, total=self._total, shown=self._amount(), note=""
        )
        self._bar.start()

    def _lines(self) -> None:
        while not self._stop.wait(LINE_EVERY_S):
            self._print("")

    def _amount(self) -> str:
        total = self._total or 0.0
        large = max(self._done, total) >= 100
        digits = 0 if large or (self._done % 1 == 0 and total % 1 == 0) else 1
        unit = f" {self._unit}" if self._unit else ""
        if not total:
            return f"{self._done:,.{digits}f}{unit}"
        share = 100 * self._done / total
        return f"{self._done:,.{digits}f}/{total:,.{digits}f}{unit} ({share:.0f} %)"

    def _print(self, end: str) -> None:
        elapsed_s = time.monotonic() - self._started
        note = f", {self._note}" if self._note else ""
        line = f"{self._title}: {self._amount()}{note}, {elapsed_s:.0f} s{end}"
        print(line, file=sys.stderr, flush=True)
