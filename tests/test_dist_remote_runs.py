"""Real runs on s3:// and http://: killed, refused by the store, asked afterwards; LATEST moves."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from dist.audit import replay, who_saw
from dist.dataset import Dataset
from dist.errors import ConfigError
from dist.order import OrderState
from dist.run_dir import RunDir
from dist.run_order import first_order
from dist.storage import Storage
from dist.windowed import OrderMode
from tests.http_server import serve
from tests.make_dataset import write_dataset
from tests.rank_processes import World, train
from tests.s3_server import watched_gets
from tests.same_run import assert_same_run, lines
from tests.test_dist_remote_training import _die_at, config_of, upload

STEPS = 6  # of config_of


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), num_train_shards=10)


@pytest.fixture(scope="module")
def whole(local: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on the local folder that nothing disturbs."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    url = local.storage.url
    assert train(url, run, 2, config_of(url, run / "unused")) == [0, 0]
    return run


def aws() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def prepared(rank: int, settings: dict[str, str], die_at: int = -1) -> None:
    """The server of ranks may be older than that of S3; rank 1 dies before it gathers a step."""
    os.environ.update(settings)
    if die_at >= 0:
        _die_at(rank, die_at)


def told(run: Path, data: str = "") -> list[Any]:
    """What replay and who-saw answer: every row of every step, and where some rows were met."""
    found: list[Any] = []
    for step in range(STEPS):
        for row in replay(RunDir(run), step, data=data).rows:
            pieces = [(piece.text, piece.tokens) for piece in row.pieces]
            found.append((step, row.row, row.t, row.rank, row.micro, row.index, pieces))
    for key in ("train:3", "train:41"):
        sightings = who_saw(RunDir(run), key, data=data, progress=False).sightings
        found.append([(s.step, s.rank, s.micro, s.index, s.t, s.consumed) for s in sightings])
    return found


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_killed_resumed_and_audited_where_the_data_lies(
    local: Dataset, whole: Path, tmp_path: Path, scheme: str, s3_server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Weights or rows that differ after a kill in the middle of a remote run; an audit that wants
    the local folder, or tells other rows from the same bytes at a URL."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with serve(local.storage.url) as server:
        url = server.url
        if scheme == "s3":
            url = "s3://leyden/remote-runs"
            upload(local, url)
        changes, run = config_of(url, tmp_path / "cache"), tmp_path / "run"
        codes = train(url, run, 2, changes, prepared, aws(), 5)
        assert -signal.SIGKILL in codes
        assert train(url, run, 2, changes, prepared, aws()) == [0, 0]
        assert_same_run(run, whole)
        assert len({line["attempt"] for line in lines(run, "metrics.jsonl")}) == 2
        asked = len(server.gets)
        answer = told(run)
        assert answer == told(whole) and all(answer)
        assert scheme == "s3" or len(server.gets) > asked
        if scheme == "s3":
            seen = who_saw(RunDir(run), "input-2", progress=False)
            same = who_saw(RunDir(whole), "input-2", progress=False)
            assert [one.row for one in seen.rows] == [one.row for one in same.rows] and seen.rows
            assert [s.t for s in seen.sightings] == [s.t for s in same.sightings]
        else:
            with pytest.raises(ConfigError, match="names nothing in http"):
                who_saw(RunDir(run), "input-2", progress=False)


def test_a_refused_shard_ends_the_run_by_name(tmp_path: Path, s3_server: str) -> None:
    """Half a minute of retries for an answer that will not change, a traceback of botocore, or a
    peer that hangs; and a run that cannot go on once the store lets it."""
    small = write_dataset(tmp_path / "data", documents=12, num_train_shards=10)
    url = "s3://leyden/refused"
    upload(small, url)
    order = {"order": "windowed", "lanes": 1, "window": 1}
    changes = {**config_of(url, tmp_path / "cache", **order), "save_every_steps": 1}
    assert train(url, tmp_path / "whole", 2, changes, prepared, aws()) == [0, 0]
    identity = RunDir(tmp_path / "whole").read_run()
    assert identity is not None
    mode = OrderMode.of(identity["order"])
    state = OrderState(data_digest=small.data_digest, seed=0, batch=8, **mode.to_dict())
    rows = first_order(RunDir(tmp_path / "whole"), small, 0, state, 0)
    split = small.split("train")
    needed = [
        set(split.locate(rows.rows(8 * step, 8 * step + 8)[1])[0].tolist()) for step in range(STEPS)
    ]
    first = needed[0]
    late = next(step for step in range(2, STEPS) if needed[step] - set().union(*needed[:step]))
    later = needed[late] - set().union(*needed[:late])
    for shards, step in ((first, 0), (later, late)):
        refused = {split.shards[number].name for number in shards}
        run, cold = tmp_path / f"run-{step}", tmp_path / f"cache-{step}"
        given = {**changes, "data": config_of(url, cold, **order)["data"]}
        with (
            watched_gets(lambda _, path, names=refused: path.rpartition("/")[2] in names) as seen,
            World(url, run, 2, given, prepared, aws()) as world,
        ):
            codes = world.wait()
            said = world.said(0) + world.said(1)
        assert codes == [4, 4], said
        refusal = f"no permission to read {url}/shards/"
        name = next(name for name in refused if f"{refusal}{name}" in said)
        assert "check the credentials and the bucket's policy" in said and "Traceback" not in said
        # No answer that cannot change is asked for again: by a rank and by what fetches ahead.
        assert sum(path.endswith(name) for path in seen) <= 8
        outcome = RunDir(run).read_outcome()
        assert outcome is not None and outcome["status"] == "failed"
        assert "no permission" in outcome["error"] or "other ranks" in outcome["error"]
        trained = [line["step"] for line in lines(run, "consumed.jsonl")] if step else []
        assert trained == list(range(step))
        assert train(url, run, 2, given, prepared, aws()) == [0, 0]
        assert_same_run(run, tmp_path / "whole")


def _moves_latest(rank: int, root: str, digest: str, die_at: int) -> None:
    """On rank 0, two steps before rank 1 dies: another job commits."""
    from dist.loader import TokenLoader

    agree = TokenLoader._may_agree

    def agree_and_move(self: Any, batches: Any, channel: Any) -> bool:
        found = agree(self, batches, channel)
        if rank == 0 and batches and batches[0].step == die_at - 2 and self.split.name == "train":
            Storage(root).write_atomic("LATEST", digest.encode() + b"\n")
        return found

    TokenLoader._may_agree = agree_and_move  # type: ignore[method-assign]
    _die_at(rank, die_at)


def test_a_latest_that_moves_changes_nothing_in_a_run(whole: Path, tmp_path: Path) -> None:
    """A run that trains on another version from some step on, or that cannot be resumed by the
    command that began it since somebody wrote a newer version."""
    url = str(tmp_path / "data")
    newer = write_dataset(url, num_train_shards=10, seed=9)
    begun = write_dataset(url, num_train_shards=10)
    changes, run = config_of(url, tmp_path / "unused"), tmp_path / "run"
    codes = train(url, run, 2, changes, _moves_latest, url, newer.data_digest, 5)
    assert -signal.SIGKILL in codes
    assert (tmp_path / "data" / "LATEST").read_text().strip() == newer.data_digest
    with World(url, run, 2, changes) as world:
        assert world.wait() == [0, 0], world.said(0)
        assert f"has a newer version, {newer.data_digest[:12]}; the run goes on with" in (
            world.said(0)
        )
    assert_same_run(run, whole)
    identity = RunDir(run).read_run()
    assert identity is not None and identity["data_digest"] == begun.data_digest
    assert {line["data_digest"] for line in lines(run, "order.jsonl")} == {begun.data_digest}
    # Named, the newer one is refused; so it is where the run's own is gone.
    longer = {**changes, "max_steps": 8}
    named = config_of(f"{url}@{newer.data_digest}", tmp_path / "unused")["data"]
    (tmp_path / "data" / "manifests" / f"{begun.data_digest}.json").rename(tmp_path / "kept.json")
    for given in ({**longer, "data": named}, longer):
        with World(url, run, 1, given) as world:
            assert world.wait() == [3], world.said(0)
            assert f"trains on {begun.reference}" in world.said(0)
            assert f"is now version {newer.data_digest[:12]}" in world.said(0)
