"""Real runs on several sources: reweighted, extended and killed, audited; and what is refused."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist.audit import replay, who_saw
from dist.config import parse_config
from dist.dataset import Dataset, first_rows, mix, open_dataset
from dist.errors import ConfigError, DataRefused
from dist.examples import as_rows
from dist.optim import OptimConfig
from dist.order import Order
from dist.report import html_of
from dist.report_facts import read_facts
from dist.run_dir import RunDir
from dist.sharding import ParallelConfig
from dist.sources import SourceConfig, StageConfig, check_sources
from dist.start import DataConfig
from recipes.evaluate import open_data
from recipes.pretrain import Config
from recipes.trained import open_trained, resolve
from tests.make_dataset import write_dataset
from tests.make_examples import write_examples
from tests.rank_processes import World, train
from tests.same_run import assert_same_run, last_attempts, lines
from tests.test_exact_resume import killed_at, segments


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    """Three sources; the first two pass over several epochs in a run."""
    return [
        write_dataset(
            tmp_path_factory.mktemp(name), documents=documents, num_train_shards=shards, seed=seed
        )
        for name, documents, shards, seed in (
            ("web", 10, 3, 1),
            ("code", 6, 2, 2),
            ("new", 8, 2, 3),
        )
    ]


def sources(parts: list[Dataset], **weights: float) -> list[SourceConfig]:
    names = ("web", "code", "new")
    return [
        SourceConfig(name=name, url=part.storage.url, weight=weights[name])
        for name, part in zip(names, parts, strict=True)
        if name in weights
    ]


def changes(data: DataConfig, **more: Any) -> dict[str, Any]:
    # A schedule without an end: runs of several lengths go on alike.
    optim = OptimConfig(lr=1e-2, warmup_steps=2, schedule="constant")
    given = {"data": data, "optim": optim, "dropout": 0.0, "strategy": "ddp", "max_steps": 16}
    return {**given, **more}


@pytest.mark.parametrize("order", ["global", "windowed"])
def test_reweighted_at_resume_equals_planned_from_the_start(
    parts: list[Dataset], tmp_path: Path, order: Any
) -> None:
    """Counters that start anew with the weights, an added source that moves the others' rows, or
    a resumed run that forgets its stages: bits differ from the run that planned it all."""
    lanes = 4 if order == "windowed" else 0
    first = DataConfig(sources=sources(parts[:2] + parts[2:], web=0.75, code=0.25),
                       order=order, lanes=lanes)  # fmt: skip
    later = {"web": 1.0, "code": 3.0, "new": 1.0}
    planned = DataConfig(
        sources=sources(parts, web=0.75, code=0.25, new=0.0), order=order, lanes=lanes,
        stages=[StageConfig(from_step=5, weights=later)],
    )  # fmt: skip
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert train("", whole, 2, changes(planned)) == [0, 0]
    # Another run: two sources and five steps, then other weights and one source more; killed.
    assert train("", folder, 2, changes(first, max_steps=5)) == [0, 0]
    second = changes(DataConfig(sources=sources(parts, **later)))
    with World("", folder, 2, second, killed_at, 1, 13, 0, 0.0) as world:
        assert -signal.SIGKILL in world.wait()
        said = world.said(0)
        assert "mixture from sample 40 of the stream on: web 1/5, code 3/5, new 1/5" in said
        assert "mixture: changed at sample 40" in said
    assert train("", folder, 2, second) == [0, 0]
    assert_same_run(folder, whole)
    logged = [line for line in lines(folder, "metrics.jsonl") if "loss/new" in line]
    assert logged and all(line["step"] > 5 for line in logged)
    keys = ("loss/web", "loss/code")
    both = last_attempts(whole, "metrics.jsonl", *keys)
    assert last_attempts(folder, "metrics.jsonl", *keys) == both and len(both) > 4
    (validated,) = [x for x in lines(whole, "metrics.jsonl") if "validation_loss" in x]
    assert {"validation_loss/web", "validation_loss/code", "validation_loss/new"} <= set(validated)
    # Whoever wants the trained model finds its tokenizer by the mixture's reference.
    trained = open_trained(resolve(str(folder), ""))
    assert trained.tokenizer_json == parts[0].read_tokenizer() and trained.step == 16
    with pytest.raises(ConfigError, match="trained on several sources"):
        open_data(trained, "")
    listed = json.loads((folder / "run.json").read_text())["sources"]
    assert [one["data_digest"] for one in listed] == [one.data_digest for one in parts[:2]]
    assert len(lines(folder, "mixture.jsonl")) == 2


def test_losses_by_source_add_up_to_the_loss(parts: list[Dataset], tmp_path: Path) -> None:
    """A row's loss that is counted for another source, or padding that counts."""
    data = DataConfig(sources=sources(parts, web=2, code=1, new=1))
    assert train("", tmp_path / "run", 2, changes(data, global_batch=7, max_steps=4)) == [0, 0]
    run = RunDir(tmp_path / "run")
    mixed = mix(["web", "code", "new"], parts)
    borders = first_rows(mixed, "train")
    targets = {line["step"]: line["targets"] for line in lines(run.path, "consumed.jsonl")}
    for line in (x for x in lines(run.path, "metrics.jsonl") if "loss" in x):
        counts = np.zeros(3)
        for row in replay(run, line["step"] - 1, text=False).rows:
            source = int(np.searchsorted(borders, row.row, side="right")) - 1
            # A piece of k tokens has k - 1 targets.
            counts[source] += sum(piece.tokens - 1 for piece in row.pieces)
        assert counts.sum() == targets[line["step"] - 1]
        by_source = zip(counts, ("web", "code", "new"), strict=True)
        total = sum(n * line[f"loss/{name}"] for n, name in by_source if n)
        assert total / counts.sum() == pytest.approx(line["loss"], rel=1e-5)


