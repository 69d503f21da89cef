"""Seconds of a step in which a rank does nothing but wait for other ranks.

Of the collectives that FSDP2, HSDP, tensor parallelism and the recipe itself issue, only the part
that computing waits for counts: what overlaps with it costs nothing. All of them pass through a
few Python calls. On gloo such a call blocks, and its time is measured. On CUDA it lets the stream
that computes wait; an event before and one after it, read later, tell how long. DDP's reducer is
C++ and keeps timers of its own (dist.meter.ddp_communication_s); DeepSpeed's engine holds its own
references and streams: not measured.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed
import torch.distributed._functional_collectives as functional

# Calls where code that computes waits. torch 2.13 has new names for two, which FSDP2 uses.
_COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "broadcast"),
    *("reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "all_to_all_single"),
)
# (module or class, name)
_BLOCKING: tuple[tuple[Any, str], ...] = (
    *((torch.distributed, name) for name in _COLLECTIVES if hasattr(torch.distributed, name)),
    # Functional collectives (DTensor, tensor parallelism) are waited for here.
    (functional, "wait_tensor"),
)
# FSDP2 lets the computing stream wait for events of its communication streams by this method.
_STREAM_WAIT = (torch.cuda.Stream, "wait_event")


def why_not_measured(strategy: str) -> str:
    """'' if a strategy's communication can be measured here."""
    if strategy == "deepspeed":
        return "DeepSpeed's engine communicates on its own"
    return ""


class CommunicationClock:
    """Measures the steps between start() and stop(); threads other than the computing ones
    (the loader's, a save's) do not count."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._saved: list[tuple[Any, str, Any]] = []
        self._depth = threading.local()
        self._blocked_s = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._stream: Any = None
        """The stream that computes (CUDA)."""

    def start(self) -> None:
        """Begin to measure; the calls are replaced until stop()."""
        if self._saved:
            return
        for owner, name in _BLOCKING:
            self._replace(owner, name, self._timed)
        if self._cuda:
            self._stream = torch.cuda.current_stream(self._device)
            self._replace(*_STREAM_WAIT, self._timed_wait)

    def stop(self) -> None:
        """Put the calls back."""
        while self._saved:
            owner, name, original = self._saved.pop()
            setattr(owner, name, original)

    def read_s(self) -> float:
        """Seconds so far, counted anew from here; waits for the device, so call it when logging."""
        if self._events:
            self._events[-1][1].synchronize()
            self._blocked_s += sum(a.elapsed_time(b) for a, b in self._events) / 1e3
            self._events = []
        seconds, self._blocked_s = self._blocked_s, 0.0
        return seconds

    def _replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        self._saved.append((owner, name, original))
        setattr(owner, name, make(original))

    def _timed(self, original: Any) -> Any:
        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            # A collective that was only issued is waited for elsewhere.
            # One on a stream of its own overlaps, until the computing stream waits for it.
            aside = self._cuda and torch.cuda.current_stream(self._device) != self._stream
            if aside or kwargs.get("async_op") or not self._computes():
                return original(*args, **kwargs)
            return self._measured(original, args, kwargs)

        return call

    def _timed_wait(self, original: Any) -> Any:
        @wraps(original)
        def wait_event(stream: Any, event: Any) -> Any:
            if stream != self._stream or not self._computes():
                return original(stream, event)
            return self._measured(original, (stream, event), {})

        return wait_event

    def _measured(self, original: Any, args: Any, kwargs: Any) -> Any:
        self._depth.value = 1
        try:
            if not self._cuda:
                started = time.perf_counter()
                try:
                    return original(*args, **kwargs)
                finally:
                    self._blocked_s += time.perf_counter() - started
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record(self._stream)
            try:
                return original(*args, **kwargs)
            finally:
                after.record(self._stream)
                self._events.append((before, after))
        finally:
            self._depth.value = 0

    def _computes(self) -> bool:
        """Whether this is the thread that trains, or autograd's; not inside a measured call."""
        if getattr(self._depth, "value", 0):
            return False
        thread = threading.current_thread()
        # Threads that Python did not start are autograd's.
        return thread is threading.main_thread() or isinstance(thread, threading._DummyThread)
