"""The CPU of this machine as a device of the memory plan: its rates are measured, in a second."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from dist.devices import Device

_GIB = float(1 << 30)
# Ranks of one machine talk by gloo over the loopback; not measured, as it needs other processes.
_LOOPBACK_BYTES_PER_S = 1e9


def cpu_device(ranks: int) -> Device:
    """One rank's share of this machine, all ranks on it. The rates are those of now: a busy
    machine looks slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    try:
        return Device(
            name="cpu",
            kind="cpu",
            memory_gib=_memory_bytes() / ranks / _GIB,
            bf16_flops=matmul_flops(torch.bfloat16, 128),
            fp32_flops=matmul_flops(torch.float32, 768),
            memory_bytes_per_s=_copy_rate(),
            node_bytes_per_s=_LOOPBACK_BYTES_PER_S,
            network_bytes_per_s=_LOOPBACK_BYTES_PER_S,
            ranks_per_node=ranks,
        )
    finally:
        torch.set_num_threads(threads)


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def matmul_flops(dtype: torch.dtype, size: int) -> float:
    """FLOP/s of the best of many square matmuls on this process's threads; about 0.3 s."""
    one = torch.ones(size, size, dtype=dtype)
    return 2.0 * size**3 / _best_s(lambda: torch.mm(one, one))


def _copy_rate() -> float:
    source = torch.ones(1 << 24)
    target = torch.empty_like(source)
    # Each number is read and written.
    return 2.0 * source.nbytes / _best_s(lambda: target.copy_(source))


def _best_s(work: Callable[[], object], tries: int = 5, for_s: float = 0.3) -> float:
    """At least `tries` times and `for_s` seconds: other threads may be busy for a moment."""
    work()
    best, until, done = float("inf"), time.perf_counter() + for_s, 0
    while done < tries or time.perf_counter() < until:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
        done += 1
    return best