@pytest.mark.parametrize("lanes", [0, 2])
def test_model_received_what_the_audit_says(
    parts: list[Dataset], tmp_path: Path, lanes: int
) -> None:
    """An audit that forgets a source, its own epochs, or the stages before the last."""
    data = DataConfig(
        sources=sources(parts, web=1, code=2, new=1), order="windowed" if lanes else "global",
        lanes=lanes, stages=[StageConfig(from_sample=50, weights={"web": 1, "new": 1})],
    )  # fmt: skip
    plan = [(1, 2, (3, 0)), (3, 2, (8, 0)), (2, 4, None)]
    seen = segments(
        parts[0], tmp_path / "run", plan, changes(data, global_batch=10, save_every_steps=0)
    )
    run = RunDir(tmp_path / "run")
    for step, rows in seen.items():
        told = replay(run, step, text=False).rows
        assert [row.row for row in told] == rows
        assert {row.source for row in told} <= {"web", "code", "new"}
    mixed = mix(["web", "code", "new"], parts)
    borders = first_rows(mixed, "train")
    flat = [row for step in sorted(seen) for row in seen[step]]
    met: list[int] = []
    for source, name in enumerate(mixed.names):
        own = [
            row - borders[source] for row in flat if borders[source] <= row < borders[source + 1]
        ]
        n = int(borders[source + 1] - borders[source])
        for start in range(0, len(own) - n + 1, n):
            if not lanes:  # batches are laid out lane by lane, so an epoch's end is torn
                assert sorted(own[start : start + n]) == list(range(n))
        answer = who_saw(run, f"{name}/train:3")
        done = [one for one in answer.sightings if one.consumed]
        assert len(done) == own.count(3) and {one.source for one in answer.sightings} <= {name}
        met.append(len(own))
        for one in done:
            rows = replay(run, one.step, rank=one.rank, text=False).rows
            assert (one.micro, one.index) in [
                (row.micro, row.index) for row in rows if row.row == borders[source] + 3
            ]
    assert sum(met) == 160 and met[1] < 30
    if not lanes:
        code = Order(int(np.diff(borders)[1]), 0, 1).rows(0, met[1])[1].tolist()
        assert [row - borders[1] for row in flat if borders[1] <= row < borders[2]] == code
    facts = read_facts(run)
    assert not facts.problems and facts.epochs is None
    assert [(name, rows) for name, rows, _ in facts.by_source] == list(
        zip(mixed.names, met, strict=True)
    )
    assert f"{met[0]:,} rows consumed" in html_of(facts)
    with pytest.raises(ConfigError, match="web/train:3"):
        who_saw(run, "train:3")


