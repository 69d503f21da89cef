"""The largest micro-batch that fits, found by trial.

`find_micro_batch` is the search, `measured_trial` one trial and `budget_bytes` what may be used.
Trials go up by powers of two, and a size is tried only if the smaller ones say that it will fit on
every rank: under FSDP a rank that runs out of memory would leave the others in a collective.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist.batch import Batch, documents_of, make_batches
from dist.errors import ConfigError, SetupError

MicroBatch = int | Literal["auto"]
# Of what is free: fragmentation and the other users of a GPU; checkpoint copies beside a CPU.
_CUDA_SHARE, _CPU_SHARE = 0.92, 0.6
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A micro-batch that was tried, and what it took."""

    rows: int
    """Rows of the micro-batch."""
    peak_bytes: int
    """Most that its steps held on any rank beyond parameters and optimizer."""
    budget_bytes: int
    """Least that any rank may use."""

    def __str__(self) -> str:
        peak, budget = self.peak_bytes / 2**20, self.budget_bytes / 2**20
        return f"{self.rows} rows ({peak:,.0f} of {budget:,.0f} MiB)"


def check_micro_batch(micro_batch: MicroBatch, strategy: str) -> None:
    """ConfigError for a number below 1, and for auto where no trial can be made."""
    if micro_batch == "auto":
        if strategy == "deepspeed":
            raise ConfigError(
                "micro_batch auto with parallel.strategy deepspeed: its engine counts every "
                "backward as part of a step; give a number"
            )
    elif micro_batch < 1:
        raise ConfigError(f"micro_batch is {micro_batch}; it must be at least 1, or auto")


def find_micro_batch(rows_per_rank: int, trial: Callable[[int], int | None], budget: int) -> Found:
    """The largest micro-batch that fits on every rank, as even as can be. All ranks call it.

    rows_per_rank: rows of one step on the rank that has most. trial(rows): bytes at the peak of a
    step of such micro-batches, None if memory ran out. budget: bytes that this rank may use.
    Powers of two first, then what lies between the last that fits and the first that does not.
    Of the sizes that need equally many micro-batches it takes the smallest: 7 rows are 4 + 3.
    """
    budget = min(_from_all_ranks(budget))
    peaks: dict[int, int] = {}

    def fits(rows: int) -> bool:
        if _expected(peaks, rows) > budget:
            return False
        found = _from_all_ranks(trial(rows))
        if None in found or max(found) > budget:
            return False
        peaks[rows] = max(found)
        return True

    rows = 1
    if not fits(rows):
        raise SetupError(
            f"micro_batch auto: not even one row fits into {budget / 2**20:,.0f} MiB beside the "
            "parameters; shard more (parallel.strategy fsdp, more ranks), set "
            "activation_checkpointing full, or train on shorter rows"
        )
    while rows < rows_per_rank and fits(min(2 * rows, rows_per_rank)):
        rows = min(2 * rows, rows_per_rank)
    for count in range(1, math.ceil(rows_per_rank / rows)):
        between = math.ceil(rows_per_rank / count)
        if rows < between < 2 * rows and fits(between):
            rows = between
            break
    # Equally many micro-batches, none emptier than need be.
    rows = math.ceil(rows_per_rank / math.ceil(rows_per_rank / rows))
    return Found(rows=rows, peak_bytes=max(peaks.values()), budget_bytes=budget)


def _expected(peaks: dict[int, int], rows: int) -> float:
    """Bytes of a step by the line through the two largest sizes tried: activations are linear."""
    if not peaks:
        return 0.0
    last = max(peaks)
    if len(peaks) == 1:
        return float(peaks[last])
    before = sorted(peaks)[-2]
    return peaks[last] + (peaks[last] - peaks[before]) / (last - before) * (rows - last)


def _from_all_ranks(value: Any) -> list[Any]:
    """Every rank's value, in order of rank."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def full_batch(rows: int, schema: dict[str, Any]) -> Batch:
    """A micro-batch of one document a row, the longest there can be; on the CPU."""
    width = int(schema["seq_len"]) + 1
    tokens = np.zeros((rows, width), np.dtype(schema["token_dtype"]))
    lens = np.full(rows, width, np.int32)
    documents = documents_of(lens, np.arange(rows + 1), width, rows)
    return make_batches(tokens, np.arange(rows), documents)[0]


def measured_trial(run: Callable[[], None], device: torch.device) -> int | None:
    """Bytes at the peak of `run` beyond what was held before; None if memory ran out.

    Compiled code is traced by no tracker on a CPU: it runs uncompiled there, which needs more.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            run()
            return torch.cuda.max_memory_allocated(device) - before
        except torch.cuda.OutOfMemoryError:
            return None
        finally:
            gc.collect()
            torch.cuda.empty_cache()
    tracker = PeakBytes()
    try:
        with tracker:
            run()
    except RuntimeError as error:
        if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        return None
    return max(1, tracker.peak)


def budget_bytes(device: torch.device, local_ranks: int) -> int:
    """Bytes that one rank may use beyond what it holds now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return int(_CUDA_SHARE * free)
    return int(_CPU_SHARE * available_bytes()) // local_ranks


def available_bytes(cgroup: Path = _CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory that this machine's processes may still take: the kernel's estimate or the cgroup's
    limit (v2, then v1), whichever is less."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available = int(lines["MemAvailable"].split()[0]) * 1024
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (cgroup / limit).read_text().strip(), (cgroup / used).read_text().strip()
        except OSError:
            continue
        if most != "max":
            available = min(available, max(0, int(most) - int(now)))
        break
    return available


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is on, until they die; a CPU has no such
    counter of its own. `peak` is the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> PeakBytes:
        # FSDP takes and frees the memory of gathered parameters by resizing their storage, which
        # is no op (torch.distributed._tools.mem_tracker does the same).
        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            key, before = storage._cdata, storage.nbytes()
            result = self._resize(storage, size)
            self._sizes[key] = self._sizes.get(key, 0) + size - before
            self._add(size - before)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local tensors come by themselves
        leaves = filter(real, tree_leaves((args, kwargs)))
        given = {leaf.untyped_storage()._cdata for leaf in leaves}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if real(leaf) and leaf.untyped_storage()._cdata not in given:
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._add(storage.nbytes())
        weakref.finalize(storage, self._died, key)

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _died(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def real(leaf: Any) -> bool:
    """Whether a leaf is a tensor with memory of its own."""
    return (
        isinstance(leaf, torch.Tensor)
        and not isinstance(leaf, (DTensor, FakeTensor))
        and not leaf.is_meta
    )
