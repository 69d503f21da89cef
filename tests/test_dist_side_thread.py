"""Work handed to a thread: its result or failure comes back, and nothing of it stays behind."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest

from dist import side_thread
from dist.side_thread import SideThread, Work, results_in_order
from tests.waiting import came


def alive(name: str) -> bool:
    return any(thread.name == name for thread in threading.enumerate())


def test_what_work_gives_or_raises_comes_back() -> None:
    """A failure that stays in the thread is a consumer who waits for ever."""
    side = SideThread("test-results")
    assert not alive("test-results")  # none for who has nothing to do
    seen: list[str] = []
    works = [
        side.start(lambda: seen.append(threading.current_thread().name)),
        side.start(lambda: [][0]),
        side.start(lambda: 4),
    ]
    assert came(lambda: all(work.is_done for work in works))
    assert seen == ["test-results"]
    assert works[0].result() is None and works[2].result() == 4 and works[2].result() == 4
    with pytest.raises(IndexError):
        works[1].result()
    side.close()


def test_who_asks_does_what_was_not_begun() -> None:
    """A consumer that sleeps while the one thread has more to do than it: no faster than alone.
    Work done twice, or given in another order than it was begun."""
    side, gate = SideThread("test-shares"), threading.Event()
    done: list[tuple[int, str]] = []

    def one(number: int) -> int:
        if number == 0:
            gate.wait(10)
        done.append((number, threading.current_thread().name))
        if number == 4:
            gate.set()
        return number

    works = [side.start(lambda number=number: one(number)) for number in range(5)]  # type: ignore[misc]
    assert came(lambda: works[0].has_begun)
    assert list(results_in_order(works)) == [0, 1, 2, 3, 4]
    main = threading.current_thread().name
    assert done == [(1, main), (2, main), (3, main), (4, main), (0, "test-shares")]
    side.close()


def test_a_failure_comes_after_what_stands_before_it() -> None:
    """One row that cannot be read would take good steps with it."""
    works = [Work(lambda: 1), Work(lambda: [][0]), Work(lambda: 3)]
    found = results_in_order(works)
    assert next(found) == 1
    with pytest.raises(IndexError):
        next(found)


def test_it_ends_with_what_it_does_and_can_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread more for each pass over the data; or one that copies on while the interpreter ends,
    which aborts the process."""
    monkeypatch.setattr(side_thread, "END_TIMEOUT_S", 30.0)
    side, gate = SideThread("test-ends"), threading.Event()
    begun, left = side.start(lambda: gate.wait(10)), side.start(lambda: 7)
    assert came(lambda: begun.has_begun)
    threading.Timer(0.3, gate.set).start()
    side.close()
    side.close()
    assert not alive("test-ends") and begun.is_done
    assert not left.is_done and left.result() == 7
    assert side.start(lambda: 1).result() == 1
    side.close()


def test_work_that_is_begun_beside_an_end_is_done() -> None:
    """A pass over the data that waits for ever, as the one before it ended at that moment."""
    side, stop = SideThread("test-beside"), threading.Event()

    def close() -> None:
        while not stop.is_set():
            side.close()

    closer = threading.Thread(target=close)
    closer.start()
    try:
        for number in range(2000):
            assert side.start(lambda number=number: number).result() == number  # type: ignore[misc]
    finally:
        stop.set()
        closer.join()
        side.close()


def test_it_holds_nothing_while_it_waits() -> None:
    """A batch that the thread keeps until the next one comes: megabytes, and maps of shards."""
    side = SideThread("test-holds")

    def made() -> weakref.ref:
        array = np.zeros(3)
        work = side.start(lambda: array)
        assert came(lambda: work.is_done) and work.result() is array
        return weakref.ref(array)

    found = made()
    assert came(lambda: found() is None)  # between the result and the next wait
    side.close()
