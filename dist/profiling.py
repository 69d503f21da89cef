"""A window of steps under torch's profiler, and where a GPU's memory went.

profile/rank-<r>.json          Chrome trace of the steps (chrome://tracing, Perfetto)
profile/memory-rank-<r>.pickle  memory snapshot of the same steps (CUDA; pytorch.org/memory_viz)
profile/oom-rank-<r>.pickle     the same at an out-of-memory error, where the window has begun
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dist.errors import ConfigError

MAX_MEMORY_EVENTS = 100_000
PROFILE = "profile"


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Which steps are profiled."""

    steps: list[int] = field(default_factory=list)
    """[first, end): steps from 0 whose trace is written; empty for none. They are slower."""

    def __post_init__(self) -> None:
        if self.steps and (len(self.steps) != 2 or not 0 <= self.steps[0] < self.steps[1]):
            raise ConfigError(
                f"profile.steps is {list(self.steps)}; give two steps [first, end), such as "
                "[10, 13], or [] for none"
            )


class Window:
    """The profiled steps of one rank. A profiler that fails is a warning, never the run's end."""

    def __init__(
        self, folder: Path, config: ProfileConfig, rank: int, device: torch.device
    ) -> None:
        self._folder, self._rank, self._device = folder, rank, device
        self._first, self._end = (config.steps or [-1, -1])[:2]
        self._profile: Any = None

    def before_step(self, step: int) -> None:
        """Start the profiler if the window begins with this step (or is entered by a resume)."""
        if self._first <= step < self._end and self._profile is None:
            self._attempt(self._start)

    def after_step(self, step: int) -> None:
        """Write the trace if this was the window's last step."""
        if self._profile is not None and step + 1 >= self._end:
            self.close()

    def close(self) -> None:
        """Write what there is."""
        if self._profile is not None:
            self._attempt(self._stop)

    def out_of_memory(self) -> None:
        """Write the snapshot of an out-of-memory error."""
        if self._profile is not None and self._device.type == "cuda":
            self._attempt(lambda: self._dump_memory("oom"))

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.__enter__()

    def _stop(self) -> None:
        found, self._profile = self._profile, None
        self._first = self._end = -1
        found.__exit__(None, None, None)
        self._folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(self._folder / f"rank-{self._rank}.json"))
        if self._device.type == "cuda":
            self._dump_memory("memory")
            torch.cuda.memory._record_memory_history(enabled=None)

    def _dump_memory(self, what: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{what}-rank-{self._rank}.pickle"
        torch.cuda.memory._dump_snapshot(str(path))

    def _attempt(self, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:
            self._profile = None
            self._first = self._end = -1
            print(f"warning: no profile of rank {self._rank}: {error!r}", file=sys.stderr)
