"""A run on packed examples that loses some of them keeps the rows that it packed when it began."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples_of
from hypothesis import strategies as st

from dist.audit import replay, who_saw
from dist.bundle import replay_bundle
from dist.dataset import Dataset, open_dataset
from dist.examples import as_rows, keep_rows, records_of_rows, rows_of_records
from dist.pack_index import pack_best_fit
from dist.run_dir import RunDir
from dist.start import DataConfig
from spark_jobs.quarantine import Config, run
from tests.derive import derive
from tests.make_examples import write_examples
from tests.rank_processes import World, train
from tests.test_dist_audit_switched import watched
from tests.test_dist_run_guard import settings

SEQ_LEN = 40
STEPS = 60
HOW: dict[str, Any] = {"packing": "packed", "seq_len": SEQ_LEN}


@examples_of(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40), data=st.data())
def test_an_index_without_some_rows_keeps_the_others(lengths: list[int], data: Any) -> None:
    """Examples that move to another row, or numbers of records that are not there any more."""
    index = pack_best_fit(np.array(lengths), 12)
    gone = sorted(data.draw(st.sets(st.integers(0, index.num_rows - 1))))
    lost = [one for row in gone for one in index.examples_of(row).tolist()]
    kept, rows = index.without(np.array(lost, np.int64))
    assert rows.tolist() == gone
    left = [one for one in range(len(lengths)) if one not in lost]
    whole = [index.examples_of(row).tolist() for row in range(index.num_rows) if row not in gone]
    assert [[left[one] for one in kept.examples_of(row)] for row in range(len(whole))] == whole
    assert kept.num_rows == len(whole) and sorted(kept.examples.tolist()) == list(range(len(left)))
    torn = [row for row in range(index.num_rows) if len(index.examples_of(row)) > 1]
    if torn:
        with pytest.raises(ValueError, match=f"row {torn[0]} would lose 1 of"):
            index.without(index.examples_of(torn[0])[:1])


def rows_that_others_depend_on(dataset: Dataset, count: int) -> list[int]:
    """Rows without which packing anew would put other examples together: where the lengths tie."""
    made = as_rows(dataset, **HOW)
    split: Any = made.split("train")
    index, lengths = split.packs[0], split.lengths[0]
    rng = np.random.default_rng(0)
    for _ in range(2000):
        gone = np.sort(rng.choice(index.num_rows, count, replace=False))
        lost = np.concatenate([index.examples_of(row) for row in gone.tolist()])
        kept = index.without(lost)[0]
        anew = pack_best_fit(np.delete(lengths, lost), SEQ_LEN + 1)
        if anew.num_rows != kept.num_rows or not np.array_equal(anew.examples, kept.examples):
            return [int(row) for row in gone]
    raise AssertionError("packed anew the rows are the same; change the lengths")


def tokens_of(dataset: Dataset) -> list[np.ndarray]:
    """Tokens of every row of train."""
    split: Any = dataset.split("train")
    found = []
    for number, one in enumerate(split.shards):
        shard = split.open_shard(number, dataset.shard_path(one))
        found += list(shard.tokens(0, shard.num_rows))
        shard.close()
    return found


def test_a_derived_version_can_have_the_rows_of_the_first(tmp_path: Path) -> None:
    """A row of other examples in place of a kept one; a shard that is empty now."""
    plain = write_examples(tmp_path / "data", num_examples=40, num_train_shards=3)
    first = as_rows(plain, **HOW)
    split, before = first.split("train"), tokens_of(first)
    whole_shard = range(int(split.row_start[1]), int(split.row_start[2]))
    gone = [*rows_that_others_depend_on(plain, 4), *whole_shard, len(before) - 1]
    records = records_of_rows(split, gone)
    assert rows_of_records(split, records) == gone and len(records) > len(gone)
    with pytest.raises(ValueError, match="would lose"):
        rows_of_records(split, records[:-1])
    derived = as_rows(derive(first, gone, tmp_path / "b", **HOW), **HOW)
    kept = tokens_of(keep_rows(derived, first, gone))
    assert len(derived.split("train").shards) == 2
    left = [row for n, row in enumerate(before) if n not in gone]
    assert len(kept) == len(left) and all(map(np.array_equal, kept, left))


@pytest.mark.parametrize("order", ["global", "windowed"])
def test_a_packed_run_goes_on_with_its_rows(tmp_path: Path, order: Any) -> None:
    """Rows packed anew after the switch: examples come twice in an epoch, or not at all, and the
    audit shows others than were trained on. A second bundle that is read as rows packed anew."""
    first = write_examples(tmp_path / "data", num_examples=40, num_train_shards=3)
    gone = rows_that_others_depend_on(first, 4)
    rows = tokens_of(as_rows(first, **HOW))
    lanes = {"lanes": 2, "window": 1} if order == "windowed" else {}
    data = DataConfig(url=first.reference, order=order, **HOW, **lanes)
    folder, log = tmp_path / "run", tmp_path / "met"
    changes = {**settings("ddp", "raise"), "data": data, "max_steps": 7}
    args: list[Any] = [watched, log, {}]
    assert train("", folder, 2, changes, *args) == [0, 0]
    one = derive(first, gone, tmp_path / "b", str(tmp_path / "elsewhere"), **HOW)
    changes |= {"switch_data": one.reference, "max_steps": STEPS}
    wide = [part.astype("<i8") for part in rows]
    met = [json.loads(line)[1] for path in tmp_path.glob("met-*") for line in path.open()]
    stored = {row for row in met}
    width = len(met[0]) // 2 // (SEQ_LEN + 1)
    hexes = [part.astype(f"<u{width}").tobytes().hex() for part in wide]
    assert stored <= set(hexes)
    bad = next(n for n in range(len(rows)) if n not in gone and hexes.count(hexes[n]) == 1)
    with World("", folder, 1, changes, watched, log, {hexes[bad]: 25}) as world:
        assert world.wait() == [93], world.said(0)
    (bundle,) = (folder / "guard").iterdir()
    step = int(bundle.name.partition("-")[2])
    shown = [row.pieces for row in replay_bundle(bundle).rows]
    assert shown == [row.pieces for row in replay(RunDir(folder), step).rows]
    digest = run(Config(bundle=str(bundle), output=one.storage.url))
    two = open_dataset(f"{one.storage.url}@{digest}")
    changes |= {"switch_data": two.reference}
    assert train("", folder, 2, changes, *args) == [0, 0]
    changes |= {"switch_data": "", "max_steps": STEPS + 4}
    assert train("", folder, 1, changes, *args) == [0]
    # In the order of the attempts: the last time of a step counts.
    model: dict[tuple[int, ...], str] = {}
    for path in sorted(tmp_path.glob("met-*"), key=lambda file: file.stat().st_mtime):
        for line in path.read_text().splitlines():
            place, tokens = json.loads(line)
            model[tuple(place)] = tokens
    history = RunDir(folder)
    numbers: list[int] = []
    for number in range(STEPS + 4):
        for row in replay(history, number, text=False).rows:
            numbers.append(row.row)
            assert model[number, row.rank, row.micro, row.index] == hexes[row.row]
    removed = set(history.read_lines("stages.jsonl")[-1]["removed"])
    assert bad in removed and not removed & set(numbers[STEPS * 8 :])
    assert not set(gone) & set(numbers[7 * 8 :])
    per_row = [numbers.count(row) for row in range(len(rows)) if row not in removed | set(gone)]
    assert max(per_row) - min(per_row) <= 1
    # A record of a shard that was written anew is found in the first version's rows.
    split = two.split("train")
    new = next(shard for shard in split.shards if shard not in first.manifest.shards)
    answer = who_saw(history, f"{new.name[:16]}:{new.rows - 1}", progress=False)
    assert answer.rows and {seen.row for seen in answer.sightings} == {answer.rows[0].row}
    kept = keep_rows(as_rows(two, **HOW), as_rows(first, **HOW), sorted(removed | set(gone)))
    local: Any = kept.split("train")
    at = int(local.rows_of_records(split.shards.index(new), np.array([new.rows - 1]))[0])
    assert np.array_equal(tokens_of(kept)[at], rows[answer.rows[0].row])


def test_a_version_for_other_rows_is_refused(tmp_path: Path) -> None:
    """Half a row that is left: its other examples would be trained on in a place of nobody."""
    first = write_examples(tmp_path / "data", num_examples=20)
    data = DataConfig(url=first.reference, **HOW)
    changes = {**settings("ddp", "raise"), "data": data, "max_steps": 2}
    assert train("", tmp_path / "run", 1, changes) == [0]
    other = derive(first, [0, 5], tmp_path / "b", packing="padded", seq_len=SEQ_LEN)
    changes |= {"switch_data": other.reference, "max_steps": 4}
    with World("", tmp_path / "run", 1, changes) as world:
        assert world.wait() == [2] and "Traceback" not in world.said(0)
        assert "lacks some examples only of a row" in world.said(0), world.said(0)
        assert "would lose 1 of" in world.said(0)
