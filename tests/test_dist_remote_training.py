"""Training from s3://, http:// and memory://: the same numbers as from the local folder."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist import open_shards
from dist.cache import CacheConfig
from dist.dataset import Dataset, open_dataset
from dist.errors import ConfigError, DataRefused, SetupError
from dist.loader import LoaderPlan, TokenLoader, training_loader
from dist.open_shards import remote_notes
from dist.order import Order, SequentialOrder
from dist.storage import Storage
from dist.verify import check_presence, verify_full
from tests.http_server import FolderServer, serve
from tests.make_dataset import flip_byte, write_dataset
from tests.rank_processes import train
from tests.small_run import small_data, small_run
from tests.waiting import came

KEPT = ("step", "loss", "grad_norm", "lr")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("remote") / "data", num_train_shards=10)


@pytest.fixture
def server(local: Dataset) -> Iterator[FolderServer]:
    with serve(local.storage.url) as server:
        yield server


@pytest.fixture
def remote(server: FolderServer, tmp_path: Path) -> Dataset:
    return open_dataset(server.url, CacheConfig(folder=str(tmp_path / "cache")))


def upload(local: Dataset, url: str) -> None:
    """Copy a dataset's files to another store."""
    target, root = Storage(url), Path(local.storage.url)
    for path in root.rglob("*"):
        if path.is_file():
            target.write_atomic(str(path.relative_to(root)), path.read_bytes())


