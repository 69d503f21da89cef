"""What can go wrong for a user, and the exit code that says so.

0 done, 1 failed, 2 usage or config, 3 data refused, 4 environment, 75 stopped on request and
resumable, 93 do not restart, 130 interrupted.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_INTERRUPTED = 130
_FULL = (errno.ENOSPC, errno.EDQUOT)


class LeydenError(Exception):
    """A failure that the user can act on; its text says what, why and what to do."""

    exit_code = 1


class ConfigError(LeydenError, ValueError):
    """A command line or config file that cannot be meant."""

    exit_code = 2


class DataRefused(LeydenError, ValueError):
    """Data that is missing, damaged, of another version, or not what was asked for."""

    exit_code = 3


class SetupError(LeydenError, RuntimeError):
    """The machine or its software does not allow the work: no space, a lease, a port, no Java."""

    exit_code = 4


class Stopped(LeydenError):
    """Stopped on request at a step boundary; the same command goes on from there."""

    exit_code = 75


def describe(error: BaseException) -> tuple[str, int] | None:
    """Message and exit code of an expected failure; None for a bug, whose traceback is wanted."""
    if isinstance(error, LeydenError):
        return str(error), error.exit_code
    if isinstance(error, PermissionError):
        return f"no permission: {error.filename or error}; check the owner and mode", 4
    if isinstance(error, FileNotFoundError):
        return f"no such file or folder: {error.filename or error}", 2
    if isinstance(error, OSError) and error.errno is not None:
        names = [str(name) for name in (error.filename, error.filename2) if name]
        where = f" ({' -> '.join(names)})" if names else ""
        advice = "; make room, or name a place on another disk"
        return f"{error.strerror}{where}{advice if error.errno in _FULL else ''}", 4
    return None


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main and exit with its code; expected failures print no traceback."""
    try:
        code = main() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away (`| head`); nothing to report and nowhere to say it.
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        said = describe(error)
        if said is None:
            raise
        message, code = said
        print(f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.exit(code)
