"""What every foreign token format is read as: files with a split, and blocks of documents."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist.errors import DataRefused

BLOCK_TOKENS = 1 << 22
TOKEN_COLUMNS = ("input_ids", "tokens")
_SPLITS = {"train": "train", "validation": "validation", "valid": "validation",
           "val": "validation", "dev": "validation", "test": "test"}  # fmt: skip
_SPLIT = re.compile(rf"({'|'.join(_SPLITS)})(?:$|[-_.])")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some documents of one file, in its order."""

    tokens: NDArray[np.integer]
    """(sum(lengths),) of any integer type."""
    lengths: NDArray[np.int64]
    """(documents,)"""
    trained: NDArray[np.bool_] | None = None
    """Of a source with labels: (sum(lengths),) which tokens are trained as targets."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file of documents and the files that have to be read for it."""

    path: Path
    split: str
    read: Callable[[], Iterator[Block]]
    """Yields its documents; DataRefused for damage."""
    has_labels: bool = False
    """Whether its blocks say which tokens are trained."""
    not_read: tuple[str, ...] = field(default=())
    """Columns that change what its tokens mean, and that nothing here reads."""
    beside: tuple[Path, ...] = field(default=())
    """Other files that decide the tokens (an index); they are part of the source's digest."""


def checked_blocks(file: SourceFile, vocab_size: int, trains_all: bool) -> Iterator[Block]:
    """Blocks of a file whose ids are all of the vocabulary; DataRefused names the first other, or,
    if all are to be trained, the first that its labels leave out."""
    before = 0
    for block in file.read():
        tokens = block.tokens
        # One unsigned comparison would let a negative id of a signed type pass as a large one.
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= vocab_size):
            bad = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
            document = int(np.searchsorted(np.cumsum(block.lengths), bad, side="right"))
            raise DataRefused(
                f"{file.path}: document {before + document} holds the id {int(tokens[bad])}, the "
                f"tokenizer has ids 0 to {vocab_size - 1}; pass the tokenizer that made the tokens"
            )
        if trains_all and block.trained is not None:
            left_out = ~block.trained
            left_out[(np.cumsum(block.lengths) - block.lengths)[block.lengths > 0]] = False
            if left_out.any():
                place = int(np.flatnonzero(left_out)[0])
                document = int(np.searchsorted(np.cumsum(block.lengths), place, side="right"))
                raise DataRefused(
                    f"{file.path}: the labels of document {before + document} leave tokens out, "
                    "and packed rows train all; import it with --kind examples"
                )
        yield block
        before += len(block.lengths)


def cut_after(block: Block, token: int) -> NDArray[np.int64]:
    """(documents,) lengths where each document of a block ends after every `token`."""
    ends = np.union1d(np.cumsum(block.lengths), np.flatnonzero(block.tokens == token) + 1)
    ends = ends[ends > 0]
    return np.diff(ends, prepend=0).astype(np.int64)


def visible_files(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> list[Path]:
    """Files at or under a folder, sorted; not the hidden ones, as of an export that was killed.

    Links are followed, and one that leads nowhere is listed: whoever reads it says so.
    """
    if not folder.is_dir():
        return []
    facts = folder.stat()
    here = (facts.st_dev, facts.st_ino)
    if here in above:  # a link to a folder that it lies in
        return []
    found: list[Path] = []
    for path in folder.iterdir():
        if not path.name.startswith("."):
            found += visible_files(path, (*above, here)) if path.is_dir() else [path]
    return sorted(found)


def split_of(relative: Path | str) -> str | None:
    """Split that a file's or folder's name begins with (`train-00000.parquet`), else None."""
    for part in reversed(Path(relative).parts):
        if match := _SPLIT.match(part.lower()):
            return _SPLITS[match[1]]
    return None


def text_advice(what: str) -> str:
    """What to do with a source that holds text where tokens are wanted."""
    return (
        f"{what}; import takes tokens. Turn text into a dataset with `leyden prep tokenize-text "
        "--input ... --tokenizer ... --output ...`"
    )
