"""Start one command, pass signals and its exit code on, and leave no process behind.

The child runs in its own session, so a Ctrl-C in the terminal reaches this process alone, which
sends it SIGTERM once: the child then drains or ends by itself. Everything it started carries a
tag in its environment; whatever is left with that tag when the child has ended is ended too.
Should this process be killed, the kernel sends the child SIGTERM.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

TAG = "LEYDEN_LAUNCH"
SILENCE_S = 9.0
LEFTOVER_GRACE_S = 5.0
KEEPS_CODE = (0, 75)
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# PR_SET_PDEATHSIG (1) is kept over exec. It is set by a small program in between, because
# preexec_fn is not safe in a process with threads. The parent may have died before that.
_EXEC_WITH_DEATH_SIGNAL = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 15)\n"
    "os.getppid() == int(sys.argv[1]) or sys.exit(143)\n"
    "os.execvp(sys.argv[2], sys.argv[2:])\n"
)


def command_text(argv: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """The command as a person can paste it into a shell; `env` are settings in front of it."""
    words = [f"{name}={shlex.quote(value)}" for name, value in (env or {}).items()]
    program = argv[0]
    if os.path.isabs(program):
        relative = os.path.relpath(program)
        program = relative if not relative.startswith("..") else program
    return " ".join([*words, shlex.quote(program), *(shlex.quote(word) for word in argv[1:])])


def tagged_processes(tag: str) -> list[int]:
    """Ids of this user's live processes whose environment carries `tag`."""
    wanted = f"{TAG}={tag}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue  # ended meanwhile, or another user's
    return found


def end_leftovers(tag: str, grace_s: float = LEFTOVER_GRACE_S) -> int:
    """End what a command left behind; how many processes it was."""
    return len(end_processes(lambda: tagged_processes(tag), grace_s))


def end_processes(find: Callable[[], Collection[int]], grace_s: float) -> Collection[int]:
    """End what `find` finds by SIGTERM, what is there after `grace_s` by SIGKILL; what it was."""
    first = left = find()
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in left:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass
        until = time.monotonic() + grace_s
        while left and time.monotonic() < until:
            time.sleep(0.05)
            left = find()
        if not left:
            break
    return first


class _Forwarder:
    """Signal handlers that pass a signal on to the child; restores the old ones at the end."""

    def __init__(self, child: subprocess.Popen[bytes], tag: str) -> None:
        self.child = child
        self.tag = tag
        self.received: list[int] = []
        self.old: dict[int, object] = {}

    def __enter__(self) -> _Forwarder:
        # Only the main thread can take signals; a test may run this in another one.
        if threading.current_thread() is threading.main_thread():
            for number in _FORWARDED:
                self.old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _frame: object) -> None:
        self.received.append(number)
        if self.received.count(signal.SIGINT) >= 2:
            # The second Ctrl-C means now. What is published is complete; the rest is temporary.
            for pid in tagged_processes(self.tag):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            return
        try:
            # Always SIGTERM: a program that is still importing ends by it without a traceback.
            self.child.terminate()
        except ProcessLookupError:
            pass


class _Pump:
    """Copies the child's output through, and says that it lives when it has been silent."""

    def __init__(self, child: subprocess.Popen[bytes], title: str) -> None:
        self.title = title
        self.started = self.last = time.monotonic()
        assert child.stdout is not None and child.stderr is not None
        pairs = ((child.stdout, sys.stdout.buffer), (child.stderr, sys.stderr.buffer))
        self.threads = [threading.Thread(target=self._copy, args=p, daemon=True) for p in pairs]
        for thread in self.threads:
            thread.start()

    def _copy(self, source: BinaryIO, target: BinaryIO) -> None:
        while data := os.read(source.fileno(), 65536):
            self.last = time.monotonic()
            target.write(data)
            target.flush()

    def tick(self) -> None:
        now = time.monotonic()
        if now - self.last >= SILENCE_S:
            self.last = now
            print(f"{self.title}: running, {now - self.started:.0f} s", file=sys.stderr, flush=True)

    def close(self) -> None:
        for thread in self.threads:
            thread.join(timeout=5)


def run_child(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, title: str = "",
    received: list[int] | None = None,
) -> int:  # fmt: skip
    """Run `argv` to its end and return its exit code; `received` gets the signals that came.

    `env` is added to this process's environment. With a `title`, and no terminal, a line is
    printed when the child has been silent for 9 s. An interrupted child that neither finished
    (0) nor stopped in order (75) gives 128 + signal, as a shell would.
    """
    tag = uuid.uuid4().hex
    with_death_signal = [sys.executable, "-I", "-S", "-c", _EXEC_WITH_DEATH_SIGNAL]
    piped = subprocess.PIPE if title and not sys.stderr.isatty() else None
    sys.stdout.flush()
    child = subprocess.Popen(
        [*with_death_signal, str(os.getpid()), *argv],
        env={**os.environ, **(env or {}), TAG: tag},
        stdin=subprocess.DEVNULL,
        stdout=piped,
        stderr=piped,
        start_new_session=True,
    )
    with _Forwarder(child, tag) as forwarder:
        pump = _Pump(child, title) if piped else None
        try:
            while True:
                try:
                    child.wait(timeout=1.0 if pump else None)
                    break
                except subprocess.TimeoutExpired:
                    assert pump is not None
                    pump.tick()
        finally:
            end_leftovers(tag)
            if pump:
                pump.close()
    code = child.returncode
    if received is not None:
        received += forwarder.received
    if forwarder.received and code not in KEEPS_CODE:
        return 128 + forwarder.received[0]
    return 128 - code if code < 0 else code
