"""Readers beside the loader: damaged shards are named, never shown, copied, or fatal."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dist import checked_shards
from dist.checked_shards import checked_batches, checked_path, checked_rows
from dist.data_diff import diff_datasets
from dist.data_export import export_dataset
from dist.data_inspect import scan
from dist.data_samples import sample_rows
from dist.dataset import Dataset
from dist.errors import DataRefused
from dist.examples import as_rows
from dist.lineage import rows_of_source
from dist.shard_file import file_digest
from dist.stamps import file_facts
from dist.verify import ShardVerifier, wrong_bytes
from spark_jobs.quarantine import write_shards
from tests.make_dataset import flip_byte, write_dataset
from tests.make_examples import write_examples

ROOT = Path(__file__).resolve().parent.parent
WRITE: dict[str, Callable[..., Dataset]] = {
    "packed_tokens": write_dataset, "examples": write_examples,
}  # fmt: skip


def alone(code: str, *arguments: str) -> None:
    """Run code in a process of its own, whose end by a signal is a failure of the test."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"


@pytest.mark.parametrize("kind", WRITE)
def test_1000_damages_are_named_and_end_no_process(kind: str, tmp_path: Path) -> None:
    """Arrow aborts where a damaged length leads out of a buffer (1 in 300 flips): `verify`, and a
    run that meets the shard, would die by SIGABRT and name nothing."""
    WRITE[kind](tmp_path / "data")
    alone(
        "import sys; from pathlib import Path\n"
        "from tests.test_dist_checked_shards import find_1000\n"
        "find_1000(Path(sys.argv[1]))",
        str(tmp_path / "data"),
    )


def find_1000(root: Path) -> None:
    """Damage a shard a thousand times; in a process of its own."""
    from dist.dataset import open_dataset

    dataset, rng = open_dataset(str(root)), random.Random(1)
    shard = dataset.manifest.shards[0]
    path = dataset.shard_path(shard)
    whole = path.read_bytes()
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 20])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        assert data == whole or "the manifest says" in wrong_bytes(path, shard)


READERS: dict[str, Callable[[Dataset, Path], object]] = {
    "inspect": lambda data, _: scan(data),
    "inspect of a part": lambda data, _: scan(data, 30),
    "samples": lambda data, _: sample_rows(data, "train", 9),
    "diff": lambda data, out: diff_datasets(
        data, WRITE[data.manifest.kind](out / "other", seed=1), progress=False
    ),
    "who-saw": lambda data, _: rows_of_source(data, 0, None, progress=False),
    "quarantine": lambda data, out: write_shards(
        data, WRITE[data.manifest.kind](out / "target").storage, {0: np.array([1])}
    ),
}


@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize("reader", READERS)
def test_damage_is_refused_by_every_reader(reader: str, kind: str, tmp_path: Path) -> None:
    """A flipped token shown as data; or copied into a new version, whose digest then vouches for
    it; a shard that is gone told as a wrong command line (exit 2)."""
    dataset = WRITE[kind](tmp_path / "data")
    path = dataset.shard_path(dataset.manifest.shards[0])
    # The first batch, which any part holds: a token of its first row, near the batch's end.
    flip_byte(path, _first_body(path))
    with pytest.raises(DataRefused, match=path.name):
        READERS[reader](dataset, tmp_path)
    path.unlink()
    with pytest.raises(DataRefused, match=f"{path.name} is missing"):
        READERS[reader](dataset, tmp_path)


def _first_body(path: Path) -> int:
    """Offset of a byte of the first record batch's tokens."""
    with pa.memory_map(str(path)) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
        tokens = batch.column("tokens").values.to_numpy()[:4].tobytes()
    return path.read_bytes().index(tokens)


