"""`leyden quickstart --smoke` as a user runs it: the whole path, a rerun, and Ctrl-C in it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import quickstart
from launch.corpus import write_corpus
from launch.quickstart import Record
from launch.quickstart_stages import Plan, Stage, make_plan, stages

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "launch.cli", "quickstart", "--smoke"]


def environment(home: Path) -> dict[str, str]:
    """No Java on PATH, no JAVA_HOME, an empty home: what a bare machine has."""
    home.mkdir(exist_ok=True)
    programs = home / "bin"
    programs.mkdir()
    for folder in os.environ["PATH"].split(os.pathsep):
        for program in Path(folder).glob("*"):
            link = programs / program.name
            if not program.name.startswith("java") and not link.is_symlink():
                link.symlink_to(program)
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAVA", "SPARK"))}
    return {**keep, "PATH": str(programs), "HOME": str(home), "PYTHONPATH": str(ROOT)}


def processes_in(folder: Path) -> list[str]:
    """Command lines of live processes that work in `folder` or below it."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if Path(os.readlink(entry / "cwd")).is_relative_to(folder):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (OSError, ValueError):
            continue
    return found


def files_of(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.timeout(600)
def test_smoke_then_rerun_then_interrupted(tmp_path: Path) -> None:
    """The main job: broken by any room, seen here first.

    Ctrl-C comes first, in the Spark stage; the rerun goes on; the next one says that it is done.
    """
    env = environment(tmp_path / "home")
    work = tmp_path / "work"
    work.mkdir()
    options = {"cwd": work, "env": env, "text": True}
    log = (tmp_path / "first.log").open("w+")
    first = subprocess.Popen(COMMAND, stdout=log, stderr=subprocess.STDOUT, **options)  # type: ignore[call-overload]
    until = time.monotonic() + 200
    while "spark_jobs" not in " ".join(processes_in(work)):
        assert first.poll() is None and time.monotonic() < until, "the Spark stage never began"
        time.sleep(0.1)
    time.sleep(5)  # well into the start of the JVM
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=60) == 130
    log.seek(0)
    said = log.read()
    assert "quickstart: interrupted; what is complete is kept" in said
    assert "Traceback" not in said, said
    assert processes_in(work) == []
    assert not list((work / "data").rglob("*.tmp"))

    second = subprocess.run(COMMAND, capture_output=True, timeout=500, **options)  # type: ignore[call-overload]
    out = second.stdout
    assert second.returncode == 0, out + second.stderr
    assert "[1/9] collect: done before" in out
    for words in ("prep train-tokenizer", "prep tokenize-text", "train pretrain --config tiny"):
        assert f"leyden {words}" in out, "each stage shows the command that does it"
    for words in ("export quickstart-smoke", "generate runs/quickstart-smoke/model", "report"):
        assert f"leyden {words}" in out, "each stage shows the command that does it"
    assert "validation loss" in out and "what to do next" in out
    run = work / "runs/quickstart-smoke"
    assert "text by this tiny model" in out and (run / "model/model.safetensors").is_file()
    assert "<svg" in (run / "report.html").read_text()
    for noise in ("WARN ", "wandb:", "UserWarning", "FutureWarning", "Traceback"):
        assert noise not in out + second.stderr, out + second.stderr
    assert processes_in(work) == []
    verdict = json.loads((work / "runs/quickstart-smoke/quickstart.json").read_text())
    assert verdict["validation_loss"] < 8.4, "ln(4096) = 8.3: nothing was learned"
    assert set(verdict["stages"]) == {stage.name for stage in stages(make_plan(smoke=True, gpus=0))}

    before = files_of(work / "data")
    third = subprocess.run(COMMAND, capture_output=True, timeout=60, **options)  # type: ignore[call-overload]
    assert third.returncode == 0, third.stdout + third.stderr
    assert "quickstart: done before" in third.stdout
    assert files_of(work / "data") == before
    assert {path.name for path in work.iterdir()} == {"data", "runs"}, "it writes nowhere else"


def test_corpus_is_the_same_every_time(tmp_path: Path) -> None:
    """A folder order that depends on the file system gives every machine another dataset."""
    one = write_corpus(tmp_path / "one", 300_000)
    two = write_corpus(tmp_path / "two", 300_000)
    assert one == two and 50_000 < one["bytes"] <= 300_000
    names = sorted(str(p.relative_to(tmp_path / "one")) for p in (tmp_path / "one").rglob("*.txt"))
    assert names and all(name.startswith("stdlib/") for name in names)
    assert one["files"] == len(names)
    assert not any("/test/" in name or "__pycache__" in name for name in names)
    assert all(p.read_bytes().strip() for p in (tmp_path / "one").rglob("*.txt")), "blank file"


