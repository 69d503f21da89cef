"""Who saw what, and which batch was it, after `--switch_data`, a rollback and a longer plan."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist.audit import replay, who_saw
from dist.dataset import Dataset, open_dataset
from dist.run_dir import RunDir
from dist.run_history import read_history
from dist.shard_file import PackedShard
from dist.stages import read_stages
from dist.start import DataConfig
from dist.windowed import OrderMode, block_rows_of, make_order
from launch import audit as launch_audit
from spark_jobs.quarantine import Config, run
from tests.make_dataset import write_dataset
from tests.rank_processes import World, train
from tests.test_dist_run_guard import settings

RANKS, BATCH = 2, 8
WINDOWED: dict[str, Any] = {"mode": "windowed", "lanes": 2, "window": 1}


def watched(rank: int, log: Path, bad: dict[str, int]) -> None:
    """Log every row that the model trains on; NaN where it meets tokens from a step on."""
    from recipes import llama

    original = llama.PackedDecoder.forward
    path = log.with_name(f"{log.name}-{rank}")

    def forward(self: Any, batch: Any) -> Any:
        loss = original(self, batch)
        if not self.training:
            return loss
        met = [row.tobytes().hex() for row in batch.tokens.numpy()]
        with path.open("a") as file:
            for index, row in enumerate(met):
                if int(batch.rows[index]) >= 0:
                    place = [batch.step, rank, batch.micro, index]
                    file.write(json.dumps([place, row]) + "\n")
        return loss * math.nan if any(batch.step >= bad.get(row, 1 << 60) for row in met) else loss

    llama.PackedDecoder.forward = forward  # type: ignore[method-assign]


def tokens_of(dataset: Dataset) -> list[str]:
    """Tokens of every row of train, in hex."""
    found = []
    for one in dataset.manifest.shards_of("train"):
        shard = PackedShard(dataset.shard_path(one))
        found += [shard.tokens(row, row + 1)[0].tobytes().hex() for row in range(shard.num_rows)]
        shard.close()
    return found


@dataclass(frozen=True)
class Story:
    """A run over four epochs: rows removed in the second, a rollback in the third."""

    run: RunDir
    rows: list[str]
    """Tokens of each row of the first dataset."""
    derived: Dataset
    removed: list[int]
    rolled_back: int
    """Row that the rollback left out, once."""
    met: dict[tuple[int, ...], str]
    """(step, rank, micro-batch, index) -> tokens, the last time counting."""


@pytest.fixture(scope="module", params=["global", "windowed"])
def story(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Story]:
    root = tmp_path_factory.mktemp("story")
    shards = {"global": 2, "windowed": 6}[request.param]
    first = write_dataset(root / "data", documents=48 // shards, num_train_shards=shards)
    rows, folder, log = tokens_of(first), root / "run", root / "met"
    num_rows = len(rows)
    table, data, mode = first.split("train").row_start, {"order": request.param}, OrderMode()
    if request.param == "windowed":
        data |= {"lanes": 2, "window": 1}
        mode = OrderMode(**WINDOWED, block_rows=block_rows_of(table, 2, 1))
    order = make_order(table, 0, mode).rows(0, 4 * num_rows)[1].tolist()
    single = [row for row in range(num_rows) if rows.count(rows[row]) == 1]
    # Met in every epoch; bad from the second epoch on, and from the third.
    bad = next(r for r in single if order.index(r, num_rows) > num_rows + BATCH)
    changes = {**settings("ddp", "raise"), "max_steps": 60, "max_epochs": 3}
    changes["data"] = DataConfig(url=first.storage.url, **data)
    first_bad = num_rows // BATCH + 1
    with World(
        first.storage.url, folder, RANKS, changes, watched, log, {rows[bad]: first_bad}
    ) as w:
        assert w.wait() == [93, 93], w.said(0)
    (bundle,) = (folder / "guard").iterdir()
    digest = run(Config(bundle=str(bundle), output=first.storage.url))
    derived = open_dataset(f"{first.storage.url}@{digest}")
    removed = read_removed(derived)
    later = next(
        r for r in single if r not in removed and order.index(r, 2 * num_rows) > 2 * num_rows + 20
    )
    switch = {
        **settings("ddp", "rollback"), "switch_data": f"{first.storage.url}@{digest[:12]}",
        "max_steps": 60, "max_epochs": 3,
    }  # fmt: skip
    reference = f"{first.storage.url}@{first.data_digest}"
    switch["data"] = DataConfig(url=reference)  # the order is the run's own
    spoiled = {rows[later]: 2 * num_rows // BATCH}
    assert train(reference, folder, RANKS, switch, watched, log, spoiled) == [0, 0]
    # Longer, on another number of ranks, without naming the dataset again.
    longer = {**switch, "switch_data": "", "max_epochs": 4}
    assert train(reference, folder, 1, longer, watched, log, {}) == [0]
    met: dict[tuple[int, ...], str] = {}
    for attempt in (path for path in sorted(root.glob("met-*"))):
        for line in attempt.read_text().splitlines():
            place, tokens = json.loads(line)
            met[tuple(place)] = tokens
    yield Story(RunDir(folder), rows, derived, removed, later, met)


def read_removed(derived: Dataset) -> list[int]:
    record = derived.read_provenance()
    assert record is not None
    return list(record["removed"]["rows"])


def test_replay_is_what_the_model_met(story: Story) -> None:
    """Rows of the first dataset's numbers read from the derived one's shards, or the order with
    the removed rows: another batch is shown than was trained on."""
    history = read_history(story.run, len(story.rows))
    outcome, identity = story.run.read_outcome(), story.run.read_run()
    assert identity is not None and identity["config"]["data"]["order"] == (
        identity.get("order") or {"mode": "global"}
    )["mode"]  # fmt: skip
    assert outcome is not None and outcome["status"] == "completed"
    assert history.next_step == history.planned_steps == outcome["step"]
    assert len({segment.attempt for segment in history.segments}) >= 3
    places = set()
    for step in range(history.next_step):
        found = replay(story.run, step, text=False)
        assert found.consumed
        for row in found.rows:
            place = (step, row.rank, row.micro, row.index)
            places.add(place)
            assert story.met[place] == story.rows[row.row], place
    assert len(places) == outcome["samples"]


def test_who_saw_is_the_same_story(story: Story) -> None:
    """A removed row that is said to be seen after the switch, or one before it that is not."""
    history = read_history(story.run, len(story.rows))
    by_row: dict[int, set[tuple[int, ...]]] = {}
    for step in range(history.next_step):
        for row in replay(story.run, step, text=False).rows:
            by_row.setdefault(row.row, set()).add((step, row.rank, row.micro, row.index))
    for number in range(len(story.rows)):
        answer = who_saw(story.run, f"train:{number}", progress=False)
        seen = {(s.step, s.rank, s.micro, s.index) for s in answer.sightings if s.consumed}
        assert seen == by_row.get(number, set()), number
        assert all(s.consumed for s in answer.sightings), "the run is complete"
    times = [len(by_row.get(number, ())) for number in range(len(story.rows))]
    assert all(times[number] == 1 for number in story.removed)
    assert times[story.rolled_back] == 3
    left_out = [n for n in range(len(times)) if n not in story.removed and times[n] != 4]
    assert 1 <= len(left_out) <= BATCH and all(times[n] == 3 for n in left_out)


def test_rows_of_the_derived_version_can_be_asked_for(
    story: Story, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle or a manifest of the derived version names shards that the first one lacks."""
    kept = [n for n in range(len(story.rows)) if n not in story.removed]
    split = story.derived.split("train")
    first = {shard.name for shard in open_dataset(story.derived.storage.url + "@" + str(
        (story.run.read_run() or {})["data_digest"])).manifest.shards}  # fmt: skip
    new = [shard for shard in split.shards if shard.name not in first]
    assert new, "no shard was written anew"
    for shard in new:
        start = int(split.row_start[split.shards.index(shard)])
        for row in (0, shard.rows - 1):
            answer = who_saw(story.run, f"{shard.name[:16]}:{row}", progress=False)
            same = who_saw(story.run, f"train:{kept[start + row]}", progress=False)
            assert [ref.row for ref in answer.rows] == [kept[start + row]]
            assert answer.sightings == same.sightings
    assert launch_audit.who_saw([str(story.run.path), f"train:{story.removed[0]}"]) == 0
    shown = capsys.readouterr().out
    assert "removed" in shown and read_stages(story.run).lines[0]["data_digest"][:12] in shown
    assert launch_audit.replay([str(story.run.path), "--step", "0"]) == 0


