"""dist/loggers.py: the real libraries, local stores, one identity, no power over the run."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from dist.errors import ConfigError, SetupError
from dist.loggers import (
    LOGGERS_JSON,
    MAX_WAITING,
    LogConfig,
    Loggers,
    check_loggers,
    has_wandb_key,
    open_loggers,
)
from dist.run_dir import RunDir
from tests.make_dataset import write_dataset
from tests.rank_processes import World


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir.open(tmp_path / "runs" / "mine")
    made.write_run({}, "")
    return made


def log_two_attempts(run: RunDir, name: Any) -> list[dict[str, str]]:
    """Two starts of one run, of two steps each; returns the ids after each."""
    ids = []
    for attempt in (0, 1):
        said: list[str] = []
        loggers = open_loggers(run, LogConfig(to=[name]), attempt=attempt, warn=said.append)
        assert loggers is not None and said == []
        loggers.config({"optim": {"lr": 1e-3}})
        for step in (2 * attempt + 1, 2 * attempt + 2):
            loggers.log(step, {"step": step, "loss": 10.0 - step, "attempt": attempt})
        loggers.close()
        assert set(loggers._loggers) == {name}, "it failed and was left out"
        ids.append(json.loads((run.path / LOGGERS_JSON).read_text()))
    return ids


EXPECTED = [(1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0)]


def test_csv_keeps_the_lines_of_every_attempt(run: RunDir) -> None:
    """Lightning's CSV logger deletes the file of the attempt before."""
    first, second = log_two_attempts(run, "csv")
    assert first == second
    found = []
    for path in sorted((run.path / "loggers" / "csv").glob("attempt-*/metrics.csv")):
        found += [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(path.open())]
    assert found == EXPECTED


def test_tensorboard_writes_one_curve(run: RunDir) -> None:
    """A folder a restart is a new run in TensorBoard: the curve is torn."""
    pytest.importorskip("tensorboard")
    first, second = log_two_attempts(run, "tensorboard")
    assert first == second
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (run.path / "loggers" / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == EXPECTED


def test_mlflow_goes_on_with_its_run(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new MLflow run a restart; or one on a server that nobody asked for."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    first, second = log_two_attempts(run, "mlflow")
    assert first == second and first["mlflow"]
    store = (run.path / "loggers" / "mlflow").absolute().as_uri()
    history = mlflow.MlflowClient(store).get_metric_history(first["mlflow"], "loss")
    assert sorted((one.step, one.value) for one in history) == EXPECTED


def test_wandb_without_a_key_stays_offline_under_one_id(run: RunDir) -> None:
    """A prompt for a key on a compute node waits for ever; a new id a restart tears the curve."""
    first, second = log_two_attempts(run, "wandb")
    assert first == second and first["wandb"]
    folders = list((run.path / "loggers" / "wandb").glob(f"offline-run-*-{first['wandb']}"))
    assert folders and all(list(folder.glob("*.wandb")) for folder in folders)


def test_a_wandb_key_is_found_as_wandb_finds_it(tmp_path: Path) -> None:
    """A key in ~/.netrc (wandb login) that is not seen leaves the run offline."""
    secrets = tmp_path / "netrc"
    secrets.write_text("machine api.wandb.ai\n login user\n password x\n")
    nothing = {"NETRC": str(tmp_path / "none")}
    assert not has_wandb_key(nothing)
    assert has_wandb_key({**nothing, "WANDB_API_KEY": "x"})
    assert has_wandb_key({"NETRC": str(secrets)})
    assert not has_wandb_key({"NETRC": str(secrets), "WANDB_MODE": "offline"})


class Failing:
    """A logger of someone else's: its disk is full from the second step on."""

    def __init__(self) -> None:
        self.calls = 0

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.calls += 1
        if step == 2:
            raise OSError(28, "No space left on device")


class Keeping:
    """One that works."""

    def __init__(self, answers: threading.Event | None = None) -> None:
        self.steps: list[int] = []
        self._answers = answers

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if self._answers is not None:
            self._answers.wait(60.0)
        self.steps.append(step)

    def save(self) -> None:
        pass

    def finalize(self, status: str) -> None:
        pass


def test_a_failing_logger_is_warned_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk of a logger must end neither the training nor the other loggers."""
    bad, good = Failing(), Keeping()
    loggers = Loggers({"bad": bad, "good": good})
    for step in range(5):
        loggers.log(step, {"loss": math.nan if step == 3 else 1.0, "text": "no number"})
    loggers.close()
    loggers.close()
    assert good.steps == [0, 1, 2, 3, 4] and bad.calls == 3
    assert capsys.readouterr().err.count("the logger bad failed") == 1


def test_a_slow_logger_does_not_slow_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A server that does not answer would hold up every logged step, and in the end memory."""
    answers = threading.Event()
    slow = Keeping(answers)
    loggers = Loggers({"slow": slow})
    for step in range(MAX_WAITING + 50):
        loggers.log(step, {"loss": 1.0})  # returns, though nothing is taken
    assert slow.steps == [] and "slower than training" in capsys.readouterr().err
    answers.set()
    loggers.close()
    assert slow.steps[:3] == [0, 1, 2] and len(slow.steps) >= MAX_WAITING - 2


def test_what_is_missing_or_unknown_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ImportError on rank 0 after the model is built, with a traceback."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"pip install 'leyden\[mlflow\]'"):
        check_loggers(LogConfig(to=["mlflow"]))
    with pytest.raises(ConfigError, match="log.to"):
        LogConfig(to=["neptune"])  # type: ignore[list-item]


def test_a_run_writes_to_its_loggers_and_its_profile(tmp_path: Path) -> None:
    """Loggers or the profiler not connected to the recipe at all; or metrics of rank 1 too."""
    from dist.profiling import ProfileConfig

    data = write_dataset(tmp_path / "data", with_tokenizer=False)
    folder = tmp_path / "run"
    changes = {
        "strategy": "ddp", "max_steps": 5, "log": LogConfig(to=["csv"]),
        "profile": ProfileConfig(steps=[2, 4]),
    }  # fmt: skip
    with World(data.storage.url, folder, 2, changes) as world:
        assert world.wait() == [0, 0], world.said(0) + world.said(1)
    (path,) = (folder / "loggers" / "csv").glob("attempt-*/metrics.csv")
    steps = [int(row["step"]) for row in csv.DictReader(path.open()) if row["loss"]]
    assert steps == [1, 2, 3, 4, 5]
    for rank in (0, 1):
        trace = json.loads((folder / "profile" / f"rank-{rank}.json").read_text())
        steps_seen = [e for e in trace["traceEvents"] if "AdamW.step" in str(e.get("name"))]
        assert len(steps_seen) == 2, "the window is not of two steps"


@pytest.mark.parametrize("steps", [[3], [3, 3], [-1, 2], [1, 2, 3]])
def test_a_window_that_cannot_be_meant_is_refused(steps: list[int]) -> None:
    """A window of no steps that profiles nothing in silence."""
    from dist.profiling import ProfileConfig

    with pytest.raises(ConfigError, match=r"profile\.steps"):
        ProfileConfig(steps=steps)