def test_corpus_replaces_what_an_interrupted_one_left(tmp_path: Path) -> None:
    """A half-written folder taken for a whole one."""
    (tmp_path / "input.tmp" / "old").mkdir(parents=True)
    write_corpus(tmp_path / "input", 100_000)
    assert not (tmp_path / "input.tmp").exists()
    assert not (tmp_path / "input" / "old").exists()
    assert json.loads((tmp_path / "input.json").read_text())["files"] > 0


def fake_stages(folder: Path, done: list[str]) -> list[Stage]:
    """Three stages that write a file each."""

    def make(name: str) -> Stage:
        def run() -> dict[str, int]:
            done.append(name)
            (folder / name).write_text(name)
            return {}

        return Stage(name=name, what=name, output=folder / name, words=("x", name), run=run)

    return [make(name) for name in ("a", "b", "c")]


def test_stages_resume_where_an_output_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage skipped although an earlier one was redone would mix two datasets."""
    done: list[str] = []
    monkeypatch.setattr(quickstart, "stages", lambda plan: fake_stages(tmp_path, done))
    for expected, missing in ((["a", "b", "c"], None), ([], None), (["b", "c"], "b")):
        done.clear()
        if missing:
            (tmp_path / missing).unlink()
        quickstart.run_stages(Plan(), Record(tmp_path / "stages.json"))
        assert done == expected


def test_a_half_done_repetition_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was deleted and begun again left an outcome.json: not the recorded one."""
    done: list[str] = []
    three = fake_stages(tmp_path, done)
    monkeypatch.setattr(quickstart, "stages", lambda plan: three)
    quickstart.run_stages(Plan(), Record(tmp_path / "stages.json"))
    (tmp_path / "c").unlink()

    def half() -> dict[str, int]:
        (tmp_path / "c").write_text("half")
        raise KeyboardInterrupt

    three[2] = dataclasses.replace(three[2], run=half)
    with pytest.raises(KeyboardInterrupt):
        quickstart.run_stages(Plan(), Record(tmp_path / "stages.json"))
    record = Record(tmp_path / "stages.json")
    assert [record.complete(stage) for stage in three] == [True, True, False]


def test_dry_run_shows_the_commands_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dry run that makes folders, or that leaves a stage out."""
    monkeypatch.chdir(tmp_path)
    assert quickstart.main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n# ") + 1 == len(stages(Plan()))
    assert "leyden train pretrain --config tiny --nproc" in out
    assert list(tmp_path.iterdir()) == []


def test_plans_keep_to_their_own_folders() -> None:
    """--smoke --fresh that deletes the real quickstart."""
    full, smoke = make_plan(smoke=False, gpus=0), make_plan(smoke=True, gpus=0)
    assert {full.data, full.run}.isdisjoint({smoke.data, smoke.run})
    assert full.gated and not smoke.gated
    assert [make_plan(smoke=False, gpus=n).nproc for n in (0, 1, 2, 8)] == [2, 1, 2, 2]


@pytest.mark.parametrize(("loss", "code"), [(5.8, 0), (6.2, 1)])
def test_gate(
    loss: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A model that is hardly better than counting words passes as trained."""
    monkeypatch.chdir(tmp_path)
    results = {
        "collect": {"files": 10, "bytes": 10**6},
        "tokenizer": {},
        "shards": {"shards": 2, "tokens": {"train": 9, "validation": 1}},
        "verify": {"bytes": 10**6, "shards": 2},
        "train": {"step": 3, "tokens": 4, "validation_loss": loss},
        "baselines": {"unigram": 6.5, "bigram": 4.5, "targets": 100.0},
        "export": {"files": 7, "bytes": 10**6},
        "sample": {"prompt": "def ", "tokens": 60},
        "report": {"bytes": 10**5},
    }
    plan = Plan()
    record = Record(plan.data / "stages.json")
    for stage in stages(plan):
        record.add(stage, 1.0, results[stage.name])
        stage.output.parent.mkdir(parents=True, exist_ok=True)
        stage.output.touch()
    assert quickstart.quickstart(plan, fresh=False) == code
    out = capsys.readouterr().out
    assert f"gate: {'below' if code == 0 else 'NOT below'} unigram - 0.5 = 6.000" in out
    assert json.loads((plan.run / "quickstart.json").read_text())["validation_loss"] == loss


def test_two_at_once_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two quickstarts in one folder would write each other's stages."""
    from launch import cli

    monkeypatch.chdir(tmp_path)
    with quickstart.only_one(make_plan(smoke=True, gpus=0)):
        assert cli.main(["quickstart", "--smoke"]) == 4
    assert "another quickstart is running in" in capsys.readouterr().err


def test_a_full_disk_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Minutes of work that end in ENOSPC."""
    from launch import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "FREE_MB_NEEDED", 10**12)
    assert cli.main(["quickstart"]) == 4
    assert "MB free and the quickstart needs" in capsys.readouterr().err
