"""The code of a run as it was when it was submitted, so that later edits do not reach its jobs.

RUN/code/<digest>/ holds what git tracks and what it would track (untracked, not ignored); named
by content, so the same code is kept once and code that jobs use is never changed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dist.errors import ConfigError
from dist.local_files import sync_folder
from launch.rooms import ROOMS, ROOT

MAX_BYTES = 200 << 20
OWN = "own"
"""Folder of a snapshot for a user's own recipe that lies outside of the repository."""


@dataclass(frozen=True, kw_only=True)
class Code:
    """A snapshot that may not be written yet."""

    folder: Path
    """RUN/code/<digest>."""
    files: dict[str, Path]
    """Name in the snapshot -> where it is copied from."""
    target: str
    """Path in the snapshot of a user's own recipe; '' for a module."""
    commit: str
    dirty: bool
    """Something differs from the commit."""

    @property
    def path(self) -> str:
        """For PYTHONPATH: the snapshot, and the folder of a user's own recipe."""
        own = [str(Path(self.target).parent)] if self.target else []
        return ":".join([str(self.folder), *(one for one in own if one != str(self.folder))])

    def write(self) -> None:
        """Copy the files; does nothing if the snapshot is there."""
        if self.folder.is_dir():
            return
        temporary = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        for name, source in self.files.items():
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
        os.replace(temporary, self.folder)
        sync_folder(self.folder.parent)


def take_snapshot(run: Path, recipe: Path | None, root: Path = ROOT) -> Code:
    """What a snapshot for `run` would hold: the repository and, if given, a recipe file.

    Raises ConfigError where it would be larger than 200 MiB, naming the largest file.
    """
    names = git_files(root)
    commit, dirty = git_state(root) if names is not None else ("", False)
    if names is None:
        # Installed as a wheel: the rooms alone.
        paths = [path for room in ROOMS for path in (root / room).rglob("*") if path.is_file()]
        names = [str(path.relative_to(root)) for path in paths if "__pycache__" not in path.parts]
    files = {name: root / name for name in sorted(names) if (root / name).is_file()}
    target = ""
    if recipe is not None:
        absolute = recipe.absolute()
        inside = absolute.is_relative_to(root) and str(absolute.relative_to(root)) in files
        target = str(absolute.relative_to(root)) if inside else f"{OWN}/{absolute.name}"
        if not inside:
            # Its helpers lie next to it: Python files and configs of its folder.
            beside = [*absolute.parent.glob("*.py"), *absolute.parent.glob("*.yaml")]
            files |= {f"{OWN}/{path.name}": path for path in sorted(beside) if path.is_file()}
    total = sum(path.stat().st_size for path in files.values())
    if total > MAX_BYTES:
        largest = max(files.values(), key=lambda path: path.stat().st_size)
        raise ConfigError(
            f"the code to be copied into the run is {total >> 20} MiB, more than "
            f"{MAX_BYTES >> 20}; the largest file is {largest}: add it to .gitignore"
        )
    folder = run / "code" / digest_of(files)
    return Code(
        folder=folder, files=files, target=str(folder / target) if target else "",
        commit=commit, dirty=dirty,
    )  # fmt: skip


def digest_of(files: dict[str, Path]) -> str:
    """First 16 hex digits of the SHA-256 over names and bytes."""
    whole = hashlib.sha256()
    for name, path in files.items():
        whole.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return whole.hexdigest()[:16]


def git_files(root: Path) -> list[str] | None:
    """Tracked and untracked-not-ignored files; None where `root` is not a git work tree's top."""
    if not (root / ".git").exists():
        return None
    said = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    return None if said is None else [name for name in said.split("\0") if name]


def git_state(root: Path) -> tuple[str, bool]:
    """(commit, whether anything differs from it)."""
    commit = (_git(root, "rev-parse", "HEAD") or "").strip()
    return commit, bool((_git(root, "status", "--porcelain") or "").strip())


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
