"""Run a function on several ranks of one machine: forkserver, gloo, a file rendezvous, no port."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

_PRELOAD = [
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "transformers.models.llama.modeling_llama",
    # Importing does nothing in our rooms, so a fork of it is as good as a fresh import; the last
    # two are what pyarrow imports when it first reads a file.
    "recipes.pretrain",
    "pyarrow.compute",
    "pandas",
]


class RankFailed(RuntimeError):
    """The first rank that failed, with its traceback."""


def one_thread() -> None:
    """Compute on one thread, whatever the recipe and Lightning set: two that wait for each other on
    busy cores made a step ten times slower."""
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.sched_getaffinity = lambda _: {0}


def _one_rank(
    fn: Callable[..., Any], rank: int, world_size: int, rendezvous: str, pipe: Any, args: tuple
) -> None:
    one_thread()
    import torch.distributed

    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        GROUP_RANK="0",
    )
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
        )
        result = fn(*args)
        # Plain pickle: the pipe's own would share tensors by file descriptors of a dead process.
        pipe.send_bytes(pickle.dumps(("ok", result)))
    except BaseException as error:
        text = f"{error!r}\n{traceback.format_exc()}"
        pipe.send_bytes(pickle.dumps(("failed", time.monotonic(), text)))
    finally:
        pipe.close()
        # A peer that died leaves gloo threads waiting; nothing after this line matters.
        os._exit(0)


def run_ranks(fn: Callable[..., Any], world_size: int, timeout_s: float, *args: Any) -> list[Any]:
    """Call `fn(*args)` on every rank of a gloo world; returns the results in order of rank.

    `fn` is a module-level function and finds its rank by torch.distributed.get_rank(). The first
    rank that raises ends the world: RankFailed names it. A hang is a TimeoutError that names the
    silent ranks. The first call of a process takes seconds (the server imports torch), later
    ones about 0.1 s.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (fn, rank, world_size, f"{folder}/rendezvous", sender, args)
            process = context.Process(target=_one_rank, args=arguments, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, timeout_s)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _collect(pipes: list[Any], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    rank_of = {pipe: rank for rank, pipe in enumerate(pipes)}
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, str]] = []
    while rank_of and not failures:
        left_s = deadline - time.monotonic()
        ready = multiprocessing.connection.wait(list(rank_of), max(0.0, left_s))
        if not ready:
            silent = sorted(rank_of.values())
            raise TimeoutError(f"ranks {silent} gave no result within {timeout_s} s")
        for pipe in ready:
            rank = rank_of.pop(pipe)
            message = _receive(pipe)
            if message[0] == "ok":
                results[rank] = message[1]
            else:
                failures.append((message[1], rank, message[2]))
        if failures:
            # The peers of a failed rank fail too; wait a moment so that the first is named.
            for pipe in multiprocessing.connection.wait(list(rank_of), 0.2) if rank_of else []:
                message = _receive(pipe)
                if message[0] == "failed":
                    failures.append((message[1], rank_of[pipe], message[2]))
    if failures:
        _, rank, text = min(failures)
        raise RankFailed(f"rank {rank} of {len(pipes)} failed first: {text}")
    return [results[rank] for rank in range(len(pipes))]


def _receive(pipe: Any) -> tuple[Any, ...]:
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return ("failed", time.monotonic(), "the process ended without a result (killed?)")
