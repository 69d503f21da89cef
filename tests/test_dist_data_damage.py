"""Random damages: each is refused by name before a wrong row reaches a model.

Data is opened as a run opens it: presence, tokenizer, lengths, then loaders with their verifier
or the node's cache; what is compared are the rows that the loaders give.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from dist.cache import CacheConfig
from dist.dataset import Dataset, open_dataset
from dist.errors import DataRefused
from dist.examples import as_rows
from dist.loader import LoaderPlan, TokenLoader
from dist.order import SequentialOrder
from dist.verify import ShardVerifier, check_presence
from tests.http_server import serve
from tests.make_dataset import write_dataset
from tests.make_examples import write_examples

ON_DISK, AT_A_STORE = 200, 40
"""Damages of each kind of data. Of shards alone, which is faster, there are 1,000 of each kind in
test_dist_checked_shards.py, and 1,000 in a cache and its store in test_dist_cache_faults.py."""
WRITE: dict[str, Callable[[Path], Dataset]] = {
    "packed_tokens": lambda root: write_dataset(root, documents=12),
    "examples": lambda root: write_examples(root, num_examples=10, num_train_shards=3),
}


def rows_until_refused(reference: str, cache: CacheConfig, stamps: Path) -> tuple[list[bytes], str]:
    """(each row of all splits that a model would receive, why the next was refused or '')."""
    found: list[bytes] = []
    try:
        dataset = as_rows(open_dataset(reference, cache))
        check_presence(dataset)
        dataset.read_tokenizer()
        for name in dataset.manifest.splits():
            split = dataset.split(name)
            verifier = ShardVerifier(dataset, split, stamps)
            plan = LoaderPlan(batch=1, micro_batch=1, end_t=split.num_rows)
            order = SequentialOrder(split.num_rows)
            with TokenLoader(dataset, split, order, plan, verifier=verifier) as loader:
                for batch in loader:
                    found.append(batch.tokens.numpy().tobytes() + batch.valid.numpy().tobytes())
    except DataRefused as error:
        return found, str(error)
    return found, ""


def damage(rng: random.Random, files: list[Path]) -> str:
    """Damage one of the files, or swap two of equal kind; says which and how."""
    path = rng.choice(files)
    how = rng.choice(["flip", "flip", "cut", "swap", "delete"])
    data = bytearray(path.read_bytes())
    others = [one for one in files if one.parent == path.parent and one != path]
    if how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif how == "swap" and others:
        other = rng.choice(others)
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    else:
        how = "delete"
        path.unlink()
    return f"{how} {path.parent.name}"


def contents(root: Path, *folders: str) -> dict[Path, bytes]:
    paths = [path for name in folders for path in sorted((root / name).glob("*"))]
    return {path: path.read_bytes() for path in paths if path.is_file()}


def restore(good: dict[Path, bytes]) -> None:
    for path, data in good.items():
        if not path.is_file() or path.read_bytes() != data:
            path.write_bytes(data)


FOLDERS = ("shards", "shards", "shards", "manifests", "tokenizers", "lengths")


@pytest.mark.parametrize("kind", WRITE)
def test_damage_on_the_disk_is_refused_before_use(kind: str, tmp_path: Path) -> None:
    """A byte that is trained on although it is not what the manifest says; or a file that nobody
    checks: the manifest itself, the tokenizer, the table of lengths."""
    dataset, rng = WRITE[kind](tmp_path / "data"), random.Random(3)
    good, cache = contents(tmp_path / "data", *FOLDERS), CacheConfig()
    whole, why = rows_until_refused(dataset.reference, cache, tmp_path / "first")
    assert not why and len(whole) > 20
    done: Counter[str] = Counter()
    for number in range(ON_DISK):
        folder = rng.choice([name for name in FOLDERS if (tmp_path / "data" / name).is_dir()])
        files = [path for path in good if path.parent.name == folder]
        what = damage(rng, files)
        stamps = tmp_path / f"stamps-{number}"
        rows, why = rows_until_refused(dataset.reference, cache, stamps)
        assert why, f"{what} was not found"
        assert str(tmp_path / "data") in why or folder in why, f"{what}: {why} names no file"
        assert rows == whole[: len(rows)], f"{what} reached a model"
        shutil.rmtree(stamps, ignore_errors=True)
        restore(good)
        done[what] += 1
    assert rows_until_refused(dataset.reference, cache, tmp_path / "last") == (whole, "")
    assert len(done) == (10 if kind == "packed_tokens" else 13), done


@pytest.mark.parametrize("kind", WRITE)
def test_damage_at_a_store_or_in_the_cache_is_refused_before_use(kind: str, tmp_path: Path) -> None:
    """Bytes damaged at the store that pass for the shard, or a cached copy that rotted and is
    trained on since it was right when it was fetched."""
    dataset, rng = WRITE[kind](tmp_path / "data"), random.Random(4)
    good = contents(tmp_path / "data", *FOLDERS)
    cache = CacheConfig(folder=str(tmp_path / "cache"), limit_gb=1)
    done: Counter[str] = Counter()
    with serve(tmp_path / "data") as server:
        reference = f"{server.url}@{dataset.data_digest}"
        whole, why = rows_until_refused(reference, cache, tmp_path / "stamps")
        assert not why and len(whole) > 20
        for number in range(AT_A_STORE):
            if number % 3:
                copies = sorted((tmp_path / "cache").rglob("*.arrow"))
                lengths = dataset.manifest.lengths_digest is not None
                assert len(copies) == len(dataset.manifest.shards) + lengths
                what = f"cached: {damage(rng, copies)}"
                assert rows_until_refused(reference, cache, tmp_path / "stamps") == (whole, ""), (
                    f"{what} was not fetched anew"
                )
            else:
                folder = rng.choice([n for n in FOLDERS if (tmp_path / "data" / n).is_dir()])
                for copy in (tmp_path / "cache").rglob("*.arrow"):
                    copy.unlink()
                what = damage(rng, [path for path in good if path.parent.name == folder])
                rows, why = rows_until_refused(reference, cache, tmp_path / "stamps")
                assert why, f"{what} was not found"
                assert server.url in why or folder in why, f"{what}: {why} names no file"
                assert rows == whole[: len(rows)], f"{what} reached a model"
                restore(good)
                assert rows_until_refused(reference, cache, tmp_path / "stamps") == (whole, "")
            done[what] += 1
    assert sum(done.values()) == AT_A_STORE and len(done) >= 8, done
