"""Every allocation of tensors while a step runs, by what it is for; on real or on fake tensors.

The one instrument of the memory plan (fake tensors) and of its check (real ones). It sees what the
dispatcher sees: memory that a kernel takes and gives back inside itself is not in it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._guards import active_fake_mode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist.op_cost import Costs, num_bytes

PARAMETERS = "parameters"
OPTIMIZER = "optimizer state"
GRADIENTS = "gradients"
ACTIVATIONS = "activations"
LOSS = "logits and loss"
BUFFERS = "communication buffers"
TEMPORARY = "temporaries"
Hold = Callable[[int], None]
CATEGORIES = (PARAMETERS, OPTIMIZER, GRADIENTS, ACTIVATIONS, LOSS, BUFFERS, TEMPORARY)


@dataclass
class _Live:
    """A storage that exists."""

    number: int
    size: int
    reference: Any


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The moment at which most memory was allocated."""

    total: int
    """Bytes."""
    categories: dict[str, int]
    """Bytes of each of CATEGORIES at that moment."""
    phase: str
    """forward, backward or optimizer."""


class _Again:
    """A context manager that can be entered many times, made anew each time."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make
        self._open: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._open.append(self._make())
        self._open[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._open.pop().__exit__(*error)


class MemoryTrace(TorchDispatchMode):
    """Records allocations, resizes and frees of storages within its context.

    What exists before is entered by `enter`. A storage's category is first guessed from where it
    is made and may be set later, when it turns out to be a gradient, say.
    """

    def __init__(
        self, *, round_to: int = 1, costs: Costs | None = None, gloo_copies: bool = False
    ) -> None:
        super().__init__()
        self._gloo_copies = gloo_copies
        """Plan for gloo, which reduces and scatters a clone of its input (ProcessGroupGloo.cpp)."""
        self.phase = "forward"
        self.costs = costs
        self._round_to = round_to
        """Allocators give multiples of this many bytes."""
        self._live: dict[int, _Live] = {}
        self._events: list[tuple[int, int]] = []  # storage, change in bytes
        self._categories: list[str] = []  # by number of storage
        self._entered: set[int] = set()
        self._phases: list[tuple[int, str]] = []  # first event, phase
        self._region = ""
        self._fake_mode: Any = None
        self._paused = False

    # What is recorded

    @contextmanager
    def region(self, category: str) -> Iterator[None]:
        """What is allocated inside is of this category."""
        before, self._region = self._region, category
        try:
            yield
        finally:
            self._region = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not recorded."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def in_phase(self, phase: str) -> None:
        """From here on the step is in this phase."""
        self.phase = phase
        self._phases.append((len(self._events), phase))
        if self.costs is not None:
            self.costs.phase = phase

    def enter(self, tensors: Iterable[Any], category: str) -> None:
        """These tensors (DTensors by their local part) are of this category, from now or before."""
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            number = self._see(local, category)
            self._categories[number] = category
            self._entered.add(number)

    def hold(self, category: str) -> Hold:
        """Memory that no tensor here stands for; call what is returned with its bytes of now."""
        number, held = len(self._categories), 0
        self._categories.append(category)

        def resize(size: int) -> None:
            nonlocal held
            self._events.append((number, self._rounded(size) - held))
            held = self._rounded(size)

        return resize

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # it comes back as operations on local tensors
        kwargs = kwargs or {}
        if func is torch.ops._c10d_functional.wait_tensor.default and self._fake_mode is not None:
            result = args[0]  # the fake kernel would make a new tensor, the real one does not
        else:
            result = func(*args, **kwargs)
        if self._paused:
            return result
        category = self._region or self._guess()
        outputs = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        for one in outputs:
            self._see(one, category)
        if func.namespace in ("c10d", "_c10d_functional", "fsdp"):
            self._see_collective(func, args, outputs)
        if self.costs is not None:
            self.costs.add(func, args, kwargs, result)
        return result

    def _guess(self) -> str:
        if self.phase.startswith("forward"):
            return ACTIVATIONS
        # A checkpointed block is computed again inside backward, with gradients on.
        recomputes = self.phase.startswith("backward") and torch.is_grad_enabled()
        return ACTIVATIONS if recomputes else TEMPORARY

    def _see_collective(self, func: Any, args: Any, outputs: list[Tensor]) -> None:
        """What goes through a collective is a buffer, unless it is known to be something else."""
        if "copy_out" in func.__name__ or "allreduce" in func.__name__:
            return
        tensors = [one for one in tree_leaves(args) if isinstance(one, Tensor)]
        if func.namespace == "c10d" and "reduce_scatter" in func.__name__:
            self.copy_for_gloo(max(map(num_bytes, tensors), default=0))
        for tensor in (*tensors, *outputs):
            live = self._live.get(tensor.untyped_storage()._cdata)
            if live is not None and live.number not in self._entered:
                self._categories[live.number] = BUFFERS

    def copy_for_gloo(self, size: int) -> None:
        """A collective, of which gloo's clone of the input takes `size` bytes while it lasts."""
        if self._gloo_copies and size:
            clone = self.hold(BUFFERS)
            clone(size)
            clone(0)

    def _see(self, tensor: Tensor, category: str) -> int:
        storage = tensor.untyped_storage()
        live = self._live.get(storage._cdata)
        if live is None:
            number = len(self._categories)
            self._categories.append(category)
            gone = functools.partial(self._forget, storage._cdata)
            size = self._rounded(storage.size())
            live = _Live(number, size, weakref.ref(storage, gone))
            self._live[storage._cdata] = live
            self._events.append((number, size))
        return live.number

    def _forget(self, key: int, _: Any) -> None:
        live = self._live.pop(key)
        self._events.append((live.number, -live.size))

    def _resized(self, storage: torch.UntypedStorage) -> None:
        live = self._live.get(storage._cdata)
        if live is not None:
            size = self._rounded(storage.size())
            self._events.append((live.number, size - live.size))
            live.size = size

    def _rounded(self, size: int) -> int:
        return -(-size // self._round_to) * self._round_to

    def __enter__(self) -> Any:
        self._fake_mode = active_fake_mode()
        self._resize = torch.UntypedStorage.resize_
        trace, resize = self, self._resize

        @functools.wraps(resize)
        def resize_(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            trace._resized(storage)
            return result

        # DTensor works out global shapes by fake tensors within this lock.
        ShardingPropagator._fake_mode_lock = _Again(self.paused)  # type: ignore[assignment]
        # FSDP2 frees and takes its gathered parameters by this, which no dispatcher sees.
        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        ShardingPropagator._fake_mode_lock = nullcontext()
        super().__exit__(*error)

    # What it comes to

    def peak(self) -> Peak:
        """Where the sum was largest."""
        storages, changes = self._columns()
        sums = np.cumsum(changes)
        at = int(np.argmax(sums))
        names = np.array([CATEGORIES.index(one) for one in self._categories])
        by_category = np.bincount(
            names[storages[: at + 1]], weights=changes[: at + 1], minlength=len(CATEGORIES)
        )
        phase = next((name for start, name in reversed(self._phases) if start <= at), "start")
        held = {name: int(size) for name, size in zip(CATEGORIES, by_category, strict=True)}
        return Peak(total=int(sums[at]), categories=held, phase=phase)

    def _columns(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        table = np.array(self._events, np.int64).reshape(-1, 2)
        return table[:, 0], table[:, 1]
