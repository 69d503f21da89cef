"""recipes/evaluate.py: the run's own number, split by where the text came from."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist.dataset import open_dataset
from dist.errors import ConfigError, DataRefused
from dist.model_folder import find_model
from dist.shard_file import PackedShard
from recipes import evaluate, export
from recipes.evaluate import Config, by_source, first_parts, measures, run, table
from recipes.trained import DataRef, load_model, open_trained
from tests.make_dataset import flip_byte, write_dataset
from tests.small_run import small_data, small_run


def final_loss(folder: Path) -> float:
    return float(json.loads((folder / "outcome.json").read_text())["validation_loss"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model."""
    output = str(tmp_path_factory.mktemp("exports") / "model")
    return export.run(export.Config(model=str(small_run("ddp")), output=output))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_loss_is_the_runs_own_final_validation_loss(strategy: str) -> None:
    """Padding counted as targets, documents that see each other, or an older checkpoint."""
    result = run(Config(model=str(small_run(strategy)), micro_batch=7))
    assert result["loss"] == pytest.approx(final_loss(small_run(strategy)), rel=1e-6)
    totals = open_dataset(small_data()).manifest.totals["validation"]
    assert (result["targets"], result["rows"]) == (totals["targets"], totals["rows"])
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert sum(one["targets"] for one in result["sources"]) == result["targets"]
    kept = json.loads((small_run(strategy) / "eval.json").read_text())
    assert kept == json.loads(json.dumps(result))


def test_auto_is_the_precision_that_the_run_decided(tmp_path: Path) -> None:
    """The probe of another machine, or of a busy one, would evaluate in another precision."""
    shutil.copytree(small_run("ddp"), tmp_path / "run")
    trained = open_trained(find_model(str(tmp_path / "run")))
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    for said in ("bf16-mixed", "fp32"):
        text = json.dumps({**outcome, "precision": f"{said} (auto: a probe)"})
        (tmp_path / "run" / "outcome.json").write_text(text)
        assert evaluate.precision_of(Config(), trained) == said
        assert evaluate.precision_of(Config(precision="fp32"), trained) == "fp32"


def test_an_exported_folder_gives_the_same(folder: Path) -> None:
    """An export that lost something, or another attention for folders."""
    result = run(Config(model=str(folder)))
    assert result["loss"] == pytest.approx(final_loss(small_run("ddp")), rel=1e-6)
    assert (result["step"], result["data"]) == (30, open_dataset(small_data()).reference)
    assert not (folder / "eval.json").exists(), "the folder would no longer verify"


def losses_by_hand(rows: int) -> dict[str, list[float]]:
    """Sum of losses and targets by input, each document alone through the standard model."""
    dataset = open_dataset(small_data())
    model = load_model(
        open_trained(find_model(str(small_run("ddp")))), torch.device("cpu"), packed=False
    )
    (shard,) = dataset.split("validation").shards
    opened = PackedShard(dataset.shard_path(shard))
    sums: dict[str, list[float]] = {}
    for row in range(rows):
        tokens = torch.from_numpy(opened.tokens(row, row + 1).astype(np.int64))[0]
        start = 0
        for source, _, length in opened.lineage(row):
            piece = tokens[start : start + length][None]
            start += length
            if length > 1:
                with torch.no_grad():
                    logits = model(input_ids=piece[:, :-1]).logits[0].double()
                losses = torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum")
                one = sums.setdefault(f"input-{source}", [0.0, 0])
                one[0] += float(losses)
                one[1] += length - 1
    return sums


def test_each_source_gets_its_own_documents() -> None:
    """Losses credited to the neighbour in the row, or to the row's first document."""
    result = run(Config(model=str(small_run("ddp")), rows=12, micro_batch=5))
    expected = losses_by_hand(12)
    assert len(expected) > 2
    found = {
        one["source"]: (one["loss"] * one["targets"], one["targets"]) for one in result["sources"]
    }
    assert found.keys() == expected.keys()
    for source, (loss, targets) in expected.items():
        assert found[source] == (pytest.approx(loss, rel=1e-5), targets)
    assert result["rows"] == 12


def test_other_data_needs_the_same_tokenizer(tmp_path: Path, folder: Path) -> None:
    """Ids of another vocabulary give a loss too, and it means nothing."""
    same = write_dataset(tmp_path / "same", seq_len=20, seed=8, longest=20)
    result = run(Config(model=str(folder), data=DataRef(url=same.storage.url), split="train"))
    assert result["targets"] == same.manifest.totals["train"]["targets"]
    other = write_dataset(tmp_path / "other", vocab_size=290)
    for model in (folder, small_run("ddp")):
        with pytest.raises(DataRefused, match="its ids mean other text"):
            run(Config(model=str(model), data=DataRef(url=other.storage.url)))
    with pytest.raises(ConfigError, match="no split 'test'; it has train, validation"):
        run(Config(model=str(folder), split="test"))
    flip_byte(same.shard_path(same.split("validation").shards[0]), 999)
    with pytest.raises(DataRefused, match="xxh3-128"):
        run(Config(model=str(folder), data=DataRef(url=same.storage.url)))


def test_a_folder_without_a_record_needs_a_dataset(tmp_path: Path, folder: Path) -> None:
    """A model that somebody else exported says nothing of its data."""
    foreign = tmp_path / "foreign"
    shutil.copytree(folder, foreign)
    (foreign / "leyden.json").unlink()
    with pytest.raises(ConfigError, match="does not say what it was trained on"):
        run(Config(model=str(foreign)))
    result = run(Config(model=str(foreign), data=DataRef(url=small_data())))
    assert result["loss"] == pytest.approx(final_loss(small_run("ddp")), rel=1e-6)


def test_sources_are_the_first_folders_that_differ() -> None:
    """One source called `data` for everything, or one for every file."""
    assert first_parts(["a/x/1", "a/y/2", "a/y/3"]) == ["x", "y", "y"]
    assert first_parts(["en/1.txt", "de/1.txt", "readme"]) == ["en", "de", "readme"]
    assert first_parts(["one/file.txt"]) == ["file.txt"]
    assert first_parts(["a/x", "a/x"]) == ["x", "x"]
    assert first_parts([]) == []


def test_the_table_holds_twenty_sources_and_the_rest() -> None:
    """A corpus of a thousand folders would print a thousand lines."""
    sums = np.stack((np.arange(30) * 2.0, np.arange(30)), axis=1)
    found = by_source(sums, [f"s{i}" for i in range(30)])
    assert len(found) == 21
    assert [one["source"] for one in found[:2]] == ["s29", "s28"]
    # s0 has no targets, so nine are left: 1 to 9.
    assert found[-1] == {"source": "(9 others)", **measures(90, 45)}
    assert measures(0, 0) == {"loss": None, "perplexity": None, "targets": 0}


def test_output_for_people_and_for_programs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prose among the JSON, a number that is not the one in eval.json, or a steered terminal."""
    monkeypatch.setattr("sys.argv", ["evaluate", str(folder), "--json", "--rows", "8"])
    assert evaluate.main() == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result["rows"] == 8
    result["sources"][0]["source"] = "a\x1b[2J"
    text = table(result)
    assert "\x1b" not in text and f"{result['loss']:.4f}" in text
    assert text.splitlines()[-2].startswith("all ")
    monkeypatch.setattr("sys.argv", ["evaluate", str(folder), "--row", "8"])
    with pytest.raises(ConfigError, match="unknown key 'row'; did you mean 'rows'"):
        evaluate.main()
