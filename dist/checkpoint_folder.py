"""Which folders are checkpoints, which of them are valid, and which may go.

    checkpoints/step-<n>-a<attempt>/
        __<rank>_*.distcp, .metadata    parameters and optimizer state, one file or more a rank
        state.json                      step, order, scheduler, seeds, data digest, config
        COMMIT.json                     every file's size and SHA-256; written last, atomically

A folder without COMMIT.json does not exist: it is being written, or was left by a kill.
The folders are local, or objects under a URL (dist/folder_files.py knows both).
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, overload

from dist import strict_json
from dist.folder_files import files_of
from dist.url_path import Place

FORMAT_VERSION = 1
COMMIT = "COMMIT.json"
STATE = "state.json"
_NAME = re.compile(r"step-(\d+)-a(\d+)")


def checkpoint_name(step: int, attempt: int) -> str:
    return f"step-{step}-a{attempt}"


def write_commit(
    folder: Place, files: dict[str, dict[str, Any]], validation_loss: float | None = None
) -> None:
    """Make `folder` a checkpoint: {name: {"bytes", "sha256"}} of its files, which are durable.

    `validation_loss` is that of the saved step; retention ranks by it.
    """
    step, attempt = _step_and_attempt(folder.name)
    commit: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": step, "attempt": attempt}
    if validation_loss is not None and not math.isfinite(validation_loss):
        validation_loss = None  # never among the best, and JSON has no NaN
    data = _encode({**commit, "files": files, "validation_loss": validation_loss})
    files_of(folder).publish(COMMIT, data)


def read_record(folder: Place) -> dict[str, Any]:
    """The JSON record of a checkpoint."""
    return dict(strict_json.loads(files_of(folder).read(STATE)))


@overload
def find_checkpoint(checkpoints: Path, *, step: int = 0) -> tuple[Path | None, list[str]]: ...
@overload
def find_checkpoint(checkpoints: Place, *, step: int = 0) -> tuple[Place | None, list[str]]: ...
def find_checkpoint(checkpoints: Place, *, step: int = 0) -> tuple[Place | None, list[str]]:
    """The newest valid checkpoint (of `step`, if given) and why newer ones were passed over.

    Newest: the highest step of the highest attempt, as an attempt goes on from what the earlier
    ones left. Valid: COMMIT.json is there and every file has its size and digest.
    """
    passed_over: list[str] = []
    for folder in _by_age(checkpoints):
        if step and _step_and_attempt(folder.name)[0] != step:
            continue
        problem = check_files(folder)
        if not problem:
            return folder, passed_over
        passed_over.append(f"{folder.name}: {problem}")
    return None, passed_over


def saved_steps(checkpoints: Place) -> list[int]:
    """Steps that there are folders of, valid or not, in order."""
    return sorted({_step_and_attempt(folder.name)[0] for folder in _by_age(checkpoints)})


def check_files(folder: Place) -> str:
    """What makes a checkpoint invalid, '' if nothing does. Reads every byte."""
    files = files_of(folder)
    try:
        commit = _read_commit(folder)
    except FileNotFoundError:
        return f"no {COMMIT}, so it was never finished"
    except OSError as error:
        return f"{COMMIT} cannot be read: {error.strerror}"
    except ValueError as error:
        return str(error)
    listed: dict[str, dict[str, Any]] = commit["files"]
    try:
        sizes = files.sizes()
        for name, facts in listed.items():
            if name not in sizes:
                return f"{name} is missing"
            if sizes[name] != facts["bytes"]:
                return f"{name} has {sizes[name]} bytes instead of {facts['bytes']}"
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda name: files.sha256(name, sizes[name]), listed)
            digests = dict(zip(listed, found, strict=True))
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    damaged = [name for name, facts in listed.items() if facts["sha256"] != digests[name]]
    return f"another SHA-256: {', '.join(sorted(damaged))}" if damaged else ""


def retire(
    checkpoints: Place, keep: int, keep_best: int = 0, *, ignore: Collection[str] = ()
) -> list[str]:
    """Delete all checkpoints but the newest `keep` and the `keep_best` of lowest validation loss.

    The newest always stays. Folders in `ignore` (known to be damaged) and uncommitted ones are
    neither counted nor deleted. Returns the names of the deleted.
    """
    committed: list[tuple[Place, float]] = []
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


def delete_checkpoint(folder: Place) -> None:
    """Delete a checkpoint; killed in the middle, what is left does not look like one."""
    files_of(folder).delete(COMMIT)


def remove_leftovers(checkpoints: Place, attempt: int) -> list[str]:
    """Delete the uncommitted folders of attempts before `attempt`; returns their names.

    The caller holds the run's lease, so those attempts are dead.
    """
    left = [
        folder
        for folder in _by_age(checkpoints)
        if _step_and_attempt(folder.name)[1] < attempt and COMMIT not in files_of(folder).sizes()
    ]
    for folder in left:
        delete_checkpoint(folder)
    return [folder.name for folder in left]


def newer_than(checkpoints: Place, found: Place | None, attempt: int) -> frozenset[str]:
    """Checkpoints of earlier attempts that find_checkpoint passed over to reach `found`."""
    names = []
    for folder in _by_age(checkpoints):
        if found is not None and folder.name == found.name:
            break
        if _step_and_attempt(folder.name)[1] < attempt:
            names.append(folder.name)
    return frozenset(names)


def _step_and_attempt(name: str) -> tuple[int, int]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is no checkpoint's name: step-<n>-a<attempt>")
    return int(match[1]), int(match[2])


def _by_age(checkpoints: Place) -> list[Place]:
    """Checkpoint folders, committed or not, newest first."""
    names = [name for name in files_of(checkpoints).folders() if _NAME.fullmatch(name)]
    names.sort(key=lambda name: _step_and_attempt(name)[::-1], reverse=True)
    return [checkpoints / name for name in names]


def _encode(commit: dict[str, Any]) -> bytes:
    """The bytes of COMMIT.json: its content and, against a flipped bit, their own digest."""
    body = json.dumps(commit, indent=1, sort_keys=True)
    sealed = {**commit, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    return (json.dumps(sealed, indent=1, sort_keys=True) + "\n").encode()


def _read_commit(folder: Place) -> dict[str, Any]:
    """COMMIT.json; ValueError says what is wrong with it, FileNotFoundError that it is absent."""
    data = files_of(folder).read(COMMIT)
    try:
        commit = json.loads(data)
        version = commit["format_version"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{COMMIT} is not JSON with a format version") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"format version {version!r}, this Leyden has {FORMAT_VERSION}")
    if "sha256" not in commit:
        raise ValueError(f"{COMMIT} is of an older format, without a SHA-256 of its own content")
    content = {key: value for key, value in commit.items() if key != "sha256"}
    if data != _encode(content):
        raise ValueError(f"{COMMIT} is damaged: its content does not match its SHA-256")
    named = checkpoint_name(content["step"], content["attempt"])
    if named != folder.name:
        raise ValueError(f"{COMMIT} is that of {named}; was the folder renamed?")
    return content
