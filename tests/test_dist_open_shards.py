"""Which shards are mapped at a time: within the cache's share, whatever a step needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist import open_shards, step_gather
from dist.cache import CacheConfig
from dist.dataset import Dataset, open_dataset
from dist.loader import LoaderPlan, TokenLoader
from dist.order import Order
from tests.http_server import FolderServer, serve
from tests.make_dataset import write_dataset
from tests.make_examples import write_examples

SHARDS = 12


@pytest.fixture(scope="module", params=["packed_tokens", "examples"])
def local(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("data") / "data"
    if request.param == "examples":
        return write_examples(root, num_train_shards=SHARDS, num_examples=30)
    return write_dataset(root, num_train_shards=SHARDS)


@pytest.fixture
def server(local: Dataset) -> Iterator[FolderServer]:
    with serve(local.storage.url) as server:
        yield server


def delivered(dataset: Dataset) -> list[tuple[Any, ...]]:
    from dist.examples import as_rows

    rows = as_rows(dataset)
    split = rows.split("train")
    batch = min(64, split.num_rows)  # rows of nearly every shard
    plan = LoaderPlan(batch=batch, micro_batch=7, end_step=3)
    with TokenLoader(rows, split, Order(split.num_rows, 1), plan) as found:
        return [
            (one.rows.tolist(), one.tokens.tolist(), one.cu_seqlens.tolist(), one.valid.tolist())
            for one in found
        ]


def maps_in(folder: Path) -> set[str]:
    """Files of a folder that this process maps, also such as were deleted since."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if str(folder) in line}


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, local: Dataset) -> list[int]:
    """How many shards are mapped whenever rows are copied."""
    counts: list[int] = []
    for name in ("gather_rows", "gather_examples"):
        original = getattr(step_gather, name)

        def counted(*args: Any, original: Any = original) -> Any:
            counts.append(len(maps_in(tmp_path / "cache") | maps_in(Path(local.storage.url))))
            return original(*args)

        monkeypatch.setattr(step_gather, name, counted)
    return counts


def test_a_step_of_more_shards_than_the_cache_holds(
    local: Dataset, server: FolderServer, tmp_path: Path, mapped: list[int]
) -> None:
    """Shards of a whole step mapped at once keep the disk's space of all that were evicted: a
    batch of 256 shards of 64 MB would take 16 GB of a cache of 2."""
    largest = max(shard.bytes for shard in local.manifest.shards)
    config = CacheConfig(folder=str(tmp_path / "cache"), limit_gb=8.5 * largest / 1e9)
    found = delivered(open_dataset(server.url, config))
    assert len(mapped) > 6  # in parts
    assert 2 <= max(mapped) <= 4  # half of the share
    assert found == delivered(local)


def test_a_step_of_more_shards_than_may_be_open(
    local: Dataset, mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that maps thousands of shards at a time runs out of open files."""
    at_once = delivered(local)
    assert max(mapped) > 8
    mapped.clear()
    monkeypatch.setattr(open_shards, "MAX_OPEN_SHARDS", 3)
    assert delivered(local) == at_once
    assert max(mapped) == 3
