"""Where a trained model lies, a run or an exported folder, and whether an exported one is whole.

An exported folder is a Hugging Face model with one file more, leyden.json: where the model comes
from, and every other file's size and SHA-256. It is written last.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dist.errors import ConfigError, DataRefused
from dist.local_files import write_atomic
from dist.manifest import digest_of

FORMAT_VERSION = 1
LEYDEN_JSON = "leyden.json"
_SEAL = "record_sha256"


@dataclass(frozen=True, kw_only=True)
class ModelPlace:
    """What a person meant by RUN or FOLDER."""

    kind: Literal["run", "folder"]
    path: Path

    @property
    def is_run(self) -> bool:
        return self.kind == "run"


def find_model(word: str, run_root: str = "runs", *, only_run: bool = False) -> ModelPlace:
    """The run `run_root/word`, or the run or exported folder at the path `word`.

    Raises ConfigError that lists the runs, the nearest first, where there is neither.
    """
    if not word or word.startswith("-"):
        raise ConfigError(f"a run or a folder comes first, not {word!r}; see --help")
    root = Path(run_root)
    tried = [Path(word)] if "/" in word else [root / word, Path(word)]
    for path in tried:
        if (path / "run.json").is_file():
            return ModelPlace(kind="run", path=path)
        if (path / "config.json").is_file():
            if only_run:
                raise ConfigError(f"{path} is an exported model already; give the name of a run")
            return ModelPlace(kind="folder", path=path)
    for path in tried:
        if (path / "adapter_config.json").is_file():
            raise ConfigError(
                f"{path} is an adapter alone: give the run that it is of, or `leyden export RUN "
                "--merge`"
            )
        if path.is_dir():
            raise ConfigError(
                f"{path} is neither a run that has started (no run.json) nor an exported model "
                "(no config.json)"
            )
    where = " and no ".join(str(path) for path in tried)
    what = "no run" if only_run else "no run or exported model"
    known = _runs_text(Path(word).name, root)
    raise ConfigError(f"{what} {word!r}: there is no {where}{known}")


def _runs_text(name: str, root: Path) -> str:
    """The nearest run and the others, as the end of a sentence."""
    runs = sorted(path.parent.name for path in root.glob("*/run.json"))
    if not runs:
        return f"; {root} holds no runs (`leyden train pretrain --run NAME` makes one)"
    close = difflib.get_close_matches(name, runs, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    more = f" and {len(runs) - 8} more" if len(runs) > 8 else ""
    return f"{hint} (runs in {root}: {', '.join(runs[:8])}{more})"


def file_facts(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files of a folder, by name."""
    facts = {}
    for name in sorted(names):
        with open(folder / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        facts[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest}
    return facts


def write_record(folder: Path, facts: dict[str, Any]) -> None:
    """Write leyden.json for the files that stand in `folder` now."""
    files = file_facts(folder, (path.name for path in folder.iterdir()))
    record = {"format_version": FORMAT_VERSION, "kind": "exported_model", **facts, "files": files}
    record = json.loads(json.dumps(record))  # what a reader will see: the seal covers that
    sealed = {**record, _SEAL: digest_of(record)}
    text = json.dumps(sealed, indent=1, sort_keys=True) + "\n"
    write_atomic(folder / LEYDEN_JSON, text.encode())


def read_record(folder: Path) -> dict[str, Any]:
    """leyden.json of an exported folder; DataRefused if it is missing or was changed."""
    path = folder / LEYDEN_JSON
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataRefused(f"{path} is missing, so {folder} was not exported by Leyden") from None
    except ValueError:
        raise DataRefused(f"{path} is not JSON; export the model again") from None
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        version = record.get("format_version") if isinstance(record, dict) else None
        raise DataRefused(f"{path} has version {version!r}, this Leyden reads {FORMAT_VERSION}")
    seal = record.pop(_SEAL, None)
    if seal != digest_of(record):
        raise DataRefused(f"{path} was changed after the export; export the model again")
    return record


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """What check_folder read."""

    files: int
    bytes: int
    record: dict[str, Any]


def check_folder(folder: Path) -> FolderReport:
    """Read every byte of an exported model; DataRefused names each file that is not as exported."""
    record = read_record(folder)
    listed: dict[str, dict[str, Any]] = record["files"]
    there = {path.name for path in folder.iterdir()} - {LEYDEN_JSON}
    problems = [f"{name} is missing" for name in sorted(set(listed) - there)]
    problems += [f"{name} was not exported" for name in sorted(there - set(listed))]
    for name in sorted(there & set(listed)):
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is not a file")
        elif path.stat().st_size != listed[name]["bytes"]:
            size = path.stat().st_size
            problems.append(f"{name} has {size} bytes instead of {listed[name]['bytes']}")
        elif file_facts(folder, [name])[name] != listed[name]:
            problems.append(f"{name} has another SHA-256")
    if problems:
        raise DataRefused(
            f"{folder} is not what was exported: {'; '.join(problems)}; copy it anew, or export "
            "the model again"
        )
    size = sum(facts["bytes"] for facts in listed.values())
    return FolderReport(files=len(listed), bytes=size, record=record)
