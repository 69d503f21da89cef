"""What one rank measures for `leyden check`: its device, and its links to the others.

The collectives run on the default process group (NCCL on GPUs, gloo on CPUs), all else on gloo.
Numbers are chosen so that their sums are exact: any wrong bit is damage, not rounding.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "lightning", "pytorch-lightning", "transformers", "numpy", "pyarrow")
REDUCE_ELEMENTS = 1 << 20
PAIR_REPEATS, CLOCK_REPEATS = 5, 12
_LARGEST = 1 << 40
_BLAME_MOST_RANKS = 256
_ALL_PAIRS_MOST_RANKS = 64


def device_facts(local_rank: int, ranks_of_node: int) -> dict[str, Any]:
    """Kind, name, driver, memory of the device that this rank would train on."""
    if torch.cuda.is_available():
        index = local_rank % torch.cuda.device_count()
        properties = torch.cuda.get_device_properties(index)
        return {
            "kind": "cuda",
            "name": properties.name,
            "driver": _nvidia_driver(),
            "count": torch.cuda.device_count(),
            "memory_bytes": int(properties.total_memory),
        }
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // max(1, ranks_of_node)
    return {
        "kind": "cpu",
        "name": f"cpu {platform.machine()}",
        "driver": f"Linux {platform.release()}",
        "count": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
    }


def _nvidia_driver() -> str:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=30).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        said = []
    return f"driver {said[0]}" if said else "driver unknown"


def version_facts() -> dict[str, str]:
    """Versions that must be equal on all nodes, and a digest of our own code."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    whole = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        whole.update(path.read_bytes())
    found["leyden code"] = whole.hexdigest()[:12]
    return found


def contribution(rank: int, num_elements: int) -> torch.Tensor:
    """What this rank sends. Its own function, because what arrives is held against pattern()."""
    return pattern(rank, num_elements)


def pattern(rank: int, num_elements: int) -> torch.Tensor:
    """(num_elements,) int64 numbers, the same wherever they are made; their sums are exact."""
    generator = torch.Generator().manual_seed(7919 * rank + 1)
    return torch.randint(-_LARGEST, _LARGEST + 1, (num_elements,), generator=generator)


def _as_float(numbers: torch.Tensor) -> torch.Tensor:
    """float32 of the numbers' last digits: sums of 16,000 ranks are exact too."""
    return (numbers % 1000).to(torch.float32)


def reduce_check(device: torch.device, num_elements: int = REDUCE_ELEMENTS) -> dict[str, Any]:
    """All-reduce numbers whose sum is known; how many elements of this rank's result are wrong.

    As int64, where no flipped bit can be rounded away, and as float32, as gradients are. `blamed`:
    ranks whose contribution alone arrives wrong; looked for only if something is.
    """
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    patterns = [pattern(one, num_elements) for one in range(world)]
    mine = contribution(rank, num_elements)
    wrong = _wrong_sum(mine, sum(patterns[1:], patterns[0]), device)
    wrong += _wrong_sum(_as_float(mine), sum(map(_as_float, patterns), torch.zeros(1)), device)
    blamed = []
    if _highest(wrong, device) and world <= _BLAME_MOST_RANKS:
        blamed = [one for one in range(world) if _arrives_wrong(one, device, num_elements)]
    return {
        "elements": num_elements, "wrong": wrong, "blamed": blamed,
        "backend": torch.distributed.get_backend(),
    }  # fmt: skip


def _wrong_sum(mine: torch.Tensor, expected: torch.Tensor, device: torch.device) -> int:
    given = mine.to(device, copy=True)
    torch.distributed.all_reduce(given)
    return int((given.cpu() != expected).sum())


