"""Stopping: on request (drain), and when another rank or the launcher has gone.

A request is SIGTERM or SIGUSR1 to any rank, Ctrl-C, or a file `control/drain` in the run. The
handler only sets a flag. The gather thread of the loader brings the flag into its all-reduce of
each step, so that all ranks learn of it in the same batch; at most two steps later all of them
save, write the outcome `stopped` and exit with 75 (130 on a rank that got Ctrl-C).

    phase               what a request does
    import              nothing is taken or written yet: a signal ends the process (143 or 138)
    start-up            the run starts, trains its first step, saves, exits with 75
    first batch         as any other: at most two more steps, a checkpoint, 75
    validation          it is finished; at most two more steps, a checkpoint, 75
    a save              it is finished; at most two more steps, a checkpoint, 75
    the drain           a second signal changes nothing; Ctrl-C, 3 s after the first, ends at once
    after the last step the run completes: last validation, last save, `completed`, 0
    control/drain       left from before the attempt: removed at its start, without effect

Where a rank dies (SIGKILL, out of memory, a crash) the others find their connections closed: they
end with code 1 and one line that says so (PeerLost). Where torchrun's agent dies, the kernel ends
its ranks (die_with_launcher); the next attempt takes over the lease of the dead process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from dist.errors import EXIT_INTERRUPTED, LeydenError
from dist.run_dir import launched_attempt

EXIT_STOPPED = 75
CONTROL_DRAIN = "control/drain"
END_GRACE_S = 6.0
"""How long a rank may take to end by itself after a failure."""
_PR_SET_PDEATHSIG = 1
# What gloo, NCCL and torch's store say when the other end of a connection is gone.
_LOST = (
    "connection closed by peer", "connection reset by peer", "broken pipe", "socket closed",
    "connection was likely closed", "remote process exited", "connection refused",
    "closed unexpectedly", "ncclremoteerror", "failed to recv", "software caused connection abort",
    "read error", "write error", "timed out waiting",
)  # fmt: skip


class PeerLost(LeydenError):
    """Another rank ended without a word; the same command goes on from the newest checkpoint."""

    exit_code = 1


class StopFlag:
    """Set by SIGTERM, SIGUSR1 and Ctrl-C; read by the gather thread, agreed on by all ranks."""

    def __init__(self) -> None:
        self.signum = 0
        self._since = 0.0

    def __call__(self) -> bool:
        return self.signum != 0

    def install(self) -> None:
        """Handle the signals; a second Ctrl-C, 3 s or more after the first, ends at once."""
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(signum, self._handle)

    @property
    def exit_code(self) -> int:
        return EXIT_INTERRUPTED if self.signum == signal.SIGINT else EXIT_STOPPED

    def _handle(self, signum: int, _: Any) -> None:
        # torchrun passes a Ctrl-C on to ranks that the terminal has signalled already.
        if signum == signal.SIGINT and self.signum and time.monotonic() - self._since > 3.0:
            raise KeyboardInterrupt
        if not self.signum:
            self.signum, self._since = signum, time.monotonic()


def stop_requests(flag: StopFlag, run: Path, *, is_first: bool) -> Callable[[], bool]:
    """What the gather thread asks each step: a signal here or, on rank 0, the control file."""
    control = run / CONTROL_DRAIN

    def requested() -> bool:
        return flag() or (is_first and control.exists())

    return requested


def clear_request(run: Path) -> None:
    """Forget a request that was meant for an earlier attempt.

    A Slurm job has done so at its start; a request that came since is meant for this attempt.
    """
    if launched_attempt(run) is not None:
        return
    (run / CONTROL_DRAIN).unlink(missing_ok=True)


def lost_peer(error: BaseException) -> PeerLost | None:
    """The short error for what a collective raises when another rank is gone; None for others."""
    if isinstance(error, PeerLost):
        return error
    if not isinstance(error, RuntimeError) or isinstance(error, LeydenError):
        return None
    said = str(error).lower()
    if not any(word in said for word in _LOST):
        return None
    return PeerLost(
        "another rank ended without a word (killed, out of memory, or crashed: see what it said "
        "last), so this one ends too; the same command goes on from the newest checkpoint"
    )


def end_process(code: int) -> NoReturn:
    """End now, output flushed. Python's own exit would wait for threads in dead collectives."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_soon(grace_s: float = END_GRACE_S) -> None:
    """End the process in a while unless it ends by itself.

    After a failure a thread may wait for other ranks for ever: in a collective of the gather
    thread, of a save, or on a GPU for a peer that is gone.
    """

    def end() -> None:
        print(f"error: still waiting for other ranks {grace_s:.0f} s after a failure; this rank "
              "ends now", file=sys.stderr)  # fmt: skip
        end_process(PeerLost.exit_code)

    timer = threading.Timer(grace_s, end)
    timer.daemon = True
    timer.start()


def end_if_peer_lost(error: Exception) -> None:
    """Say so in one line and end the process, if that is what an error means."""
    if (lost := lost_peer(error)) is not None:
        print(f"error: {lost}", file=sys.stderr)
        end_process(lost.exit_code)


def die_with_launcher() -> None:
    """Under torchrun: let the kernel kill this rank when the agent dies, even in a collective.

    The agent passes signals on and waits; only a killed one dies before its ranks. A rank that
    is an orphan already finds no store to join and ends by that.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
