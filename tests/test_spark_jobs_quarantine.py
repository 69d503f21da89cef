"""spark_jobs/quarantine.py and dist/stages.py: bad rows leave a dataset, and a run goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist.audit import replay
from dist.bundle import read_bundle
from dist.commit import commit_dataset, publish_template
from dist.dataset import Dataset, open_dataset
from dist.errors import ConfigError, DataRefused
from dist.example_file import ExampleShard
from dist.examples import as_rows
from dist.order import Order
from dist.run_dir import RunDir
from dist.shard_file import PackedShard
from dist.sources import SourceConfig
from dist.stages import Stages, begin_stage, first_numbers
from dist.start import DataConfig
from dist.verify import verify_full
from spark_jobs.quarantine import Config, chosen_rows, run
from tests.make_dataset import write_dataset
from tests.make_examples import write_examples
from tests.rank_processes import World, train
from tests.test_dist_run_guard import poison, settings

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
        assert world.wait() == [93, 93], world.said(0)
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


def origins(dataset: Dataset, split: str = "train") -> list[tuple[Any, ...]]:
    """Every example: where it came from, and what it holds."""
    found = []
    for entry in dataset.manifest.shards_of(split):
        shard = ExampleShard(dataset.shard_path(entry))
        for row in range(shard.num_rows):
            one = shard.read(row)
            found.append((*shard.origin(row), one.tokens.tobytes(), one.spans.tobytes()))
        shard.close()
    return found


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_examples_of_bad_rows_are_left_out(tmp_path: Path, packing: Any) -> None:
    """Rows of a run taken for records of the files; a table of lengths, totals or a template that
    is still the parent's; a run of packed rows that goes on with rows packed anew."""
    plain = write_examples(tmp_path / "data", num_examples=30, num_train_shards=3)
    digest = publish_template(plain.storage, "{{ messages }}")
    schema = {**plain.manifest.schema, "template_digest": digest}
    manifest = replace(plain.manifest, schema=schema)
    commit_dataset(plain.storage, manifest, plain.read_provenance() or {}, "5" * 64)
    parent = open_dataset(plain.storage.url)
    made = as_rows(parent, packing, 40)
    split: Any = made.split("train")
    order = Order(split.num_rows, 0).rows(0, 8 * split.num_rows)[1].tolist()
    data = DataConfig(url=parent.reference, packing=packing, seq_len=40)
    folder, changes = tmp_path / "run", {**settings("ddp", "raise"), "max_steps": 4, "data": data}
    args = (poison, -1, (), math.nan, None, -1, order[11])
    with World(parent.reference, folder, 2, changes, *args) as world:
        assert world.wait() == [93, 93], world.said(0)
    (bundle,) = (folder / "guard").iterdir()
    gone = {row["row"] for row in chosen_rows(read_bundle(bundle), "bad")}
    assert order[11] in gone and len(gone) == 2
    output = str(tmp_path / "other")
    derived = open_dataset(f"{output}@{run(Config(bundle=str(bundle), output=output))}")
    verify_full(derived, progress=False)
    before, lost = origins(parent), []
    number, local = split.locate(np.array(sorted(gone)))
    for n, row in zip(number.tolist(), local.tolist(), strict=True):
        lost += [30 * n + one for one in split.packs[n].examples_of(row).tolist()]
    assert (sorted(lost) == sorted(gone)) == (packing == "padded")
    assert origins(derived) == [one for i, one in enumerate(before) if i not in lost]
    assert origins(derived, "validation") == origins(parent, "validation")
    totals = (parent.manifest.totals["train"], derived.manifest.totals["train"])
    assert totals[0]["rows"] - totals[1]["rows"] == len(lost)
    tokens = sum(len(before[i][2]) // 4 for i in lost)
    assert totals[0]["tokens"] - totals[1]["tokens"] == tokens
    spans = np.concatenate([np.frombuffer(before[i][3], np.int32) for i in lost]).reshape(-1, 2)
    assert totals[0]["targets"] - totals[1]["targets"] == int(np.diff(spans).sum())
    assert derived.read_template() == "{{ messages }}" and derived.read_tokenizer()
    assert derived.manifest.lengths_digest not in (None, parent.manifest.lengths_digest)
    again = as_rows(derived, packing, 40).split("train")
    for n, shard in enumerate(again.shards):
        again.open_shard(n, derived.shard_path(shard)).close()  # refuses other lengths
    record = derived.read_provenance()
    assert record is not None and record["removed"]["rows"] == sorted(lost)
    switch = {**changes, "switch_data": derived.reference, "max_steps": 20}
    with World(parent.reference, folder, 2, switch) as world:
        codes, said = world.wait(), world.said(0)
    assert codes == [0, 0], said
    met = [one.row for step in range(20) for one in replay(RunDir(folder), step, text=False).rows]
    # The newest checkpoint at the switch was before the bad step, and before any of its rows.
    assert met == [row for row in order if row not in gone][: len(met)]


def test_a_source_of_a_mixture_is_derived_alone(tmp_path: Path) -> None:
    """A version in which the sources are thrown together, or another source's rows are missing."""
    parts = [write_dataset(tmp_path / name, documents=30, seed=seed)
             for name, seed in (("web", 1), ("code", 2))]  # fmt: skip
    sources = [SourceConfig(name=name, url=part.storage.url)
               for name, part in zip(("web", "code"), parts, strict=True)]  # fmt: skip
    changes = {**settings("ddp", "raise"), "data": DataConfig(sources=sources)}
    args = (poison, 1, (5,), math.nan)
    with World("", tmp_path / "run", 2, changes, *args) as world:
        assert world.wait() == [93, 93], world.said(0)
    (bundle,) = (tmp_path / "run" / "guard").iterdir()
    bad = chosen_rows(read_bundle(bundle), "bad")
    gone = sorted(row["source_row"] for row in bad if row["source"] == "code")
    assert gone and {row["source"] for row in bad} <= {"web", "code"}
    given = {"bundle": str(bundle), "output": parts[1].storage.url}
    for source in ("", "books"):
        with pytest.raises(
            ConfigError, match=rf"several sources, .*{source}.*code \({len(gone)}\)"
        ):
            run(Config(**given, source=source))
    with pytest.raises(ConfigError, match="--data x: .* several sources; leave it out"):
        run(Config(**given, source="code", data="x"))
    digest = run(Config(**given, source="code"))
    derived = open_dataset(f"{parts[1].storage.url}@{digest}")
    before = rows_of(parts[1])
    assert rows_of(derived) == [row for i, row in enumerate(before) if i not in gone]
    record = derived.read_provenance()
    assert record is not None and record["parent"] == parts[1].data_digest


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
