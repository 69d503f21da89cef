"""A dataset as Megatron's, WebDataset's or Hugging Face's files: whole, or not there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dist.cache_folder import in_words
from dist.dataset import Dataset
from dist.documents import Documents, read_documents, read_examples
from dist.errors import ConfigError, DataRefused, SetupError
from dist.lineage import input_paths
from dist.local_files import sync_folder
from dist.megatron_format import MegatronWriter
from dist.progress import Progress
from dist.shard_file import file_digest
from dist.table_format import ParquetTokensWriter
from dist.tar_format import TarTokensWriter
from dist.versions import code_version

FORMATS = ("megatron", "webdataset", "hf")
ORIGIN = "origin.json"
# What a document costs beside its tokens: tar headers and padding, index entries.
_BYTES_A_DOCUMENT = {"megatron": 20, "webdataset": 3072, "hf": 64}


class Writer(Protocol):
    """What writes a split's documents."""

    def add(self, documents: Documents) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export left."""

    folder: Path
    files: dict[str, dict[str, Any]]
    documents: dict[str, int]
    """By split."""
    already: bool
    """It was there, made from the same version."""


def export_dataset(dataset: Dataset, to: str, out: Path, *, progress: bool = True) -> Exported:
    """Write every document of every split to the new folder `out`.

    Its origin.json names the version and every file's size and xxh3-128. The folder appears by one
    rename; a second export of the same version finds it and does nothing. Raises ConfigError for
    a folder that holds something else.
    """
    if to not in FORMATS:
        raise ConfigError(f"{to!r} is not a format to export to; choose {', '.join(FORMATS)}")
    if dataset.manifest.kind == "examples" and to != "hf":
        raise ConfigError(
            f"{dataset.storage.url} holds examples, and {to} files have no place for what of them "
            "is trained; export them --to hf"
        )
    if "://" in str(out) or ":/" in str(out):
        raise ConfigError(f"{out}: an export is a folder on a disk; write it there, then copy it")
    out = out.resolve()  # a link cannot be replaced by a folder, nor `new/..`
    if (done := _found(dataset, to, out)) is not None:
        return done
    _check_space(dataset, to, out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{error.filename} is no folder, so {out} cannot be made") from None
    scratch = out.with_name(f".{out.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    scratch.mkdir()
    try:
        counts = _write_splits(dataset, to, scratch, progress)
        files = _seal(dataset, to, scratch, counts)
        os.rename(scratch, out)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SetupError(
                f"the disk of {out.parent} was full before the export was whole, and nothing of "
                "it is left; make room, or name a folder on another disk"
            ) from None
        raise
    sync_folder(out.parent)
    return Exported(folder=out, files=files, documents=counts, already=False)


def _write_splits(dataset: Dataset, to: str, folder: Path, progress: bool) -> dict[str, int]:
    paths = [path for path, _ in input_paths(dataset)]
    total = sum(one["tokens"] for one in dataset.manifest.totals.values())
    counts: dict[str, int] = {}
    read = read_examples if dataset.manifest.kind == "examples" else read_documents
    with Progress(f"export to {to}", total / 1e6, "M tokens", enabled=progress) as bar:
        for split in dataset.manifest.splits():
            tokens = counts[split] = 0
            writer = _writer(dataset, to, folder, split, paths)
            try:
                for documents in read(dataset, split):
                    writer.add(documents)
                    counts[split] += len(documents.lengths)
                    tokens += len(documents.tokens)
                    bar.update(len(documents.tokens) / 1e6)
                writer.close()
            except BaseException:
                with contextlib.suppress(Exception):  # the first error is the one to tell
                    writer.abort()
                raise
            wanted = dataset.manifest.totals[split]["tokens"]
            if tokens != wanted:
                raise DataRefused(
                    f"the shards of {split!r} hold {tokens} tokens, the manifest says {wanted}; "
                    "run `leyden data verify`"
                )
    return counts


def _writer(dataset: Dataset, to: str, folder: Path, split: str, paths: list[str]) -> Writer:
    if to == "megatron":
        return MegatronWriter(folder / split, dataset.manifest.schema["vocab_size"])
    if to == "webdataset":
        return TarTokensWriter(folder / split, paths)
    (folder / "data").mkdir(exist_ok=True)
    return ParquetTokensWriter(
        folder / "data" / f"{split}-00000-of-00001.parquet", paths,
        with_labels=dataset.manifest.kind == "examples",
    )  # fmt: skip


def _seal(
    dataset: Dataset, to: str, folder: Path, counts: dict[str, int]
) -> dict[str, dict[str, Any]]:
    """Add the tokenizer and origin.json, and make every file durable."""
    if dataset.manifest.tokenizer_digest is not None:
        (folder / "tokenizer.json").write_bytes(dataset.read_tokenizer())
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "xxh3_128": file_digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    origin = {
        "format": to, "data_digest": dataset.data_digest, "reference": dataset.reference,
        "tokenizer_digest": dataset.manifest.tokenizer_digest, "schema": dataset.manifest.schema,
        "documents": counts, "files": files, "code": code_version(),
    }  # fmt: skip
    (folder / ORIGIN).write_text(json.dumps(origin, indent=1, sort_keys=True) + "\n")
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return files


def _found(dataset: Dataset, to: str, out: Path) -> Exported | None:
    """The export that stands in `out` already; None if there is nothing there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        origin = json.loads((out / ORIGIN).read_bytes())
        same = origin["data_digest"] == dataset.data_digest and origin["format"] == to
        whole = all(
            (out / name).stat().st_size == facts["bytes"] for name, facts in origin["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        same = whole = False
    if same and whole:
        return Exported(
            folder=out, files=origin["files"], documents=origin["documents"], already=True
        )
    raise ConfigError(f"{out} holds something else; name a folder that is new, or remove that one")


def _check_space(dataset: Dataset, to: str, out: Path) -> None:
    """Raise SetupError where the disk cannot hold the export."""
    width = 2 if dataset.manifest.schema["vocab_size"] < 65500 and to != "hf" else 4
    totals = dataset.manifest.totals.values()
    need = sum(t["tokens"] * width + t["documents"] * _BYTES_A_DOCUMENT[to] for t in totals)
    if to == "hf":
        need //= 4  # compressed; a first guess, ENOSPC still tells
    place = next(p for p in (out, *out.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if need > free:
        raise SetupError(
            f"the export takes about {in_words(need)} and {place} has {in_words(free)} free; name "
            "a folder on another disk"
        )