def test_an_export_never_holds_a_flipped_token(tmp_path: Path) -> None:
    """Damage that keeps every count: the export looks whole, and nobody compares it again."""
    dataset = write_dataset(tmp_path / "data")
    path = dataset.shard_path(dataset.manifest.shards[0])
    flip_byte(path, _first_body(path))
    with pytest.raises(DataRefused, match="damaged: record batches"):
        export_dataset(dataset, "megatron", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_part_costs_its_own_batches_and_trusts_no_footer(tmp_path: Path) -> None:
    """Two rows of a terabyte that take an hour to hash; or a footer that sends to whole batches of
    other rows."""
    dataset = write_dataset(tmp_path / "data")
    shard, split = dataset.manifest.shards[0], dataset.split("train")
    path = dataset.shard_path(shard)
    whole = path.read_bytes()
    flip_byte(path, _first_body(path))
    assert checked_batches(dataset, shard, [1, 2]) == path
    assert checked_rows(dataset, split, 0, np.array([5, 6])) == path  # four rows a batch
    for wanted in ([0], [2, 0]):
        with pytest.raises(DataRefused, match="record batch 0 has xxh3-64"):
            checked_batches(dataset, shard, wanted)
    # Two batches exchanged in the footer: each of them is whole.
    path.write_bytes(whole)
    with pa.memory_map(str(path)) as source:
        offsets, at = [], 0
        count = pa.ipc.open_file(source).num_record_batches
    body = whole[: len(whole) - 10 - struct.unpack("<i", whole[-10:-6])[0]]
    footer = bytearray(whole[len(body) :])
    while len(offsets) < count + 1:  # messages begin with the continuation marker
        at = body.index(b"\xff\xff\xff\xff", at)
        offsets.append(at)
        at += 8
    first, second = struct.pack("<q", offsets[1]), struct.pack("<q", offsets[2])
    assert footer.count(first) == footer.count(second) == 1
    a, b = footer.index(first), footer.index(second)
    # A block of the footer: offset, length of the message, length of its body.
    footer[a : a + 24], footer[b : b + 24] = footer[b : b + 24], footer[a : a + 24]
    path.write_bytes(body + footer)
    with pytest.raises(DataRefused, match="sends to another record batch"):
        checked_batches(dataset, shard, [0])


def test_examples_are_found_in_their_batches(tmp_path: Path) -> None:
    """A packed row's examples lie in several batches: one that is not looked at may be damaged."""
    dataset = as_rows(write_examples(tmp_path / "data"), "packed")
    split = dataset.split("train")
    packs = split.packs[0]  # type: ignore[attr-defined]
    row = next(r for r in range(packs.num_rows) if len(set(packs.examples_of(r) // 8)) > 1)
    batches = sorted(set((packs.examples_of(row) // 8).tolist()))
    asked: list[list[int]] = []
    original = checked_shards.checked_batches
    try:
        checked_shards.checked_batches = lambda d, s, wanted: (
            asked.append(wanted)
            or original(  # type: ignore
                d, s, wanted
            )
        )
        checked_rows(dataset, split, 0, np.array([row]))
    finally:
        checked_shards.checked_batches = original
    assert asked == [batches]


def test_what_a_run_hashed_is_not_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """who-saw of a source that reads a terabyte, which the run's stamps vouch for; or a stamp that
    vouches for a file that has changed since."""
    dataset = write_dataset(tmp_path / "data")
    split = dataset.split("train")
    verifier = ShardVerifier(dataset, split, tmp_path / "verified")
    for number in range(len(split.shards)):
        verifier.require(number)
    hashed: list[Path] = []
    monkeypatch.setattr(
        "dist.verify.file_digest", lambda path: hashed.append(path) or file_digest(path)
    )
    shard = split.shards[0]
    path = checked_path(dataset, shard, tmp_path / "verified")
    assert not hashed
    facts = file_facts(path, shard.xxh3_128)
    flip_byte(path, 900)
    assert file_facts(path, shard.xxh3_128) != facts
    with pytest.raises(DataRefused, match=path.name):
        checked_path(dataset, shard, tmp_path / "verified")
    assert hashed == [path]
