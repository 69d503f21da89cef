"""A thread for work that needs no interpreter, such as large copies, beside the one that asks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

END_TIMEOUT_S = 2.0


class Work:
    """Something to do, once: by a side thread, or by who asks for it first."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work: Callable[[], Any] | None = work
        self._result: Any = None
        self._error: BaseException | None = None
        # A lock costs a hundredth of a concurrent.futures.Future.
        self._turn, self._done = threading.Lock(), threading.Lock()
        self._done.acquire()

    def do(self) -> bool:
        """Do it here, unless it was begun; whether it was done here."""
        if not self._turn.acquire(blocking=False):
            return False
        work, self._work = self._work, None  # it may hold maps, which are to go with it
        try:
            if work is not None:
                self._result = work()
        except BaseException as error:  # raised by who asks for the result
            self._error = error
        finally:
            del work
            self._done.release()
        return True

    @property
    def has_begun(self) -> bool:
        return self._turn.locked()

    @property
    def is_done(self) -> bool:
        return not self._done.locked()

    def result(self) -> Any:
        """What it gives, or raises; done here if nobody has begun it."""
        if not self.do():
            with self._done:
                pass
        if self._error is not None:
            raise self._error
        return self._result


def results_in_order(works: Sequence[Work]) -> Iterator[Any]:
    """Results of what a side thread does, after doing here what it has not begun."""
    for work in works:
        work.do()
    for work in works:
        yield work.result()


class SideThread:
    """Does one thing after the other; made for the first one, and ends with close().

    A daemon, unlike those of an executor: one that waits for a disk that hangs must not keep the
    process from ending.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        """What is begun beside close() comes before it, or begins a thread anew."""
        self._jobs: queue.SimpleQueue[Work | None] | None = None
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[], Any]) -> Work:
        """Begin some work."""
        job = Work(work)
        with self._lock:
            if self._jobs is None:
                self._jobs = queue.SimpleQueue()
                self._thread = threading.Thread(
                    target=_work, args=(self._jobs,), name=self._name, daemon=True
                )
                self._thread.start()
            self._jobs.put(job)
        return job

    def close(self) -> None:
        """End after what is being done; what was not begun is left to who asks for it.

        A thread in a copy aborts a process that ends meanwhile, so some time is given to it.
        """
        with self._lock:
            jobs, self._jobs = self._jobs, None
            thread, self._thread = self._thread, None
        if jobs is None or thread is None:
            return
        with suppress(queue.Empty):
            while True:
                jobs.get_nowait()
        jobs.put(None)
        thread.join(END_TIMEOUT_S)


def _work(jobs: queue.SimpleQueue[Work | None]) -> None:
    while (job := jobs.get()) is not None:
        job.do()
        del job  # it holds what was copied
