"""Tokens in WebDataset's tar files: members KEY.EXTENSION of equal KEY are one sample."""

from __future__ import annotations

import io
import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist.documents import Documents
from dist.errors import ConfigError, DataRefused
from dist.token_source import (
    BLOCK_TOKENS,
    TOKEN_COLUMNS,
    Block,
    SourceFile,
    split_of,
    text_advice,
    visible_files,
)

SUFFIXES = (".tar", ".tar.gz", ".tgz")
MAX_TAR_BYTES = 256 << 20


def find_tars(source: Path, column: str) -> list[SourceFile]:
    """Tar files of a folder, at any depth (folders may be named by split), or one tar file."""
    if source.is_file():
        found = [source]
    else:
        found = [path for path in visible_files(source) if path.name.endswith(SUFFIXES)]
    if not found:
        raise ConfigError(f"no {', '.join(SUFFIXES)} file at {source}")
    base = source if source.is_dir() else source.parent
    return [
        SourceFile(
            path=path, split=split_of(path.relative_to(base)) or "train",
            read=lambda path=path: read_tar(path, column),  # type: ignore[misc]
        )
        for path in found
    ]  # fmt: skip


def read_tar(path: Path, column: str) -> Iterator[Block]:
    """The tokens of each sample as a document; DataRefused for damage or text."""
    if path.suffix == ".tar":
        _check_end(path)
    documents: list[NDArray[np.integer]] = []
    pending = 0
    try:
        with tarfile.open(path, "r:*") as tar:
            for key, members in _samples(path, tar):
                documents.append(_tokens(f"{path}: sample {key!r}", members, column))
                pending += len(documents[-1])
                if pending >= BLOCK_TOKENS:
                    yield _block(documents)
                    documents, pending = [], 0
            # A tar file ends before its gzip does: the checksum comes after.
            while tar.fileobj is not None and tar.fileobj.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's own; those of gzip name damage and have no number
        raise DataRefused(f"{path} is damaged or cut off ({error}); copy it anew") from None
    if documents:
        yield _block(documents)


def _block(documents: list[NDArray[np.integer]]) -> Block:
    lengths = np.array([len(one) for one in documents], np.int64)
    return Block(tokens=np.concatenate(documents), lengths=lengths)


def _check_end(path: Path) -> None:
    """A tar file that lost its end at a member's border reads as a shorter, whole one."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - 1024))
        whole = size >= 1024 and size % 512 == 0 and not any(file.read())
    if not whole:
        raise DataRefused(
            f"{path} does not end as a tar file does, with 1,024 zero bytes: it was cut off or "
            "is no tar file; copy it anew"
        )


def _samples(path: Path, tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {extension: bytes}) of each run of members of equal key."""
    key, members = "", {}  # type: str, dict[str, bytes]
    for member in tar:
        if not member.isfile():
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        this = f"{folder}/{stem}" if folder else stem
        if stem == "" or not extension:
            continue
        if this != key and members:
            yield key, members
            members = {}
        file = tar.extractfile(member)
        key, extension = this, extension.lower()
        if extension in members and (extension.endswith("npy") or extension == "json"):
            raise DataRefused(
                f"{path}: sample {key!r} has two members .{extension}; one of them would be "
                "lost: give each sample a key of its own"
            )
        members[extension] = file.read() if file else b""
    if members:
        yield key, members


def _tokens(what: str, members: dict[str, bytes], column: str) -> NDArray[np.integer]:
    """Tokens of a sample: its .npy member, or a list in its .json member."""
    names = (column,) if column else TOKEN_COLUMNS
    arrays = [e for e in members if e.endswith("npy") and (not column or column in e.split("."))]
    found: Any = None
    try:
        if len(arrays) == 1:
            found = _array(members[arrays[0]])
        elif not arrays and "json" in members:
            record = json.loads(members["json"])
            found = next((record[name] for name in names if name in record), None)
            found = None if found is None else np.array(found, None if found else np.int64)
    except (ValueError, TypeError) as error:
        raise DataRefused(f"{what}: {error}") from None
    if found is None:
        said = f"{what} has the members {', '.join(sorted(members))}"
        if "txt" in members or "text" in members or "json" in members:
            raise DataRefused(text_advice(f"{said} and no list of tokens among them"))
        raise ConfigError(f"{said}; name the one of tokens (.npy) with --column")
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise DataRefused(f"{what}: an array {found.shape} of {found.dtype} is no list of tokens")
    return found


def _array(data: bytes) -> Any:
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # a damaged header is parsed as Python, a damaged shape allocated
        raise ValueError(f"no .npy array ({error})") from None


class TarTokensWriter:
    """Writes PREFIX-000000.tar and so on: NUMBER.tokens.npy and NUMBER.json a document."""

    def __init__(self, prefix: Path, paths: list[str]) -> None:
        self._prefix, self._paths = prefix, paths
        self._tar: tarfile.TarFile | None = None
        self._files, self._documents, self._bytes = 0, 0, 0

    def add(self, documents: Documents) -> None:
        """Append documents."""
        ends = np.cumsum(documents.lengths)
        for number, end in enumerate(ends.tolist()):
            array = io.BytesIO()
            np.save(array, documents.tokens[end - documents.lengths[number] : end])
            source = int(documents.inputs[number])
            facts = {
                "source": self._paths[source] if source < len(self._paths) else "",
                "offset": int(documents.offsets[number]),
            }
            self._member("tokens.npy", array.getvalue())
            self._member("json", json.dumps(facts).encode())
            self._documents += 1

    def close(self) -> None:
        """Write the end of the last file."""
        if self._tar is not None:
            self._tar.close()

    def abort(self) -> None:
        """Close what is open; the files are of no use."""
        if self._tar is not None and self._tar.fileobj is not None:
            self._tar.fileobj.close()

    def _member(self, extension: str, data: bytes) -> None:
        if self._tar is None or (extension != "json" and self._bytes >= MAX_TAR_BYTES):
            self.close()
            name = f"{self._prefix}-{self._files:06}.tar"
            self._tar = tarfile.open(name, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            self._files, self._bytes = self._files + 1, 0
        member = tarfile.TarInfo(f"{self._documents:09}.{extension}")
        # No owner and no time: equal documents give equal files.
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))
        self._bytes += 1024 + len(data)
