"""`leyden data who-saw`, `leyden data replay` and `leyden report`, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist.dataset import Dataset
from dist.order import Order
from launch import cli, report
from tests.make_dataset import write_dataset
from tests.test_dist_report import make_run

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """With the run `mine` beside it, whose 40 steps of 4 rows on 2 ranks are consumed."""
    monkeypatch.chdir(tmp_path)
    dataset = write_dataset(tmp_path / "data", documents=12)
    make_run(tmp_path / "runs" / "mine", dataset.storage.url, dataset.data_digest)
    return dataset


def leyden_json(capture: Capture, *words: str) -> dict[str, Any]:
    assert cli.main(list(words)) == 0
    return dict(json.loads(capture.readouterr().out))


def test_replay_then_who_saw_leads_back(dataset: Dataset, capsys: Capture) -> None:
    """Two commands that disagree about the same sample."""
    found = leyden_json(capsys, "data", "replay", "mine", "--step", "22", "--json")
    order = Order(dataset.split("train").num_rows, 0)
    assert [row["row"] for row in found["rows"]] == order.rows(88, 92)[1].tolist()
    assert [row["rank"] for row in found["rows"]] == [0, 0, 1, 1]
    row = found["rows"][3]
    for key in (f"train:{row['row']}", f"{row['shard'][:10]}:{row['row_in_shard']}"):
        answer = leyden_json(capsys, "data", "who-saw", "runs/mine", key, "--json")
        (seen,) = [one for one in answer["sightings"] if one["step"] == 22]
        assert (seen["t"], seen["rank"], seen["attempt"]) == (91, 1, 1) and seen["consumed"]


def test_people_get_tables(dataset: Dataset, capsys: Capture) -> None:
    """A table without the place that was asked for; a rank's rows mixed with another's."""
    assert cli.main(["data", "who-saw", "mine", "train:3", "--epochs", "9"]) == 0
    out = capsys.readouterr().out
    assert out.count("  train:3 ") == 9
    assert "consumed by attempt 0" in out and "after the planned end" in out
    assert "steps done: 40 of 40" in out
    assert cli.main(["data", "who-saw", "mine", "validation:1"]) == 0
    assert "never trained on" in capsys.readouterr().out
    assert cli.main(["data", "replay", "mine", "--step", "3", "--rank", "1"]) == 0
    out = capsys.readouterr().out
    assert "rank 1 micro-batch 0 row 1: train:" in out and "rank 0" not in out
    assert "  input-" in out and "  | " in out


def test_text_is_cut_unless_all_is_wanted(
    dataset: Dataset, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megabytes on a terminal; or text in the data that steers it."""
    monkeypatch.setattr("dist.tokenizer.TextTokenizer.decode", lambda *_: "a\x1b[2Jb\u202e" * 99)
    words = ["data", "replay", "mine", "--step", "3"]
    assert cli.main(words) == 0
    short = capsys.readouterr().out
    assert cli.main([*words, "--full-text"]) == 0
    whole = capsys.readouterr().out
    assert "more characters" in short and "more characters" not in whole
    assert len(short) < len(whole)
    assert "\x1b" not in whole and "\u202e" not in whole and "a\\x1b[2Jb\\u202e" in whole


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["who-saw", "mime", "train:1"], "(runs in runs/: mine)"),
        (["who-saw", "mine", "trian:1"], "names nothing in"),
        (["who-saw", "mine", "train:1", "--epochs", "0"], "must be at least 1"),
        (["replay", "mine", "--step", "40"], "it has steps 0 to 39 (40 done)"),
    ],
)
def test_mistakes_are_usage_errors(
    dataset: Dataset, words: list[str], said: str, capsys: Capture
) -> None:
    """A traceback, or exit code 1, for what the user can mend."""
    assert cli.main(["data", *words]) == 2
    assert said in capsys.readouterr().err


def test_report_says_where_it_is(dataset: Dataset, tmp_path: Path, capsys: Capture) -> None:
    """A report written somewhere, or over another run's."""
    assert report.main(["mine"]) == 0
    out = capsys.readouterr().out
    assert "Completed 40 of 40 steps" in out and "report: runs/mine/report.html" in out
    assert report.main(["mine", "--output", "deep/in/mine.html"]) == 0
    assert (tmp_path / "deep/in/mine.html").read_text().startswith("<!doctype html>")
