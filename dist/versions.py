"""Which code and which libraries made something: for provenance, run records and model cards."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

GIT_TIMEOUT_S = 10


def code_version() -> str:
    """Version of Leyden and the commit of its git checkout, '+' if files differ from it."""
    try:
        said = f"leyden {version('leyden')}"
    except PackageNotFoundError:
        said = "leyden"
    git = ["git", "-C", str(Path(__file__).resolve().parent.parent)]
    status = [*git, "status", "--porcelain", "--untracked-files=no"]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, timeout=GIT_TIMEOUT_S
        )
        changed = subprocess.run(status, capture_output=True, timeout=GIT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return said
    if commit.returncode:
        return said
    return f"{said}, commit {commit.stdout.decode().strip()}{'+' if changed.stdout.strip() else ''}"


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