def test_a_run_keeps_its_sources(parts: list[Dataset], tmp_path: Path) -> None:
    """A source that is dropped, swapped for another version, or joined by one with another
    tokenizer, silently; data.url in place of sources; and a LATEST that moves."""
    given = sources(parts, web=1, code=1)
    run = {"max_steps": 2, "save_every_steps": 0}
    assert train("", tmp_path / "run", 1, changes(DataConfig(sources=given), **run)) == [0]
    other = write_dataset(tmp_path / "other", documents=9, seed=9)
    wide = write_dataset(tmp_path / "wide", documents=9, seed=9, seq_len=24)
    swapped = SourceConfig(name="code", url=other.storage.url)
    wider = SourceConfig(name="wide", url=wide.storage.url)
    for data, code, what in (
        (DataConfig(sources=given[:1]), 2, "has the source code, and data.sources lacks it"),
        (DataConfig(sources=[given[0], swapped]), 3, "is now version"),
        (DataConfig(sources=[*given, wider]), 2, "web and wide differ in seq_len: 16 and 24"),
        (DataConfig(url=parts[0].storage.url), 2, "trains on several sources (web, code)"),
    ):
        with World("", tmp_path / "run", 1, changes(data, **{**run, "max_steps": 4})) as world:
            assert world.wait() == [code], world.said(0)
            assert what in world.said(0), world.said(0)
            assert "Traceback" not in world.said(0)


def test_a_latest_that_moves_changes_no_source(tmp_path: Path) -> None:
    """A run on several sources that cannot be resumed, or goes on with other rows, since somebody
    wrote a newer version of one of them."""
    url = str(tmp_path / "code")
    web = write_dataset(tmp_path / "web", documents=10, seed=1)
    newer = write_dataset(url, documents=9, seed=9)
    begun = write_dataset(url, documents=6, seed=2)
    given = [SourceConfig(name="web", url=web.storage.url), SourceConfig(name="code", url=url)]
    short = {"max_steps": 2, "save_every_steps": 0}
    assert train("", tmp_path / "whole", 1, changes(DataConfig(sources=given), max_steps=4)) == [0]
    assert train("", tmp_path / "run", 1, changes(DataConfig(sources=given), **short)) == [0]
    begun.storage.write_atomic("LATEST", newer.data_digest.encode())
    with World("", tmp_path / "run", 1, changes(DataConfig(sources=given), max_steps=4)) as world:
        assert world.wait() == [0], world.said(0)
        assert f"the run goes on with {begun.data_digest[:12]}" in world.said(0)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert len(lines(tmp_path / "run", "mixture.jsonl")) == 1


SHARDED = {
    "fsdp": {"strategy": "fsdp"},
    "tp": {"strategy": "tp"},
    **{f"ZeRO-{n}": {"strategy": "deepspeed", "zero_stage": n} for n in (2, 3)},
}


