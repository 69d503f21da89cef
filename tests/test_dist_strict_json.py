"""dist/strict_json.py, and that all files of a run with a NaN loss are JSON for any parser."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist import strict_json
from dist.guard import GuardConfig
from dist.report import write_report
from dist.run_dir import RunDir
from launch.status import stand
from tests.make_dataset import write_dataset
from tests.rank_processes import train
from tests.test_dist_run_guard import poison

NAN_STEP = 2


def refuse(name: str) -> NoReturn:
    raise ValueError(f"a bare {name}")


def parse(text: str) -> Any:
    """As jq, DuckDB or a browser would."""
    return json.loads(text, parse_constant=refuse)


keys = st.text(st.characters(blacklist_characters="/", codec="utf-8"), min_size=1).filter(
    lambda key: key != strict_json.NON_FINITE
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(keys, values, max_size=5))
def test_what_is_written_is_json_and_comes_back(record: dict[str, Any]) -> None:
    """A NaN in a list of a dict, an infinity with its sign lost, a number moved elsewhere."""
    text = strict_json.dumps(record)
    parse(text)
    # NaN is not equal to itself; its text is.
    assert repr(strict_json.loads(text)) == repr(record)


def test_a_record_says_what_was_not_finite() -> None:
    """A null alone could mean anything."""
    text = strict_json.dumps({"loss": math.nan, "facts": {"norms": [1.0, -math.inf]}})
    assert json.loads(text) == {
        "loss": None,
        "facts": {"norms": [1.0, None]},
        "non_finite": {"loss": "nan", "facts/norms/1": "-inf"},
    }
    # Files of before, and ones that someone edited.
    assert math.isnan(strict_json.loads('{"loss": NaN}')["loss"])
    assert strict_json.loads('{"a": 1, "non_finite": {"b/c": "nan", "a/0": "nan"}}') == {"a": 1}
    with pytest.raises(ValueError):
        strict_json.loads('{"loss": nu')


def test_every_file_of_a_run_with_nan_parses(tmp_path: Path) -> None:
    """One bad step makes metrics.jsonl unreadable for every tool but Python's."""
    url = write_dataset(tmp_path / "data", documents=60).storage.url
    folder = tmp_path / "run"
    changes = {
        "strategy": "ddp", "guard": GuardConfig(policy="off"), "max_steps": 5,
        "save_every_steps": 1,
    }  # fmt: skip
    assert train(url, folder, 1, changes, poison, 0, (NAN_STEP,), math.nan) == [0]
    texts = {path: path.read_text() for path in folder.rglob("*.json")}
    for path in folder.rglob("*.jsonl"):
        texts |= {path.with_name(f"{path.name}-{i}"): line
                  for i, line in enumerate(path.read_text().splitlines())}  # fmt: skip
    assert len(texts) > 20 and any("non_finite" in text for text in texts.values())
    for path, text in texts.items():
        try:
            parse(text)
        except ValueError as error:
            raise AssertionError(f"{path}: {error}: {text[:300]}") from None
    run = RunDir(folder)
    losses = {x["step"]: x["loss"] for x in run.read_lines("metrics.jsonl") if "loss" in x}
    assert math.isfinite(losses[NAN_STEP]) and math.isnan(losses[NAN_STEP + 1])
    outcome = run.read_outcome()
    assert outcome is not None and math.isnan(outcome["train_loss"])
    # Its readers, and a resume from a checkpoint that holds such numbers.
    _, said = write_report(run, None)
    assert f"not finite at step {NAN_STEP + 1}" in said
    assert stand(folder, None).step == 5
    assert train(url, folder, 1, {**changes, "max_steps": 7}) == [0]
    assert train(url, folder, 1, {**changes, "max_steps": 7}) == [0]  # says how it ended
