"""Which folders are checkpoints, which of them are valid, and which may go.

    checkpoints/step-<n>-a<attempt>/
        __<rank>_*.distcp, .metadata    parameters and optimizer state, one file or more a rank
        state.json                      step, order, scheduler, seeds, data digest, config
        COMMIT.json                     every file's size and SHA-256; written last, atomically

A folder without COMMIT.json does not exist: it is being written, or was left by a kill.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import math
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from dist.local_files import sync_folder, write_atomic

FORMAT_VERSION = 1
COMMIT = "COMMIT.json"
STATE = "state.json"
_NAME = re.compile(r"step-(\d+)-a(\d+)")


def checkpoint_name(step: int, attempt: int) -> str:
    return f"step-{step}-a{attempt}"


def write_commit(
    folder: Path, files: dict[str, dict[str, Any]], validation_loss: float | None = None
) -> None:
    """Make `folder` a checkpoint: {name: {"bytes", "sha256"}} of its files, which are durable.

    `validation_loss` is that of the saved step; retention ranks by it.
    """
    step, attempt = _step_and_attempt(folder)
    commit: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": step, "attempt": attempt}
    write_atomic(
        folder / COMMIT, _encode({**commit, "files": files, "validation_loss": validation_loss})
    )


def read_record(folder: Path) -> dict[str, Any]:
    """The JSON record of a checkpoint."""
    return dict(json.loads((folder / STATE).read_bytes()))


def find_checkpoint(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint and, for each newer one passed over, why.

    Newest: the highest step of the highest attempt, as an attempt goes on from what the earlier
    ones left. Valid: COMMIT.json is there and every file has its size and digest.
    """
    passed_over: list[str] = []
    for folder in _by_age(checkpoints):
        problem = check_files(folder)
        if not problem:
            return folder, passed_over
        passed_over.append(f"{folder.name}: {problem}")
    return None, passed_over


def check_files(folder: Path) -> str:
    """What makes a checkpoint invalid, '' if nothing does. Reads every byte."""
    try:
        commit = _read_commit(folder)
    except FileNotFoundError:
        return f"no {COMMIT}, so it was never finished"
    except OSError as error:
        return f"{COMMIT} cannot be read: {error.strerror}"
    except ValueError as error:
        return str(error)
    try:
        for name, facts in commit["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}"
        found = _hash_files(folder / name for name in commit["files"])
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    damaged = [name for name, facts in found.items() if facts != commit["files"][name]]
    return f"another SHA-256: {', '.join(sorted(damaged))}" if damaged else ""


def retire(
    checkpoints: Path, keep: int, keep_best: int = 0, *, ignore: Collection[str] = ()
) -> list[str]:
    """Delete all checkpoints but the newest `keep` and the `keep_best` of lowest validation loss.

    The newest always stays. Folders in `ignore` (known to be damaged) and uncommitted ones are
    neither counted nor deleted. Returns the names of the deleted.
    """
    committed: list[tuple[Path, float]] = []
    for folder in _by_age(checkpoints):
        if folder.name in ignore:
            continue
        try:
            loss = _read_commit(folder)["validation_loss"]
        except (OSError, ValueError):
            continue
        committed.append((folder, math.inf if loss is None or math.isnan(loss) else loss))
    best = sorted((pair for pair in committed if pair[1] < math.inf), key=lambda pair: pair[1])
    kept = {folder for folder, _ in [*committed[: max(keep, 1)], *best[:keep_best]]}
    deleted = [folder for folder, _ in committed if folder not in kept]
    for folder in deleted:
        delete_checkpoint(folder)
    return [folder.name for folder in deleted]


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; killed in the middle, what is left does not look like one."""
    try:
        (folder / COMMIT).unlink(missing_ok=True)
        # The files must not be gone before the commit is, whatever order the disk prefers.
        sync_folder(folder)
    except FileNotFoundError:
        return
    shutil.rmtree(folder)


def remove_leftovers(checkpoints: Path, attempt: int) -> list[str]:
    """Delete the uncommitted folders of attempts before `attempt`; returns their names.

    The caller holds the run's lease, so those attempts are dead.
    """
    left = [
        folder
        for folder in _by_age(checkpoints)
        if _step_and_attempt(folder)[1] < attempt and not (folder / COMMIT).exists()
    ]
    for folder in left:
        shutil.rmtree(folder)
    return [folder.name for folder in left]


def newer_than(checkpoints: Path, found: Path | None, attempt: int) -> frozenset[str]:
    """Checkpoints of earlier attempts that find_checkpoint passed over to reach `found`."""
    names = []
    for folder in _by_age(checkpoints):
        if found is not None and folder.name == found.name:
            break
        if _step_and_attempt(folder)[1] < attempt:
            names.append(folder.name)
    return frozenset(names)


def _step_and_attempt(folder: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder.name} is no checkpoint's name: step-<n>-a<attempt>")
    return int(match[1]), int(match[2])


def _by_age(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, committed or not, newest first."""
    found = [
        path
        for path in (checkpoints.iterdir() if checkpoints.is_dir() else ())
        if _NAME.fullmatch(path.name)
    ]
    return sorted(found, key=lambda path: _step_and_attempt(path)[::-1], reverse=True)


def _encode(commit: dict[str, Any]) -> bytes:
    """The bytes of COMMIT.json: its content and, against a flipped bit, their own digest."""
    body = json.dumps(commit, indent=1, sort_keys=True)
    sealed = {**commit, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    return (json.dumps(sealed, indent=1, sort_keys=True) + "\n").encode()


def _read_commit(folder: Path) -> dict[str, Any]:
    """COMMIT.json; ValueError says what is wrong with it, FileNotFoundError that it is absent."""
    data = (folder / COMMIT).read_bytes()
    try:
        commit = json.loads(data)
        version = commit["format_version"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{COMMIT} is not JSON with a format version") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"format version {version!r}, this Leyden has {FORMAT_VERSION}")
    content = {key: value for key, value in commit.items() if key != "sha256"}
    if data != _encode(content):
        raise ValueError(f"{COMMIT} is damaged: its content does not match its SHA-256")
    named = checkpoint_name(content["step"], content["attempt"])
    if named != folder.name:
        raise ValueError(f"{COMMIT} is that of {named}; was the folder renamed?")
    return content


def _hash_files(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    def facts(path: Path) -> tuple[str, dict[str, Any]]:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return path.name, {"bytes": path.stat().st_size, "sha256": digest}

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return dict(pool.map(facts, paths))
