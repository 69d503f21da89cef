"""The files of an import as its provenance names them, held against the export they come from."""

from __future__ import annotations

import concurrent.futures
import json
import os
from pathlib import Path
from typing import Any

from dist.data_export import ORIGIN
from dist.errors import DataRefused
from dist.progress import Progress
from dist.shard_file import file_digest
from dist.token_source import SourceFile


def describe_source(source: Path, files: list[SourceFile], progress: bool) -> list[dict[str, Any]]:
    """Inputs as the provenance lists them, with the xxh3-128 of their bytes."""
    base = source if source.is_dir() else source.parent
    exported = digests_of_export(base)
    total = sum(file.path.stat().st_size for file in files if file.path.is_file())

    def one(file: SourceFile) -> dict[str, Any]:
        if not file.path.is_file():
            raise DataRefused(f"{file.path} is missing; copy the source anew")
        stamps = []
        for path in (file.path, *file.beside):
            stamps.append(f"xxh3_128:{check_export(path, exported, base)}")
        size = file.path.stat().st_size
        bar.update(size / 1e6)
        return {
            "url": str(file.path.absolute()), "path": str(file.path.relative_to(base)),
            "size": size, "stamp": " ".join(stamps), "split": file.split,
        }  # fmt: skip

    with (
        Progress("hash the source", total / 1e6, "MB", enabled=progress) as bar,
        concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        return list(pool.map(one, files))


def digests_of_export(folder: Path) -> dict[str, Any]:
    """xxh3-128 by name of the files of a folder that `leyden data export` wrote; {} of another."""
    try:
        files = json.loads((folder / ORIGIN).read_bytes())["files"]
        return {name: facts["xxh3_128"] for name, facts in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def ends_of_export(source: Path, tokenizer_digest: str) -> tuple[int | None, int | None]:
    """(bos_id, eos_id) of the dataset that a source was exported from, with that tokenizer."""
    try:
        base = source if source.is_dir() else source.parent
        origin = json.loads((base / ORIGIN).read_bytes())
        if origin["tokenizer_digest"] != tokenizer_digest:
            return None, None
        bos, eos = (origin["schema"].get(name) for name in ("bos_id", "eos_id"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None
    return (bos if type(bos) is int else None, eos if type(eos) is int else None)


def check_export(path: Path, exported: dict[str, Any], base: Path) -> str:
    """A file's xxh3-128; DataRefused if an export of ours, in `base`, tells another."""
    digest, told = file_digest(path), exported.get(str(path.relative_to(base)))
    if told not in (None, digest):
        raise DataRefused(
            f"{path} has xxh3-128 {digest}, {base / ORIGIN} says {told}: it is damaged, or was "
            f"changed after its export; copy it anew, or delete {ORIGIN}"
        )
    return digest
