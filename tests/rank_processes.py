"""Ranks of a real recipe as fast processes: forkserver, gloo, their own exit codes.

Where run_ranks collects results, this lets ranks be signalled and killed, and shows how each one
ended and what it said, as a launcher would see it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.run_ranks import _PRELOAD, one_thread

Prepare = Callable[..., None]
JOINED = "joined the world"
# Only a bound on a hang: far above what a busy machine needs.
ENDS_WITHIN_S = 180.0


def config(url: str, folder: Path, **changes: Any) -> Any:
    """A recipe config of a model of 34k parameters with dropout, fit for two cores.

    With `base`, a model's folder, it is fine-tuning's, of tests/finetune_runs.py.
    """
    if base := changes.pop("base", ""):
        from tests import finetune_runs

        return finetune_runs.config(url, base, str(folder), changes)
    from dist.optim import OptimConfig
    from dist.sharding import ParallelConfig
    from dist.start import DataConfig
    from recipes.llama import ModelConfig
    from recipes.pretrain import Config

    dropout = changes.pop("dropout", 0.1)
    shape = {"hidden_size": 48, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2}
    settings: dict[str, Any] = {
        "data": DataConfig(url=url),
        "model": ModelConfig(
            **shape, intermediate_size=80, attention_dropout=dropout, residual_dropout=dropout
        ),
        "optim": OptimConfig(lr=1e-2, warmup_steps=2),
        "parallel": ParallelConfig(strategy=changes.pop("strategy", "fsdp")),
        "precision": "fp32", "activation_checkpointing": "full", "global_batch": 8,
        "micro_batch": 2, "max_steps": 24, "log_every_steps": 1, "save_every_steps": 5,
        "val_every_steps": 0, "val_rows": 8, "run": str(folder),
    }  # fmt: skip
    return Config(**{**settings, **changes})


def _one_rank(
    rank: int, world_size: int, rendezvous: str, log: str, url: str, folder: Path,
    changes: dict[str, Any], prepare: Prepare | None, args: tuple[Any, ...],
) -> None:  # fmt: skip
    import torch
    import torch.distributed

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    one_thread()
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size), GROUP_RANK="0",
    )  # fmt: skip
    from dist import training
    from dist.errors import run_main

    made = config(url, folder, **changes)
    recipe = sys.modules[type(made).__module__]
    if prepare is not None:
        prepare(rank, *args)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )
    print(JOINED, flush=True)
    # Parsing costs half a second a rank; the rest of main() is the real one.
    training.parse_config = lambda *_, **__: made
    run_main(recipe.main)  # type: ignore[attr-defined]


class World:
    """The ranks of one run; a context manager that leaves no process behind."""

    def __init__(
        self, url: str, folder: Path, world_size: int, changes: dict[str, Any],
        prepare: Prepare | None = None, *args: Any,
    ) -> None:  # fmt: skip
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._scratch = tempfile.TemporaryDirectory()
        self._logs = [Path(self._scratch.name) / f"{rank}.log" for rank in range(world_size)]
        rendezvous = f"{self._scratch.name}/rendezvous"
        self.processes = []
        for rank, log in enumerate(self._logs):
            arguments = (rank, world_size, rendezvous, str(log), url, folder, changes)
            process = context.Process(target=_one_rank, args=(*arguments, prepare, args))
            process.start()
            self.processes.append(process)

    def signal(self, rank: int, signum: int) -> None:
        """Send a signal to a rank that may have ended already."""
        pid = self.processes[rank].pid
        if pid is not None and self.processes[rank].is_alive():
            os.kill(pid, signum)

    def wait(self, timeout_s: float = ENDS_WITHIN_S) -> list[int]:
        """Exit code of each rank, -n for a death by signal n; TimeoutError names silent ranks."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [p.exitcode for p in self.processes]
        if None in codes:
            for process in self.processes:
                if process.exitcode is None:
                    os.kill(process.pid, signal.SIGABRT)  # says on stderr where it is
                    process.join(5.0)
            said = {rank: self.said(rank)[-6000:] for rank in range(len(self.processes))}
            raise TimeoutError(f"after {timeout_s} s the exit codes are {codes}; logs: {said}")
        return [int(code) for code in codes]

    def said(self, rank: int) -> str:
        """Output of a rank, both streams."""
        return self._logs[rank].read_text() if self._logs[rank].exists() else ""

    def wait_joined(self, timeout_s: float = ENDS_WITHIN_S) -> None:
        """Wait until all ranks have met; from then on each sees another's end."""
        deadline = time.monotonic() + timeout_s
        while not all(JOINED in self.said(rank) for rank in range(len(self.processes))):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the ranks did not meet within {timeout_s} s")
            time.sleep(0.005)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self._scratch.cleanup()


def train(
    url: str, folder: Path, world_size: int, changes: dict[str, Any],
    prepare: Prepare | None = None, *args: Any, timeout_s: float = ENDS_WITHIN_S,
) -> list[int]:  # fmt: skip
    """Run all ranks to their end; an unexpected failure shows what they said."""
    with World(url, folder, world_size, changes, prepare, *args) as world:
        codes = world.wait(timeout_s)
        unexpected = [rank for rank, code in enumerate(codes) if code not in (0, 75, -9)]
        if unexpected and -signal.SIGKILL not in codes:
            raise AssertionError(f"exit codes {codes}: {world.said(unexpected[0])}")
        return codes


def processes_of(tag: str) -> list[int]:
    """Live processes whose environment or command line holds `tag`."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if tag.encode() in (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # ended meanwhile
    return found


def kill(pid: int) -> None:
    """SIGKILL to a process that may have ended meanwhile."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def watches(pid: int) -> bool:
    """Whether a process is the one that watches a rank, whose environment it has."""
    return b"dist.hang_watcher" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