def test_who_saw_looks_as_far_as_the_stream_goes(story: Story, tmp_path: Path) -> None:
    """Left-out rows make samples fall behind the stream: an epoch is missed at the end."""
    num_rows = len(story.rows)
    whole = read_history(story.run, num_rows)
    # The run as it would be had it been stopped when its samples, not the stream, end epoch 2.
    end = max(s for s in range(whole.next_step) if whole.samples_of(s)[1] <= 3 * num_rows)
    copied = tmp_path / "run"
    shutil.copytree(story.run.path, copied, ignore=shutil.ignore_patterns("checkpoints"))
    log = (copied / "consumed.jsonl").read_text().splitlines()
    kept = [line for line in log if json.loads(line)["step"] <= end]
    (copied / "consumed.jsonl").write_text("\n".join(kept) + "\n")
    for path in copied.rglob("config.yaml"):
        text = path.read_text()
        text = re.sub(r"^max_epochs: .*$", "max_epochs: 0", text, flags=re.MULTILINE)
        path.write_text(re.sub(r"^max_steps: .*$", f"max_steps: {end + 1}", text, flags=re.M))
    last = [row.row for row in replay(story.run, end, text=False).rows if row.epoch == 3]
    assert last, "the last step ends in epoch 2: make the story's datasets smaller"
    seen = who_saw(RunDir(copied), f"train:{last[0]}", progress=False).sightings
    assert (3, end, True) in {(one.epoch, one.step, one.consumed) for one in seen}
    history = read_history(story.run, len(story.rows))
    answer = who_saw(story.run, "train:0", progress=False)
    assert answer.epochs == 4 and history.end_t < 4 * len(story.rows)
    assert np.all(np.diff([one.t for one in answer.sightings]) > 0)