@pytest.fixture(scope="module")
def alone(parts: list[Dataset], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Losses by source of the run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    data = DataConfig(sources=sources(parts, web=2, code=1, new=1))
    assert train("", folder, 1, changes(data, global_batch=7, max_steps=5)) == [0]
    return by_source(folder)


def by_source(folder: Path) -> list[Any]:
    found = [line for line in lines(folder, "metrics.jsonl") if "step" in line]
    return [
        (line["step"], key, line[key])
        for line in found
        for key in sorted(line)
        if key.startswith(("loss/", "validation_loss/"))
    ]


@pytest.mark.parametrize("name", SHARDED)
def test_losses_by_source_are_those_of_one_process(
    parts: list[Dataset], alone: list[Any], tmp_path: Path, name: str
) -> None:
    """Ranks of one tp group that count a row twice, a sum over other ranks than those with rows,
    or losses that an engine has scaled by then."""
    data = DataConfig(sources=sources(parts, web=2, code=1, new=1))
    given = changes(data, global_batch=7, max_steps=5)
    del given["strategy"]
    given["parallel"] = ParallelConfig(**SHARDED[name])  # type: ignore[arg-type]
    assert train("", tmp_path / "run", 2, given, timeout_s=180.0) == [0, 0]
    found = by_source(tmp_path / "run")
    assert [one[:2] for one in found] == [one[:2] for one in alone] and len(alone) > 12
    assert [one[2] for one in found] == pytest.approx([one[2] for one in alone], rel=2e-4)


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_a_mixture_of_examples(tmp_path: Path, packing: Any) -> None:
    """One source's pack index or masks for the other's rows, a resume that packs anew, or a source
    whose targets are counted as all of its tokens."""
    parts = [write_examples(tmp_path / name, seed=seed, num_train_shards=shards)
             for name, seed, shards in (("chat", 1, 3), ("math", 2, 2))]  # fmt: skip
    given = [
        SourceConfig(name=name, url=part.storage.url, weight=weight)
        for name, part, weight in zip(("chat", "math"), parts, (3, 1), strict=True)
    ]
    data = DataConfig(sources=given, packing=packing, seq_len=40)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train("", whole, 2, changes(data, max_steps=12)) == [0, 0]
    with World("", run, 2, changes(data, max_steps=12), killed_at, 1, 7, 0, 0.0) as world:
        assert -signal.SIGKILL in world.wait()
    assert train("", run, 2, changes(data, max_steps=12)) == [0, 0]
    assert_same_run(run, whole)
    mixed = as_rows(mix(["chat", "math"], parts), packing, 40)
    split, borders = mixed.split("train"), first_rows(mixed, "train")
    consumed = {line["step"]: line["targets"] for line in lines(run, "consumed.jsonl")}
    for line in (x for x in lines(run, "metrics.jsonl") if "loss" in x):
        targets = np.zeros(2)
        for row in replay(RunDir(run), line["step"] - 1, text=False).rows:
            number, local = (int(one[0]) for one in split.locate(np.array([row.row])))
            shard = split.open_shard(number, mixed.shard_path(split.shards[number]))
            source = int(row.row >= borders[1])
            assert row.source == mixed.names[source]
            targets[source] += shard.trained_runs(local)[:, 1].sum()
            shard.close()
        assert targets.sum() == consumed[line["step"] - 1]
        losses = zip(targets, mixed.names, strict=True)
        total = sum(n * line[f"loss/{name}"] for n, name in losses if n)
        assert total / targets.sum() == pytest.approx(line["loss"], rel=1e-5)
    answer = who_saw(RunDir(run), "math/train:1")
    assert answer.sightings and {one.source for one in answer.sightings} == {"math"}
    if packing == "padded":
        other = DataConfig(sources=given, packing="packed", seq_len=40)
        with World("", run, 1, changes(other, max_steps=14)) as world:
            assert world.wait() == [2], world.said(0)
            assert "data.packing" in world.said(0)


def test_wrong_mixtures_are_refused_by_name(parts: list[Dataset]) -> None:
    """Weights that train on nothing, or on a source that was misspelt."""
    a, b = SourceConfig(name="a", url="x"), SourceConfig(name="b", url="y")
    for data, what in (
        (DataConfig(url="z", sources=[a]), "both data.url and data.sources"),
        (DataConfig(sources=[a, a]), "names a twice"),
        (DataConfig(sources=[SourceConfig(name="a/b", url="x")]), "source name 'a/b'"),
        (DataConfig(sources=[SourceConfig(name="a", url="x", weight=-1)]), "source a is -1"),
        (DataConfig(sources=[a, b], stages=[StageConfig(weights={"a": 1})]), "give one of them"),
        (DataConfig(sources=[a], stages=[StageConfig(from_step=1, weights={"c": 1})]), "weighs c"),
        (DataConfig(sources=[a], stages=[StageConfig(from_step=1)]), "all sources"),
    ):
        with pytest.raises(ConfigError, match=what):
            check_sources(data)
    with pytest.raises(DataRefused, match="other versions"):
        open_dataset(mix(["a", "b"], parts[:2]).reference[:-4] + "0000")


def test_sources_that_cannot_be_one_model_are_refused(parts: list[Dataset], tmp_path: Path) -> None:
    """Ids of two tokenizers under one embedding: both sources train, and neither is learnt."""
    other = write_dataset(tmp_path / "other", documents=9, seed=9, with_tokenizer=False)
    chats = write_examples(tmp_path / "chats")
    special = parts[1].manifest
    ends = replace(parts[1], manifest=replace(special, schema={**special.schema, "eos_id": 2}))
    for part, what in ((other, "tokenizer"), (chats, "kind"), (ends, "eos_id: 1 and 2")):
        with pytest.raises(ConfigError, match=f"sources web and new differ in {what}"):
            mix(["web", "new"], [parts[0], part])


def test_sources_come_from_yaml_and_from_flags(tmp_path: Path) -> None:
    """A list of dataclasses that the parser leaves as dicts."""
    file = tmp_path / "mix.yaml"
    file.write_text(
        "data:\n  sources:\n  - {name: web, url: data/web, weight: 0.7}\n"
        "  - {name: code, url: data/code, weight: 0.3}\n"
        "  stages:\n  - {from_step: 10, weights: {web: 1, code: 1}}\n"
    )
    config = parse_config(Config, ["--config", str(file)], prog="x", description="x")
    assert config.data.sources[1] == SourceConfig(name="code", url="data/code", weight=0.3)
    assert config.data.stages == [StageConfig(from_step=10, weights={"web": 1, "code": 1})]
    flag = '--data.sources=[{"name": "a", "url": "x", "weight": 2}]'
    config = parse_config(Config, [flag], prog="x", description="x")
    assert config.data.sources == [SourceConfig(name="a", url="x", weight=2)]