def losses(run: Path) -> list[tuple[Any, ...]]:
    """What the run logged of each step, of its last attempt at it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "loss" in line}
    return [tuple(steps[step][key] for key in KEPT) for step in sorted(steps)]


def batches(dataset: Dataset, plan: LoaderPlan) -> list[tuple[list[int], bytes]]:
    split = dataset.split("train")
    with TokenLoader(dataset, split, Order(split.num_rows, 1), plan) as loader:
        return [(one.rows.tolist(), one.tokens.numpy().tobytes()) for one in loader]


def config_of(url: str, cache: Path, **more: Any) -> dict[str, Any]:
    from dist.start import DataConfig

    data = DataConfig(url=url, cache_dir=str(cache), **{"order": "global", **more})
    return {"data": data, "max_steps": 6, "save_every_steps": 3, "val_every_steps": 3}


@pytest.fixture(scope="module")
def local_losses(local: Dataset, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    run = tmp_path_factory.mktemp("runs") / "local"
    assert train(local.storage.url, run, 2, config_of(local.storage.url, run / "unused")) == [0, 0]
    return losses(run)


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_two_ranks_train_the_same_from_a_url(
    scheme: str, local: Dataset, local_losses: Any, server: FolderServer, tmp_path: Path,
    s3_server: str,
) -> None:  # fmt: skip
    """A remote shard in another order, a rank with other rows, or a second download of a shard."""
    url = server.url
    if scheme == "s3":
        url = "s3://leyden/remote-training"
        upload(local, url)
    run = tmp_path / "run"
    settings = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    codes = train(url, run, 2, config_of(url, tmp_path / "cache"), _reach_s3, settings)
    assert codes == [0, 0]
    assert len(local_losses) == 6 and losses(run) == local_losses
    shards = server.gets_of(".arrow")
    if scheme == "http":
        assert len(shards) == len({one.path for one in shards}), "a shard was fetched twice"
    assert json.loads((run / "run.json").read_text())["data"].startswith(url)


def _reach_s3(rank: int, settings: dict[str, str]) -> None:
    """The server of ranks may be older than that of S3."""
    os.environ.update(settings)


def _die_at(rank: int, step: int) -> None:
    """Rank 1 is killed by SIGKILL when the ranks are about to agree on a step."""
    from dist.loader import TokenLoader

    agree = TokenLoader._may_agree

    def agree_or_die(self: Any, batches: Any, channel: Any) -> bool:
        found = agree(self, batches, channel)
        if rank == 1 and batches and batches[0].step == step and self.split.name == "train":
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    TokenLoader._may_agree = agree_or_die  # type: ignore[method-assign]


def test_kill_and_resume_from_a_url(
    local_losses: Any, server: FolderServer, tmp_path: Path
) -> None:
    """A killed rank whose locks, parts or members stop the next start, or change its numbers."""
    changes = config_of(server.url, tmp_path / "cache")
    codes = train(server.url, tmp_path / "run", 2, changes, _die_at, 5)
    assert -signal.SIGKILL in codes
    assert train(server.url, tmp_path / "run", 2, changes) == [0, 0]
    assert losses(tmp_path / "run") == local_losses


def test_a_run_with_a_small_cache_trains_the_same(
    local: Dataset, local_losses: Any, server: FolderServer, tmp_path: Path
) -> None:
    """Two ranks that block each other, or rows of an evicted shard, where 4 of 11 shards fit."""
    largest = max(shard.bytes for shard in local.manifest.shards)
    changes = config_of(server.url, tmp_path / "cache", cache_gb=4.2 * largest / 1e9)
    assert train(server.url, tmp_path / "run", 2, changes) == [0, 0]
    assert losses(tmp_path / "run") == local_losses
    assert len(server.gets_of(".arrow")) > 11
    kept = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.arrow"))
    assert kept <= 4.2 * largest


def test_every_loader_reads_the_same(local: Dataset, server: FolderServer, tmp_path: Path) -> None:
    """Rows of another shard from one of the stores, or from a cache that holds 2 of 10 shards."""
    plan = LoaderPlan(batch=8, micro_batch=4, end_t=local.split("train").num_rows + 20)
    wanted = batches(local, plan)
    upload(local, "memory://remote-training")
    largest = max(shard.bytes for shard in local.manifest.shards)
    file_url = open_dataset(f"file://{local.storage.url}")
    assert not file_url.is_remote and batches(file_url, plan) == wanted
    for url, limit in (("memory://remote-training", 0), (server.url, 0), (server.url, 2)):
        folder = tmp_path / f"{url[:4]}-{limit}"
        config = CacheConfig(folder=str(folder), limit_gb=limit * largest / 1e9)
        dataset = open_dataset(url, config)
        assert dataset.is_remote and dataset.data_digest == local.data_digest
        assert batches(dataset, plan) == wanted
        assert came(lambda cache=dataset.cache: cache.held_bytes == 0)
        if limit:
            assert dataset.cache.folder.evicted >= 8
            assert dataset.cache.folder.used_bytes() <= limit * largest
        else:
            assert dataset.cache.counts.fetched == 10


def test_shards_are_fetched_before_they_are_needed(remote: Dataset, server: FolderServer) -> None:
    """A loader that asks for a shard only when a batch waits for it."""
    server.bytes_per_s = 500_000
    split = remote.split("train")
    plan = LoaderPlan(batch=4, micro_batch=4, end_t=split.num_rows)
    with TokenLoader(remote, split, Order(split.num_rows, 1), plan) as loader:
        loader.fetch_ahead()
        iterator = iter(loader)
        next(iterator)
        cache = remote.cache
        for _ in range(400):
            if cache.counts.fetched == len(split.shards):
                break
            time.sleep(0.02)
        assert cache.counts.fetched == len(split.shards)
        waited_s = loader.wait_s
        assert sum(1 for _ in iterator) > 10
        assert loader.wait_s - waited_s < 0.5
    assert came(lambda: cache.held_bytes == 0)


def test_the_first_batch_waits_for_its_own_shards_only(
    remote: Dataset, server: FolderServer
) -> None:
    """A start that waits for the whole dataset: here one shard never comes."""
    split = remote.split("train")
    last = split.shards[-1]
    gate = threading.Event()
    server.fault = lambda one: gate.wait(20) and None if last.name in one.path else None
    num_rows = int(split.row_start[-2])
    plan = LoaderPlan(batch=4, micro_batch=4, end_t=split.num_rows)
    order = SequentialOrder(split.num_rows)
    with TokenLoader(remote, split, order, plan) as loader:
        iterator = iter(loader)
        got = sum(len(next(iterator).rows) for _ in range(num_rows // 4))
        assert got == num_rows // 4 * 4
        assert not remote.cache.folder.file(last, "arrow").exists()
        gate.set()


def test_closing_does_not_wait_for_a_download(remote: Dataset, server: FolderServer) -> None:
    """A drain that hangs on a shard under way."""
    server.bytes_per_s = 200.0
    split = remote.split("train")
    loader = TokenLoader(
        remote, split, Order(split.num_rows, 1), LoaderPlan(batch=4, micro_batch=4)
    )
    loader.fetch_ahead()
    iter(loader)
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 30.0


def test_damage_on_the_way_names_the_shard(
    remote: Dataset, server: FolderServer, tmp_path: Path
) -> None:
    """Training on wrong bytes from a server, or an error that does not say where they came from."""
    shard = remote.split("train").shards[3]
    server.fault = lambda one: "flip" if shard.name in one.path else None
    plan = LoaderPlan(batch=8, micro_batch=8, end_t=remote.split("train").num_rows)
    with pytest.raises(DataRefused, match=rf"{server.url}/shards/{shard.name} has xxh3-128"):
        batches(remote, plan)
    with pytest.raises(DataRefused, match=rf"1 of 11 shards[^$]*{shard.name}"):
        verify_full(remote, progress=False)


def test_verify_reads_the_url_and_the_copies(
    local: Dataset, remote: Dataset, server: FolderServer
) -> None:
    """A damaged copy that stays trusted, or a verification that only looks at the copies."""
    shards = remote.split("train").shards
    path = remote.shard_path(shards[0])
    remote.shard_path(shards[1]), remote.shard_path(shards[2])  # the first is in use no more
    stat = path.stat()
    flip_byte(path, 1000)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert remote.cache.folder.is_trusted(shards[0])
    with pytest.raises(DataRefused, match=r"copy .* was damaged \(it was deleted\)"):
        verify_full(remote, progress=False)
    assert verify_full(remote, progress=False).shards == 11
    wanted = local.shard_path(shards[0]).read_bytes()
    assert remote.shard_path(shards[0]).read_bytes() == wanted


def test_other_readers_of_a_remote_dataset(
    remote: Dataset, local: Dataset, server: FolderServer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """inspect, verify and the lineage scan, which map shards without a loader."""
    from dist.lineage import refs_of, rows_of_source
    from launch import data

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.main(["inspect", server.url]) == 0
    assert "sample     train row 0" in capsys.readouterr().out
    assert data.main(["verify", server.url]) == 0
    assert data.main(["verify", "--presence", server.url]) == 0
    assert "present: 11 shards" in capsys.readouterr().out
    assert rows_of_source(remote, 2, None, progress=False) == rows_of_source(
        local, 2, None, progress=False
    )
    assert refs_of(remote.split("train"), np.array([3]))[0].row_in_shard == 3


def test_a_web_server_is_read_without_listing(
    remote: Dataset, local: Dataset, server: FolderServer
) -> None:
    """A dataset behind a server without folder pages, or one that can be written by mistake."""
    assert open_dataset(f"{server.url}@{local.data_digest}").data_digest == local.data_digest
    with pytest.raises(ConfigError, match="lists no versions; give all 64 digits"):
        open_dataset(f"{server.url}@{local.data_digest[:12]}")
    assert remote.read_provenance() is None
    check_presence(remote)
    with pytest.raises(OSError, match="Read-only"):
        remote.storage.write_atomic("LATEST", b"0" * 64)
    server.ranges = False
    shard = remote.split("train").shards[0]
    wanted = local.shard_path(shard).read_bytes()
    assert remote.storage.read_range(f"shards/{shard.name}", 100, 300) == wanted[100:300]
    assert remote.shard_path(shard).read_bytes() == wanted


def test_wrong_addresses_and_permissions_are_named(
    server: FolderServer, remote: Dataset, monkeypatch: pytest.MonkeyPatch,
    s3_server: str,
) -> None:  # fmt: skip
    """A traceback of a network library, or half a minute of retries for a wrong name."""
    from dist import transfer

    monkeypatch.setattr(transfer, "RETRIES", transfer.Retries(tries=3, first_pause_s=0.01))
    with pytest.raises(ConfigError, match="no dataset at .*nothing-here"):
        open_dataset(f"{server.url}/nothing-here")
    with pytest.raises(ConfigError, match="no dataset at s3://leyden/nothing-here"):
        open_dataset("s3://leyden/nothing-here")
    with pytest.raises(SetupError, match=r"cannot be read after 3 tries: .*refused.*address"):
        open_dataset("http://127.0.0.1:9/data")
    server.fault = lambda _: "403"
    with pytest.raises(SetupError, match="no permission to read .*403.*credentials"):
        open_dataset(server.url)
    with pytest.raises(SetupError, match="no permission"):
        check_presence(remote)
    with pytest.raises(SetupError, match="no permission"):
        remote.shard_path(remote.manifest.shards[0])


def test_a_resumed_run_may_move(local: Dataset, tmp_path: Path, server: FolderServer) -> None:
    """Data copied from the local folder to a server, or another cache, taken for other data."""
    changes = {**config_of(local.storage.url, tmp_path / "a"), "max_steps": 3}
    assert train(local.storage.url, tmp_path / "run", 1, changes) == [0]
    moved = config_of(server.url, tmp_path / "b", cache_gb=1.0)
    assert train(server.url, tmp_path / "run", 1, moved) == [0]
    assert [one[0] for one in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_the_cost_of_a_global_order_is_said(remote: Dataset, local: Dataset) -> None:
    """A cluster that downloads the dataset once a node without anybody knowing."""
    assert remote_notes(local) == []
    said = " ".join(remote_notes(remote))
    assert "every rank reads every shard" in said and "again and again" not in said
    small = dataclasses.replace(
        remote,
        cache_config=CacheConfig(folder=remote.cache_config.folder + "-small", limit_gb=1e-5),
    )
    assert "again and again: set data.cache_gb" in " ".join(remote_notes(small))


def test_a_cache_that_nodes_share_is_warned_of(
    remote: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache in a home folder on NFS: every node hashes what every other one fetched."""
    assert "lies on" not in " ".join(remote_notes(remote, "windowed"))
    monkeypatch.setattr(open_shards, "network_file_system", lambda _: "NFS")
    assert "that cache lies on NFS" in " ".join(remote_notes(remote, "windowed"))


