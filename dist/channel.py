"""A bounded queue between two threads, which either side can close."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any


class Channel:
    """Items in order, each of some weight; `begin` tells the producer how far the consumer is."""

    def __init__(self, capacity: int) -> None:
        """capacity: weight of all items that wait; a heavier item waits alone."""
        self._items: deque[tuple[Any, int]] = deque()
        self._capacity, self._weight, self._closed = capacity, 0, False
        self._begun = -1
        self._lock = threading.Lock()
        self._waiters: list[threading.Lock] = []
        """One held lock for each who waits. Not a threading.Condition: its waiters are woken while
        its lock is held, and go to sleep again at once."""

    def put(self, item: Any, weight: int = 1) -> bool:
        """Wait for room and append; False if the channel was closed."""

        def add() -> bool | None:
            if self._closed:
                return False
            if self._items and self._weight + weight > self._capacity:
                return None
            self._items.append((item, weight))
            self._weight += weight
            return True

        return bool(self._once(add))

    def get(self) -> Any:
        """Wait for an item; None after close."""

        def take() -> tuple[Any, int] | None:
            if not self._items:
                return (None, 0) if self._closed else None
            item, weight = self._items.popleft()
            self._weight -= weight
            return item, weight

        return self._once(take)[0]

    def begin(self, step: int) -> None:
        """The consumer has taken the first item of a step (or of a later one)."""

        def say() -> bool:
            self._begun = max(step, self._begun)
            return True

        self._once(say)

    def wait_begun(self, step: int) -> bool:
        """Wait until a step has begun; False if the channel was closed."""
        self._once(lambda: self._closed or self._begun >= step or None)
        return not self._closed

    def wait_filled(self, timeout_s: float) -> None:
        """Wait until an item is there, or the end."""
        self._once(lambda: self._closed or bool(self._items) or None, timeout_s)

    def close(self) -> None:
        """Drop what waits; whoever puts or gets goes on at once."""

        def end() -> bool:
            self._closed = True
            self._items.clear()
            return True

        self._once(end)

    def _once(self, change: Callable[[], Any], timeout_s: float = float("inf")) -> Any:
        """What `change` gives as soon as it is not None, with the lock held; None at a time-out."""
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                found = change()
                if found is None:
                    mine = threading.Lock()
                    mine.acquire()
                    self._waiters.append(mine)
                else:
                    woken, self._waiters = self._waiters, []
            if found is not None:
                for waiter in woken:
                    waiter.release()
                return found
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return None
            mine.acquire(timeout=min(left_s, threading.TIMEOUT_MAX))
