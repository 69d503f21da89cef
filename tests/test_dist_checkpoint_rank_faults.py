"""Kill one rank of two at the file operations of a save: a checkpoint remains, the other ends.

Alone in the world a save is struck at every operation by test_dist_checkpoint_faults.py. Here the
ranks write together and wait for each other, so the order of operations between them counts too.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dist.checkpoint import (
    CheckpointSaver,
    check_files,
    checkpoint_name,
    find_checkpoint,
    read_record,
)
from dist.checkpoint_folder import COMMIT, newer_than, remove_leftovers, retire
from tests.rank_processes import ENDS_WITHIN_S
from tests.run_ranks import _PRELOAD, one_thread
from tests.test_dist_checkpoint_faults import FileOperations, check_contents, root  # noqa: F401

WORLD, BEFORE, AFTER = 2, 2, 4
POINTS_A_RANK = int(os.environ.get("LEYDEN_FAULT_POINTS", "12"))
"""How many of a rank's operations are struck; 0: all (about 0.3 s each)."""


def make_sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(4, 4, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    return model, torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.0, 0.9))


def train_to(model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Weights and first moments are functions of the step, as check_contents wants them."""
    with torch.no_grad():
        model.weight.to_local().fill_(float(step))
    model.weight.grad = torch.full_like(model.weight, 10.0 * step)
    optimizer.step()


def train(root: Path, attempt: int, steps: range, tell: Any) -> None:  # noqa: F811
    """What Checkpoints does, with a save at every step; a failed one is left behind."""
    rank = torch.distributed.get_rank()
    saver = CheckpointSaver(torch.device("cpu"))
    model, optimizer = make_sharded()
    damaged = newer_than(root, find_checkpoint(root)[0], attempt)

    def after(saved: Any) -> None:
        if not saved.failure:
            retire(root, keep=2, ignore=damaged)

    for step in steps:
        train_to(model, optimizer, step)
        if rank == 0:
            tell(step=step)
        saver.start(root / checkpoint_name(step, attempt), model, optimizer, {"step": step},
                    then=after)  # fmt: skip
        saved = saver.wait()
        # As in training, where the next collective would find the peer gone.
        torch.distributed.barrier()
        assert saved is not None and not saved.failure, saved


def one_rank(
    rank: int, rendezvous: Path, folder: Path, attempt: int, steps: range,
    victim: int, strike_at: int, report: Path,
) -> None:  # fmt: skip
    """In a forked child: train, under the shim on the victim; never returns."""

    handle = os.open(report, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def tell(**facts: Any) -> None:
        os.write(handle, (json.dumps(facts) + "\n").encode())

    code = 1
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD
        )
        operations = FileOperations("killed", strike_at)
        if rank == victim:
            operations.install()
        train(folder, attempt, steps, tell)
        if rank == victim:
            tell(names=operations.names)
        code = 0
    except BaseException:
        tell(error=traceback.format_exc(limit=3))
    finally:
        os._exit(code)


def one_world(folder: Path, attempt: int, steps: range, victim: int, strike_at: int) -> Any:
    """Fork the ranks and wait for their ends; silent ones are killed and named."""
    scratch = folder.with_name(f"{folder.name}.world")
    scratch.mkdir()
    pids = {}
    for rank in range(WORLD):
        report = scratch / f"{rank}.jsonl"
        pid = os.fork()
        if pid == 0:
            one_rank(rank, scratch / "meet", folder, attempt, steps, victim, strike_at, report)
        pids[pid] = rank
    codes: dict[int, int] = {}
    deadline = time.monotonic() + ENDS_WITHIN_S
    while pids and time.monotonic() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.002)
    silent = sorted(pids.values())
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    seen: dict[str, Any] = {"strike_at": strike_at, "victim": victim, "codes": codes}
    for rank in range(WORLD):
        report = scratch / f"{rank}.jsonl"
        for line in report.read_text().splitlines() if report.exists() else ():
            seen |= json.loads(line)
    return {**seen, "silent": silent, "root": folder}


def all_points(root: Path, pipe: Any) -> None:  # noqa: F811
    """Strike each rank in turn; runs in a process without threads, to fork from."""
    try:
        pipe.send(strike_all(root))
    except BaseException:
        pipe.send(traceback.format_exc())


def strike_all(root: Path) -> tuple[dict[int, Any], list[Any]]:  # noqa: F811
    one_thread()
    prepared = root / "prepared"
    prepared.mkdir()
    first = one_world(prepared, 0, range(1, BEFORE + 1), -1, 0)
    assert first["codes"] == {0: 0, 1: 0}, first
    counts, results = {}, []
    for victim in range(WORLD):
        shutil.copytree(prepared, root / f"count-{victim}")
        steps = range(BEFORE + 1, AFTER + 1)
        counts[victim] = one_world(root / f"count-{victim}", 1, steps, victim, 0)
        total = len(counts[victim]["names"])
        every = -(-total // POINTS_A_RANK) if POINTS_A_RANK else 1
        for strike_at in sorted({*range(1, total + 1, every), total}):
            folder = root / f"{victim}-{strike_at}"
            shutil.copytree(prepared, folder)
            results.append(one_world(folder, 1, steps, victim, strike_at))
    return counts, results


def test_a_killed_rank_leaves_a_checkpoint(root: Path) -> None:  # noqa: F811
    """A commit that does not wait for the other rank's file, or a rank that waits for ever."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=all_points, args=(root, sender))
    process.start()
    sender.close()
    try:
        assert receiver.poll(600), "the worlds took more than 600 s"
        received = receiver.recv()
    finally:
        process.kill()
        process.join()
    assert not isinstance(received, str), received
    counts, results = received
    told = ", ".join(
        f"rank {victim}: {sum(r['victim'] == victim for r in results)} of {len(one['names'])}"
        for victim, one in counts.items()
    )
    print(f"killed at file operations of {AFTER - BEFORE} saves of two ranks: {told}")
    lost = []
    for result in results:
        assert not result["silent"], f"ranks {result['silent']} did not end: {result}"
        victim = result["victim"]
        assert result["codes"][victim] == -signal.SIGKILL, result
        assert result["codes"][1 - victim] in (0, 1), result
        found, passed_over = find_checkpoint(result["root"])
        assert found is not None, passed_over
        step = read_record(found)["step"]
        check_contents(found, step)
        for folder in result["root"].iterdir():
            assert not (folder / COMMIT).exists() or check_files(folder) == "", folder
        remove_leftovers(result["root"], attempt=2)
        assert all((folder / COMMIT).exists() for folder in result["root"].iterdir())
        lost.append(result["step"] - step)
    print(f"intervals lost: at most {max(lost)}, mean {sum(lost) / len(lost):.2f}")
    assert max(lost) <= 2 and len(results) >= 8


if sys.platform != "linux":
    pytestmark = pytest.mark.skip("forks ranks of gloo, which is safe on Linux only")
