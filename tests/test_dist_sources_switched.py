"""A real run on a mixture whose sources lose bad rows on the way, and its audit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist.audit import replay, who_saw
from dist.dataset import Dataset, first_rows, mix, open_dataset
from dist.examples import as_rows
from dist.report import html_of
from dist.report_facts import read_facts
from dist.run_dir import RunDir
from dist.run_history import read_history
from dist.sources import SourceConfig
from dist.start import DataConfig
from dist.windowed import OrderMode, block_rows_of, make_order
from launch import audit as launch_audit
from spark_jobs.quarantine import Config, run
from tests.derive import derive
from tests.make_dataset import write_dataset
from tests.make_examples import write_examples
from tests.rank_processes import World, train
from tests.same_run import lines
from tests.test_dist_audit_switched import tokens_of, watched
from tests.test_dist_run_guard import settings

NAMES = ("web", "code", "new")
SIZES = (("web", 10, 5, 1), ("code", 6, 3, 2), ("new", 8, 2, 3))
ROLLED_BACK_FROM, STEPS, IN_ALL = 48, 60, 70


@dataclass(frozen=True)
class Story:
    """A run that lost rows of `code` in its second epoch, of `web` later, and went back once."""

    run: RunDir
    parts: list[Dataset]
    rows: list[str]
    """Tokens of each row of the first versions, end to end."""
    derived: dict[str, Dataset]
    rolled_back: int
    met: dict[tuple[int, ...], str]
    """(step, rank, micro-batch, index) -> tokens, the last time counting."""
    said: str


def removed_from(folder: Path, source: str, output: str) -> Dataset:
    """The version that quarantine makes of a source for the newest bundle of a run."""
    bundle = max((folder / "guard").glob("step-*"), key=lambda one: one.stat().st_mtime)
    digest = run(Config(bundle=str(bundle), output=output, source=source))
    return open_dataset(f"{output}@{digest}")


@pytest.fixture(scope="module", params=["global", "windowed"])
def story(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Story]:
    root = tmp_path_factory.mktemp("story")
    lanes = 4 if request.param == "windowed" else 0
    order: dict[str, Any] = {"order": request.param, "lanes": lanes, "window": 1 if lanes else 0}
    parts = [
        write_dataset(root / name, documents=documents, num_train_shards=shards, seed=seed)
        for name, documents, shards, seed in SIZES
    ]
    rows = [row for part in parts for row in tokens_of(part)]
    offset = first_rows(mix(NAMES, parts), "train").tolist()
    folder, log = root / "run", root / "met"

    def given(urls: list[str], **weights: float) -> dict[str, Any]:
        pairs = zip(NAMES, urls, strict=True)
        sources = [SourceConfig(name=n, url=u, weight=weights[n]) for n, u in pairs if n in weights]
        return {"data": DataConfig(sources=sources, **order)}

    def row_at(source: int, position: int) -> int:
        """Number of the row at a position of a source's stream, which no other row equals."""
        table, mode = parts[source].split("train").row_start, OrderMode()
        if lanes:
            size = block_rows_of(table, lanes, 1)
            mode = OrderMode(mode="windowed", lanes=lanes, window=1, block_rows=size)
        own = make_order(table, 0, mode, source).rows(position, position + 50)[1] + offset[source]
        return next(int(row) for row in own if rows.count(rows[row]) == 1)

    urls = [part.storage.url for part in parts]
    first = given(urls, web=1, code=1)
    num_code = offset[2] - offset[1]
    changes = {**settings("ddp", "raise"), **first, "max_steps": STEPS, "global_batch": 10}
    # Bad from the middle of the second epoch of `code` on.
    bad = {rows[row_at(1, num_code + num_code // 2)]: (2 * num_code) // 10 + 1}
    with World("", folder, 2, changes, watched, log, bad) as world:
        assert world.wait() == [93, 93], world.said(0)
    code = removed_from(folder, "code", urls[1])
    switch = {**changes, "switch_data": f"code={urls[1]}@{code.data_digest[:12]}"}
    done = json.loads((folder / "outcome.json").read_text())["error"]
    step = int(done.partition("step ")[2].partition(":")[0])
    bad = {rows[row_at(0, 5 * step + 40)]: step + 4}
    with World("", folder, 2, switch, watched, log, bad) as world:
        assert world.wait() == [93, 93], world.said(0)
        said = world.said(0)
    web = removed_from(folder, "web", str(root / "elsewhere"))
    # By the url of the source, with other weights and one source more, on one rank; then a bad
    # step is rolled back.
    urls[0] = web.reference
    last = {**settings("ddp", "rollback"), **given(urls, web=3, code=1, new=1)}
    last |= {"max_steps": STEPS, "global_batch": 10}
    rolled_back = row_at(2, 70)
    spoiled = {rows[rolled_back]: ROLLED_BACK_FROM}
    assert train("", folder, 1, last, watched, log, spoiled) == [0]
    # Longer on two ranks, and without naming the versions again.
    urls[0] = parts[0].storage.url
    longer = {**last, **given(urls, web=3, code=1, new=1), "max_steps": IN_ALL}
    assert train("", folder, 2, longer, watched, log, {}) == [0, 0]
    met: dict[tuple[int, ...], str] = {}
    for attempt in sorted(root.glob("met-*"), key=lambda one: one.stat().st_mtime):
        for line in attempt.read_text().splitlines():
            place, tokens = json.loads(line)
            met[tuple(place)] = tokens
    yield Story(RunDir(folder), parts, rows, {"code": code, "web": web}, rolled_back, met, said)


def gone_of(derived: Dataset) -> list[int]:
    return list((derived.read_provenance() or {})["removed"]["rows"])


def test_the_model_met_what_the_audit_says(story: Story) -> None:
    """Rows of a first version read by a derived one's numbers, or the reverse; removed rows that
    come again in a later epoch."""
    history, outcome = read_history(story.run), story.run.read_outcome()
    assert outcome is not None and outcome["status"] == "completed" and history.next_step == IN_ALL
    offset = first_rows(mix(NAMES, story.parts), "train").tolist()
    own: dict[int, list[tuple[int, int, int]]] = {0: [], 1: [], 2: []}
    by_row: dict[int, set[tuple[int, ...]]] = {}
    for step in range(history.next_step):
        for row in replay(story.run, step, text=False).rows:
            place = (step, row.rank, row.micro, row.index)
            assert story.met[place] == story.rows[row.row], place
            assert offset[NAMES.index(row.source)] + row.source_row == row.row
            own[NAMES.index(row.source)].append((row.t, row.epoch, row.source_row))
            by_row.setdefault(row.row, set()).add(place)
    for number in range(len(story.rows)):
        source = int(np.searchsorted(offset, number, side="right")) - 1
        key = f"{NAMES[source]}/train:{number - offset[source]}"
        answer = who_saw(story.run, key, progress=False)
        seen = {(s.step, s.rank, s.micro, s.index) for s in answer.sightings if s.consumed}
        assert seen == by_row.get(number, set()), key
        gone = NAMES[source] in story.derived and (
            number - offset[source] in gone_of(story.derived[NAMES[source]])
        )
        assert list(answer.removed) == ([number] if gone else [])
    # Each source by itself: all rows of an epoch but the removed and the rolled-back ones.
    missing = 0
    for s, name in enumerate(NAMES):
        size = offset[s + 1] - offset[s]
        last = max(epoch for _, epoch, _ in own[s])
        gone = set(gone_of(story.derived[name])) if name in story.derived else set()
        for epoch in range(last):
            rows = [row for _, e, row in sorted(own[s]) if e == epoch]
            assert len(rows) == len(set(rows))
            missing += len(set(range(size)) - set(rows) - gone)
    rollbacks = len(lines(story.run.path, "guard/skipped.jsonl"))
    assert rollbacks >= 1 and 1 <= missing <= 10 * rollbacks
    steps = {place[0] for place in by_row[story.rolled_back]}
    assert steps and not steps & set(range(ROLLED_BACK_FROM, STEPS))


def test_the_run_says_what_it_goes_on_with(
    story: Story, capsys: pytest.CaptureFixture[str]
) -> None:
    """A switch that nobody is told of, or a record of the run that lacks a version."""
    code, web = story.derived["code"], story.derived["web"]
    assert f"mixture: code goes on with {code.reference}" in story.said
    listed = lines(story.run.path, "mixture.jsonl")
    assert [one["data_digest"] for one in listed[-1]["sources"]] == [
        web.data_digest, code.data_digest, story.parts[2].data_digest
    ]  # fmt: skip
    assert [one.get("first") for one in listed[-1]["sources"]] == [
        story.parts[0].reference, story.parts[1].reference, None
    ]  # fmt: skip
    gone = gone_of(code)[0]
    assert launch_audit.who_saw([str(story.run.path), f"code/train:{gone}"]) == 0
    shown = capsys.readouterr().out
    assert f"code/train:{gone}" in shown.split("removed: not in the version")[0]
    assert code.data_digest[:12] in shown
    sources = [line.split() for line in shown.splitlines() if line.startswith("source ")]
    assert [one[1:] for one in sources] == [
        [name, part.reference] for name, part in zip(NAMES, story.parts, strict=True)
    ]
    facts = read_facts(story.run)
    assert not facts.problems and [name for name, _, _ in facts.by_source] == list(NAMES)
    said = f"{story.parts[1].reference}, then {code.reference} without 1 of its rows"
    assert facts.versions["code"] == said and said in html_of(facts)
    # Rows that rollbacks left out are not consumed.
    assert sum(rows for _, rows, _ in facts.by_source) == facts.samples == 10 * IN_ALL


def test_rows_of_the_derived_versions_can_be_asked_for(story: Story) -> None:
    """A bundle or a manifest of a derived version names shards that the first one lacks."""
    for name, derived in story.derived.items():
        first = story.parts[NAMES.index(name)]
        kept = np.setdiff1d(np.arange(first.split("train").num_rows), gone_of(derived))
        split = derived.split("train")
        new = [shard for shard in split.shards if shard not in first.manifest.shards]
        assert new
        for shard, row in ((one, row) for one in new for row in (0, one.rows - 1)):
            number = kept[int(split.row_start[split.shards.index(shard)]) + row]
            for key in (f"{shard.name[:16]}:{row}", f"{name}/{shard.name[:16]}:{row}"):
                answer = who_saw(story.run, key, progress=False)
                same = who_saw(story.run, f"{name}/train:{number}", progress=False)
                assert answer.sightings == same.sightings
                assert [one.name for one in answer.rows] == [f"{name}/train:{number}"]


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_a_source_of_examples(tmp_path: Path, packing: Any) -> None:
    """Packed anew without the removed examples, a source has other rows under the same numbers;
    padded, an example is a row and goes out alone."""
    parts = [
        write_examples(tmp_path / name, seed=seed, num_train_shards=shards, num_examples=20)
        for name, seed, shards in (("chat", 1, 3), ("math", 2, 2))
    ]
    sources = [
        SourceConfig(name=name, url=part.storage.url)
        for name, part in zip(("chat", "math"), parts, strict=True)
    ]
    data = DataConfig(sources=sources, packing=packing, seq_len=40)
    folder, log = tmp_path / "run", tmp_path / "met"
    changes = {**settings("ddp", "raise"), "data": data, "max_steps": 6}
    assert train("", folder, 2, changes) == [0, 0]
    derived = derive(parts[1], [3, 11], tmp_path / "b", packing=packing, seq_len=40)
    removed = gone_of(derived)
    changes |= {"max_steps": 30, "switch_data": f"math={derived.reference}"}
    with World("", folder, 1, changes, watched, log, {}) as world:
        codes, said = world.wait(), world.said(0)
    if packing == "packed":
        assert codes == [2] and "the source math holds examples that the run" in said
        assert "Traceback" not in said and len(removed) > 2
        return
    assert codes == [0], said
    met = [json.loads(line) for line in (tmp_path / "met-0").read_text().splitlines()]
    tokens = {tuple(place): row for place, row in met}
    mixed = as_rows(mix(["chat", "math"], parts), packing, 40)
    split: Any = mixed.split("train")
    shards = [split.open_shard(n, mixed.shard_path(one)) for n, one in enumerate(split.shards)]
    seen: list[int] = []
    for step in range(6, 30):
        for row in replay(RunDir(folder), step, text=False).rows:
            n, local = (int(one[0]) for one in split.locate(np.array([row.row])))
            expected = shards[n].tokens(local, local + 1)[0].astype("<u4")
            found = bytes.fromhex(tokens[step, row.rank, row.micro, row.index])
            assert np.array_equal(np.frombuffer(found, found_type(found)), expected)
            seen += [row.source_row] if row.source == "math" else []
    assert removed == [3, 11] and not set(removed) & set(seen) and len(set(seen)) == 38


def found_type(row: bytes) -> str:
    """Tokens of a row of 41 in a batch, whatever their width."""
    return f"<u{len(row) // 41}"