def test_a_loader_of_a_run_fetches_while_the_model_is_made(remote: Dataset, tmp_path: Path) -> None:
    """fetch_ahead() that training_loader forgets, or pins that outlive the run."""
    with ExitStack() as stack:
        plan = LoaderPlan(batch=8, micro_batch=4)
        loader = training_loader(remote, 0, plan, tmp_path / "run", stack, lambda: False)
        for _ in range(400):
            if remote.cache.counts.fetched == 10:
                break
            time.sleep(0.01)
        assert remote.cache.counts.fetched == 10
        loader.replan(dataclasses.replace(plan, micro_batch=2))
        assert remote.cache.held_bytes > 0
        assert len(next(iter(loader)).rows) == 2
    assert came(lambda: remote.cache.held_bytes == 0)
    shutil.rmtree(tmp_path / "cache")


def test_eval_and_replay_read_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was trained, and cannot be judged, because its data lies on a server."""
    from dist.audit import replay
    from dist.run_dir import RunDir
    from recipes.evaluate import Config, run
    from recipes.trained import DataRef

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    trained = small_run("ddp")
    with serve(small_data()) as server:
        found = [
            run(Config(model=str(trained), data=DataRef(url=url), device="cpu"))
            for url in (small_data(), server.url)
        ]
        assert found[0]["loss"] == found[1]["loss"] and found[0]["rows"] == found[1]["rows"]
        theirs, ours = (
            replay(RunDir(trained), 2, data=url).rows for url in (server.url, small_data())
        )
        assert [one.row for one in theirs] == [one.row for one in ours]
        assert [[p.text for p in one.pieces] for one in theirs] == [
            [p.text for p in one.pieces] for one in ours
        ]
        assert server.gets_of(".arrow")


def test_a_rank_fetches_what_it_reads(remote: Dataset) -> None:
    """Fetching ahead for another rank's rows: twice the bytes, and pins on what nobody reads."""
    split = remote.split("train")
    plan = LoaderPlan(
        batch=split.num_rows, micro_batch=4, rank=1, world_size=2, end_t=split.num_rows
    )
    first = int(split.locate(np.array([split.num_rows // 2]))[0][0])
    with TokenLoader(remote, split, SequentialOrder(split.num_rows), plan) as loader:
        assert sum(1 for _ in loader) > 2
    there = {path.stem for path in remote.cache.folder.path.glob("*.arrow")}
    assert there == {shard.xxh3_128 for shard in split.shards[first:]}


def test_pins_follow_the_steps(remote: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins on what is behind, which fill the cache; or a prefetch that never moves on."""
    monkeypatch.setattr(open_shards, "STEPS_AHEAD", 1)
    monkeypatch.setattr(open_shards, "SHARDS_AHEAD", 1)
    split = remote.split("train")
    ahead = open_shards.ShardsAhead(remote, split, iter([(k, [k]) for k in range(10)]))
    try:
        for at in (0, 1, 4, 5, 8):
            ahead.reach(at)
            for _ in range(400):
                if set(ahead._pins) == {at, at + 1}:
                    break
                time.sleep(0.01)
            assert set(ahead._pins) == {at, at + 1}
            held = sum(split.shards[number].bytes for number in (at, at + 1))
            assert remote.cache.held_bytes == held
    finally:
        ahead.close()
    assert came(lambda: remote.cache.held_bytes == 0)


def test_a_reader_leaves_half_of_the_share_to_what_is_fetched_ahead(
    remote: Dataset, tmp_path: Path
) -> None:
    """Maps of what was read that fill the cache: nothing can be fetched ahead any more, and a
    training step waits for every shard."""
    split = remote.split("train")
    largest = max(shard.bytes for shard in split.shards)
    config = CacheConfig(folder=str(tmp_path / "small"), limit_gb=6.5 * largest / 1e9)
    small = dataclasses.replace(remote, cache_config=config)
    opened = open_shards.OpenShards(small, small.split("train"), None)
    most = 0
    for number in range(len(split.shards)):
        mapped = opened.get(number)
        assert opened.get(number) is mapped
        assert small.cache.held_bytes <= small.cache.share_bytes // 2
        most = max(most, small.cache.held_bytes)
    assert most > 2 * largest, "what was read a moment ago is kept"
    assert small.cache.folder.evicted
    opened.end()


def test_pins_last_as_long_as_they_are_needed(remote: Dataset) -> None:
    """A pin that ends with the first step that reads its shard; or the next shard given back, to
    be fetched again at once, where the one that is needed last would do."""
    split = remote.split("train")
    steps = [(0, [0, 1]), (1, [0]), (2, [0, 2]), (3, [3]), (4, [4])]
    ahead = open_shards.ShardsAhead(remote, split, iter(steps))

    def wait_for(pins: set[int]) -> None:
        deadline = time.monotonic() + 20
        while set(ahead._pins) != pins or ahead._last_step.get(4) is None:
            assert time.monotonic() < deadline, (pins, set(ahead._pins))
            time.sleep(0.01)

    try:
        wait_for({0, 1, 2, 3, 4})
        ahead.reach(1)
        assert set(ahead._pins) == {0, 2, 3, 4}
        ahead.reach(2)
        assert ahead.give_back() and set(ahead._pins) == {0, 2, 3}
        assert ahead.give_back() and set(ahead._pins) == {0, 2}
        ahead.reach(3)
        assert not ahead._pins
    finally:
        ahead.close()


def test_a_process_makes_room_for_one_that_comes_later(server: Any, tmp_path: Path) -> None:
    """A rank that fetched the cache full before its peers came, and now waits for them in an
    all-reduce while they wait for room: a deadlock, seen once in three runs."""
    cache = CacheConfig(folder=str(tmp_path / "cache"), limit_gb=1.0)
    remote = open_dataset(server.url, cache)
    split = remote.split("train")
    largest = max(shard.bytes for shard in split.shards)
    small = dataclasses.replace(cache, limit_gb=4.2 * largest / 1e9)
    remote = dataclasses.replace(remote, cache_config=small)
    ahead = open_shards.ShardsAhead(remote, split, iter([(k, [k]) for k in range(10)]))
    remote.cache.holders.append(ahead.give_back)
    try:
        deadline = time.monotonic() + 20
        while remote.cache.held_bytes < 2.5 * largest and time.monotonic() < deadline:
            time.sleep(0.05)
        alone = remote.cache.held_bytes
        other = subprocess.Popen(
            [sys.executable, "-c", _MEMBER, str(small.folder), repr(small.limit_gb)],
            stdout=subprocess.PIPE,
        )
        try:
            assert other.stdout is not None and other.stdout.readline() == b"in\n"
            while remote.cache.held_bytes > 2.1 * largest and time.monotonic() < deadline:
                time.sleep(0.05)
            assert remote.cache.held_bytes <= 2.1 * largest < alone
        finally:
            other.kill()
            other.wait()
    finally:
        remote.cache.holders.remove(ahead.give_back)
        ahead.close()


_MEMBER = """
import sys, time
from dist.cache import CacheConfig, node_cache
cache = node_cache(CacheConfig(folder=sys.argv[1], limit_gb=float(sys.argv[2])))
cache.share_bytes
print("in", flush=True)
time.sleep(60)
"""
