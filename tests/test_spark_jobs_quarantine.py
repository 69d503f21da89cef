"""spark_jobs/quarantine.py and dist/stages.py: bad rows leave a dataset, and a run goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist.bundle import read_bundle
from dist.dataset import Dataset, open_dataset
from dist.errors import ConfigError, DataRefused
from dist.order import Order
from dist.run_dir import RunDir
from dist.shard_file import PackedShard
from dist.stages import Stages, begin_stage, first_numbers
from dist.verify import verify_full
from spark_jobs.quarantine import Config, chosen_rows, run
from tests.make_dataset import write_dataset
from tests.rank_processes import World, train
from tests.test_dist_run_guard import settings

BAD_SAMPLE = 5 * 8 + 3


def rows_of(dataset: Dataset, split: str = "train") -> list[tuple[Any, ...]]:
    """Every row with its tokens and lineage."""
    found = []
    for one in dataset.manifest.shards_of(split):
        shard = PackedShard(dataset.shard_path(one))
        found += [
            (shard.tokens(row, row + 1)[0].tobytes(), tuple(shard.lineage(row)))
            for row in range(shard.num_rows)
        ]
        shard.close()
    return found


def poison_tokens(rank: int, tokens: bytes, log: Path) -> None:
    """NaN wherever the model meets a row of these tokens; logs what it meets."""
    from recipes import llama

    original = llama.PackedDecoder.forward

    def forward(self: Any, batch: Any) -> Any:
        loss = original(self, batch)
        if not self.training:
            return loss
        met = [row.tobytes() for row in batch.tokens.numpy()]
        with log.with_name(f"{log.name}-{rank}").open("a") as file:
            for index, row in enumerate(met):
                if int(batch.rows[index]) >= 0:
                    file.write(json.dumps([batch.step, batch.micro, rank, row.hex()]) + "\n")
        return loss * math.nan if tokens in met else loss

    llama.PackedDecoder.forward = forward  # type: ignore[method-assign]


def test_a_run_goes_on_without_the_bad_rows(tmp_path: Path) -> None:
    """A row of the epoch met twice, one lost, or another order after the switch; a derived
    dataset whose other rows or counters are not the parent's."""
    parent = write_dataset(tmp_path / "data", documents=200, num_train_shards=3)
    before = rows_of(parent)
    num_rows = len(before)
    order = Order(num_rows, 0).rows(0, 2 * num_rows)[1]
    tokens = before[order[BAD_SAMPLE]][0]
    same = [i for i, row in enumerate(before) if row[0] == tokens]
    folder, log = tmp_path / "run", tmp_path / "met"
    changes = {**settings("ddp", "raise"), "max_steps": 9}
    args = (poison_tokens, tokens, log)
    with World(parent.storage.url, folder, 2, changes, *args) as world:
        assert world.wait(60.0) == [93, 93], world.said(0)
    for path in tmp_path.glob("met-*"):
        path.unlink()
    (bundle,) = (folder / "guard").iterdir()
    record = read_bundle(bundle)
    removed = sorted(row["row"] for row in chosen_rows(record, "bad"))
    assert order[BAD_SAMPLE] in removed and len(removed) == 2, "one micro-batch of two rows"
    assert same == [order[BAD_SAMPLE]], "the dataset has equal rows; change its seed"
    digest = run(Config(bundle=str(bundle), output=parent.storage.url))
    derived = open_dataset(f"{parent.storage.url}@{digest}")
    verify_full(derived)
    assert rows_of(derived) == [row for i, row in enumerate(before) if i not in removed]
    assert rows_of(derived, "validation") == rows_of(parent, "validation")
    assert derived.manifest.totals["train"]["rows"] == num_rows - 2
    lost = sum(piece[2] for i in removed for piece in before[i][1])
    totals = (parent.manifest.totals["train"], derived.manifest.totals["train"])
    assert totals[0]["tokens"] - totals[1]["tokens"] == lost
    provenance = derived.read_provenance()
    assert provenance is not None and provenance["parent"] == parent.data_digest
    assert provenance["inputs"] and "not finite" in provenance["reason"]
    # A rerun finds it done; shards without bad rows are the parent's own.
    assert run(Config(bundle=str(bundle), output=parent.storage.url)) == digest
    # The run goes on with it, and meets the rest of its order.
    switch = {**changes, "switch_data": f"{parent.storage.url}@{digest[:12]}", "max_steps": 60}
    reference = f"{parent.storage.url}@{parent.data_digest}"
    assert train(reference, folder, 2, switch, *args) == [0, 0]
    met = [json.loads(line) for p in tmp_path.glob("met-*") for line in p.read_text().splitlines()]
    found = [row for _, _, _, row in sorted(met, key=lambda one: (one[0], one[2], one[1]))]
    left = [before[row][0].hex() for row in order if row not in removed]
    start = 4 * 8  # the newest checkpoint
    assert found == left[start : start + len(found)] and len(found) == 56 * 8
    # Again without the option: it stays where it is.
    assert train(reference, folder, 2, {**switch, "switch_data": "", "max_steps": 62}) == [0, 0]


def test_only_a_derived_version_can_be_switched_to(tmp_path: Path) -> None:
    """Any other dataset has other rows under the same numbers: repeated and skipped ones."""
    one = write_dataset(tmp_path / "one", with_tokenizer=False)
    other = write_dataset(tmp_path / "other", seed=1, with_tokenizer=False)
    identity = {"data_digest": one.data_digest}
    with pytest.raises(DataRefused, match="not derived"):
        begin_stage(RunDir.open(tmp_path / "run"), identity, other.storage.url, 0, [])
    with pytest.raises(ConfigError, match="--from"):
        run(Config(output=str(tmp_path)))


def test_rows_of_a_chain_of_versions_are_numbered_as_in_the_first() -> None:
    """A second quarantine names rows of the first one's result."""
    removed = [2, 3, 7]
    kept = [row for row in range(20) if row not in removed]
    for row, number in enumerate(kept):
        assert first_numbers([row], removed) == [number]
    stages = Stages(lines=[{"removed": [2, 3], "position": 5}, {"removed": [7], "position": 25}])
    assert stages.removed == removed
    # Rows 2 and 3 from position 5 on, row 7 from 25 on, in epochs of 10.
    ranges = {p for p0, p1 in stages.skipped([], 10, 0, 39) for p in range(p0, p1)}
    rows = Order(10, 0).rows(0, 40)[1]
    expected = {p for p, row in enumerate(rows) if row in (2, 3) and p >= 5}
    assert ranges == expected | {p for p in range(25, 40) if rows[p] == 7}
    assert np.all(np.diff(sorted(ranges)) > 0)
