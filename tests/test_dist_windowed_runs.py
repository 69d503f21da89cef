"""Real runs in the windowed order: killed, resumed, on other ranks, audited, switched."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist import order_choice
from dist.audit import replay, who_saw
from dist.batch_layout import batch_samples
from dist.dataset import Dataset
from dist.errors import ConfigError
from dist.order_choice import choose_mode, network_file_system, room_text
from dist.run_dir import RunDir
from dist.start import DataConfig
from dist.storage import Storage
from dist.windowed import OrderMode, make_order
from tests.make_dataset import write_dataset
from tests.rank_processes import World, train
from tests.same_run import assert_same_run, lines
from tests.test_exact_resume import killed_at, segments


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("data")
    return write_dataset(root, documents=10, num_train_shards=9, rows_per_batch=2)


def windowed(dataset: Dataset, lanes: int = 4, **changes: Any) -> dict[str, Any]:
    data = DataConfig(url=dataset.storage.url, order="windowed", lanes=lanes, window=1)
    return {"data": data, "dropout": 0.0, "strategy": "ddp", **changes}


def test_killed_and_restarted_equals_uninterrupted(dataset: Dataset, tmp_path: Path) -> None:
    """A block size or a layout that a resumed run works out anew; a sample lost at an epoch's
    end. The data's place says `global` by then, and the run keeps what it began with."""
    url, changes = dataset.storage.url, windowed(dataset, dropout=0.1)
    assert train(url, tmp_path / "whole", 2, changes) == [0, 0]
    with World(url, tmp_path / "run", 2, changes, killed_at, 1, 13, 1, 0.0) as world:
        assert -signal.SIGKILL in world.wait()
        assert "order: windowed, 4 lanes, at most 2 live shards in each" in world.said(0)
    later = {**changes, "data": DataConfig(url=url)}
    with World(url, tmp_path / "run", 2, later) as world:
        assert world.wait() == [0, 0], world.said(0)
        assert "order: windowed, 4 lanes" in world.said(0) and "as the run began" in world.said(0)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert dataset.split("train").num_rows < 24 * 8, "the steps pass over an epoch's end"
    other = {**changes, "max_steps": 30}
    other["data"] = DataConfig(url=url, order="global")
    with World(url, tmp_path / "run", 1, other) as world:
        assert world.wait() == [2]
        assert "data.order was windowed, is global" in world.said(0)


@pytest.mark.parametrize("lanes", [4, 8])
def test_any_ranks_see_the_same_steps_and_the_audit_sees_them_too(
    dataset: Dataset, tmp_path: Path, lanes: int
) -> None:
    """A rank's share that the audit places elsewhere; a batch that moves with the ranks, also one
    of 12 rows that 8 lanes do not divide."""
    changes = windowed(dataset, lanes, global_batch=12, max_steps=16, save_every_steps=0)
    plan = [(1, 4, (2, 0)), (3, 2, (7, 1)), (2, 5, None)]
    seen = segments(dataset, tmp_path / "run", plan, changes)
    assert sorted(seen) == list(range(16))
    run = RunDir(tmp_path / "run")
    first = lines(run.path, "order.jsonl")[0]
    assert {name: first[name] for name in ("mode", "lanes", "window")} == {
        "mode": "windowed", "lanes": lanes, "window": 1,
    }  # fmt: skip
    table = dataset.split("train")
    order = make_order(table.row_start, 0, OrderMode.of(first))
    for step, rows in seen.items():
        samples = batch_samples(order, 12 * step, 12 * step + 12)
        assert rows == order.at(samples)[1].tolist()
        assert [row.row for row in replay(run, step, text=False).rows] == rows
    flat = [row for step in sorted(seen) for row in order.rows(12 * step, 12 * step + 12)[1]]
    assert sorted(flat[: table.num_rows]) == list(range(table.num_rows))
    for row in (0, table.num_rows // 2):
        for one in who_saw(run, f"train:{row}", epochs=1).sightings:
            told = replay(run, one.step, rank=one.rank, text=False).rows
            assert [(r.micro, r.index) for r in told if r.row == row] == [(one.micro, one.index)]


def test_auto_goes_by_where_the_data_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Random 4 KiB reads over a network file system: tens of rows a second."""
    table = np.arange(11) * 100

    def chosen(url: str, **asked: Any) -> tuple[OrderMode, str]:
        given = {"name": "auto", "lanes": 0, "window": 0, **asked}
        return choose_mode(**given, tables=[table], storages=[Storage(url)], global_batch=24)

    monkeypatch.setattr(order_choice, "network_file_system", lambda _: "")
    assert chosen(str(tmp_path)) == (OrderMode(), "the data lies on a local disk")
    monkeypatch.setattr(order_choice, "network_file_system", lambda _: "Lustre")
    mode, why = chosen(str(tmp_path))
    assert (mode.mode, mode.lanes, why) == ("windowed", 8, "it lies on Lustre")
    mode, why = chosen("memory://data")
    assert mode.window == 16 and why == "memory:// is remote"
    assert chosen("memory://data", name="global")[0] == OrderMode()
    with pytest.raises(ConfigError, match=r"data\.lanes 4 and data\.window 0 are of the windowed"):
        chosen(str(tmp_path), name="global", lanes=4)


@pytest.mark.parametrize(
    ("room", "nodes", "lanes", "window"),
    [
        (None, 1, 64, 2),  # 256 live shards, whatever that takes
        (1000, 1, 64, 2),
        (100, 1, 8, 3),  # 48 live: half of the room
        (26, 1, 2, 3),
        (3, 1, 1, 2),  # never fewer than one lane, and a warning
        (40, 8, 8, 2),  # a lane for each node, and a warning
    ],
)
def test_auto_keeps_the_live_shards_in_the_caches(
    room: int | None, nodes: int, lanes: int, window: int
) -> None:
    """A small cache that fetches each shard fourteen times, by the order that we chose."""
    table = np.arange(1001) * 100
    mode, _ = choose_mode(
        "windowed", 0, 0, tables=[table], storages=[], global_batch=64, room=room, nodes=nodes
    )
    assert (mode.lanes, mode.window) == (lanes, window)
    live = 2 * mode.lanes * mode.window
    assert bool(room_text(mode, room)) == (room is not None and live > room // 2)
    # What is asked for is taken, with a warning.
    asked, _ = choose_mode(
        "windowed", 32, 4, tables=[table], storages=[], global_batch=64, room=room, nodes=nodes
    )
    assert (asked.lanes, asked.window) == (32, 4)
    assert ("up to 256 shards" in room_text(asked, room)) == (room in (100, 26, 3, 40))
    assert room_text(OrderMode(), room) == ""


def test_file_systems_are_told_apart_by_the_kernel(tmp_path: Path) -> None:
    """The wrong word of struct statfs reads as no known system, or as any."""
    assert network_file_system(Path("/proc")) == ""
    assert network_file_system(tmp_path / "absent") == ""
    order = order_choice.NETWORK_FILE_SYSTEMS
    order[0x9FA0] = "proc"  # PROC_SUPER_MAGIC
    try:
        assert network_file_system(Path("/proc")) == "proc"
    finally:
        del order[0x9FA0]