def _highest(number: int, device: torch.device) -> int:
    """The highest of all ranks' numbers. A collective."""
    told = torch.tensor([number], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
    return int(told)


def _arrives_wrong(one: int, device: torch.device, num_elements: int) -> bool:
    """Whether a sum of one rank's numbers and zeros is wrong anywhere. A collective."""
    mine = torch.distributed.get_rank() == one
    given = contribution(one, num_elements) if mine else torch.zeros(num_elements).long()
    return bool(_highest(_wrong_sum(given, pattern(one, num_elements), device), device))


def rounds_of_pairs(members: list[int]) -> list[list[tuple[int, int]]]:
    """Every pair once, in rounds of disjoint pairs (the circle method of tournaments)."""
    seats: list[int | None] = [*members, *([None] if len(members) % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in pairs
                       if a is not None and b is not None])  # fmt: skip
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def members_of_pairs(local_ranks: list[int]) -> list[int]:
    """All ranks; of more than 64 the first of each node, as pairs grow with the square."""
    if len(local_ranks) <= _ALL_PAIRS_MOST_RANKS:
        return list(range(len(local_ranks)))
    return [rank for rank, local in enumerate(local_ranks) if local == 0]


def measure_pairs(
    device: torch.device, members: list[int], num_elements: int
) -> list[dict[str, Any]]:
    """Bandwidth of each pair of ranks, both ways in turn, kept by the lower one.

    {"a", "b", "bytes_per_s", "wrong"}: the best of 5 exchanges, and elements that changed.
    """
    rank = torch.distributed.get_rank()
    found = []
    for pairs in rounds_of_pairs(members):
        for a, b in pairs:
            if rank in (a, b):
                one = _exchange(a, b, device, num_elements)
                found += [one] if rank == a else []
    return found


def _exchange(a: int, b: int, device: torch.device, num_elements: int) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    other = b if rank == a else a
    mine = contribution(rank, num_elements).to(device)
    theirs = torch.empty_like(mine)
    expected = pattern(other, num_elements)
    best_s, wrong = float("inf"), 0
    # The first makes the connection.
    for repeat in range(PAIR_REPEATS + 1):
        _synchronize(device)
        started = time.perf_counter()
        first, second = (_send, _receive) if rank == a else (_receive, _send)
        for act in (first, second):
            act(mine if act is _send else theirs, other)
        _synchronize(device)
        if repeat:
            best_s = min(best_s, time.perf_counter() - started)
        wrong = max(wrong, int((theirs.cpu() != expected).sum()))
    told = torch.tensor([wrong], dtype=torch.int64, device=device)
    if rank == b:
        _send(told, a)
    else:
        _receive(told, b)
    bytes_per_s = 2 * mine.nbytes / best_s
    return {"a": a, "b": b, "bytes_per_s": bytes_per_s, "wrong": max(wrong, int(told))}


def _send(tensor: torch.Tensor, other: int) -> None:
    torch.distributed.send(tensor, other)


def _receive(tensor: torch.Tensor, other: int) -> None:
    torch.distributed.recv(tensor, other)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_offset(control: Any, clock: Callable[[], float] = time.time) -> dict[str, float]:
    """Seconds that this rank's clock is ahead of rank 0's, from the quickest of 12 exchanges.

    {"offset_s", "rtt_s"}; the offset is right within half of the round trip.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    answer = torch.zeros(2, dtype=torch.float64)
    if rank:
        for _ in range(CLOCK_REPEATS):
            torch.distributed.recv(answer, 0, group=control)
            answer[0] = clock()
            torch.distributed.send(answer, 0, group=control)
        torch.distributed.recv(answer, 0, group=control)
        return {"offset_s": float(answer[0]), "rtt_s": float(answer[1])}
    for other in range(1, world):
        best = (float("inf"), 0.0)
        for _ in range(CLOCK_REPEATS):
            sent = clock()
            torch.distributed.send(answer, other, group=control)
            torch.distributed.recv(answer, other, group=control)
            got = clock()
            best = min(best, (got - sent, float(answer[0]) - (sent + got) / 2))
        told = torch.tensor([best[1], best[0]], dtype=torch.float64)
        torch.distributed.send(told, other, group=control)
    return {"offset_s": 0.0, "rtt_s": 0.0}
