"""`leyden export`, `eval`, `generate` and `data verify FOLDER` from a person's side."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from launch import cli, eval, export, generate, take_home
from tests.make_dataset import flip_byte
from tests.small_run import small_run

ROOT = Path(__file__).resolve().parent.parent
VERBS = {"eval": eval.VERB, "export": export.VERB, "generate": generate.VERB}


def leyden(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *words],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/mine."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(small_run("ddp"), folder / "runs" / "mine")
    return folder


def test_the_whole_way_home(home: Path) -> None:
    """A verb that passes other words on than were typed, loses the exit code, or prints its
    result where no program finds it."""
    done = leyden("export", "mine", "--output", "model", cwd=home)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("model: mine at step 30, fp32, 0.1 MB")
    done = leyden("data", "verify", "model", cwd=home)
    assert done.returncode == 0 and "verified: 6 files" in done.stdout
    done = leyden("eval", "mine", "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    outcome = json.loads((home / "runs/mine/outcome.json").read_text())
    result = json.loads(done.stdout)
    assert result["loss"] == pytest.approx(outcome["validation_loss"], rel=1e-6)
    assert json.loads((home / "runs/mine/eval.json").read_text()) == result
    done = leyden("export", "mine", "--output", "model", cwd=home)
    assert done.returncode == 2 and "error: model exists" in done.stderr
    assert "Traceback" not in done.stderr


def talk(words: list[str], said: bytes, cwd: Path) -> str:
    """What a command shows on a terminal on which `said` is typed."""
    pid, terminal = pty.fork()
    if pid == 0:  # the child: exec at once
        os.chdir(cwd)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
        os.execve(sys.executable, [sys.executable, "-m", "launch.cli", *words], env)
    shown = b""
    typed = False
    while True:
        try:
            data = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        shown += data
        if not typed and b"> " in shown:
            os.write(terminal, said)
            typed = True
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, shown.decode(errors="replace")
    return shown.decode(errors="replace")


def test_a_conversation_on_a_real_terminal(home: Path) -> None:
    """A child without the terminal (its input is /dev/null) ends before the first prompt."""
    words = ["generate", "mine", "--greedy", "--max_new_tokens", "6"]
    shown = talk(words, b"def spark\n\x04", home)
    from recipes.generate import Config, open_generator
    from recipes.prompts import printable

    config = Config(model=str(home / "runs/mine"), greedy=True, max_new_tokens=6)
    (text,) = open_generator(config).batch(["def spark"])
    assert len(text.text) > 3 and printable(text.text) in shown.replace("\r\n", "\n")
    assert "Ctrl-D ends" in shown


def test_damage_of_an_export_is_named(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 3 without the file's name; or a model folder taken for a dataset."""
    from recipes import export as recipe

    folder = tmp_path / "model"
    recipe.run(recipe.Config(model=str(home / "runs/mine"), output=str(folder)))
    capsys.readouterr()
    assert cli.main(["data", "verify", str(folder)]) == 0
    flip_byte(folder / "model.safetensors", 5000)
    assert cli.main(["data", "verify", str(folder)]) == 3
    assert "model.safetensors has another SHA-256" in capsys.readouterr().err
    (folder / "leyden.json").unlink()
    assert cli.main(["data", "verify", str(folder)]) == 3
    assert "leyden.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize("name", VERBS)
def test_help_lists_every_key_that_the_recipe_has(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The help is read from source: a field of another form would be left out of it."""
    import importlib

    config = importlib.import_module(f"recipes.{VERBS[name].recipe}").Config
    hints = typing.get_type_hints(config)
    keys = set()
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        inner = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
        keys |= {f"{field.name}.{one.name}" for one in inner} or {field.name}
    options = take_home.options_of(VERBS[name].recipe)
    assert {key for key, _, _ in options} == keys - {"model"}
    assert all(what for _, _, what in options), "a sentence under each field"
    assert cli.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: leyden {name} RUN" in out and "examples:" in out
    for key in keys - {"model"}:
        assert f"\n  --{key} " in out


@pytest.mark.parametrize("name", VERBS)
def test_shown_examples_are_accepted(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option in an example that was renamed."""
    import shlex

    from dist.config import keys_of
    from recipes import evaluate, generate
    from recipes import export as exporting

    config = {"eval": evaluate, "generate": generate, "export": exporting}[name].Config
    monkeypatch.chdir(tmp_path)
    for file in ("runs/quickstart/run.json", "runs/quickstart/exported/step-300/config.json"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "prompts.jsonl").touch()
    for example in VERBS[name].examples:
        words = shlex.split(example)
        assert cli.main([name, *words, "--dry-run"]) == 0
        flags = {word.removeprefix("--").partition("=")[0] for word in words if word[:2] == "--"}
        assert flags <= set(keys_of(config)), example


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["eval", "mnie"],
            "no run or exported model 'mnie': there is no runs/mnie and no mnie; did",
        ),
        (["export", "mnie"], "did you mean 'mine'? (runs in runs: mine)"),
        (["generate", "mnie", "--prompt", "x"], "did you mean 'mine'?"),
        (["eval", "--rows", "3"], "RUN|FOLDER comes first: leyden eval RUN|FOLDER"),
        (["export", "--output", "x"], "RUN comes first: leyden export RUN"),
        (["eval", "runs"], "runs is neither a run that has started"),
        (["generate", "mine", "--prompt", ""], "the prompt is empty"),
        (["generate", "mine", "--prompt="], "the prompt is empty"),
        (["generate", "mine", "--prompts", "no.jsonl"], "no such file: no.jsonl (--prompts)"),
        (["generate", "mine"], "no prompt: pass --prompt TEXT"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_said_before_anything_is_loaded(
    words: list[str], said: str, home: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Seconds of importing torch, and then a traceback, for a typing mistake."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(take_home, "run_child", lambda _: pytest.fail("it started the recipe"))
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and said in captured.err


def test_dry_run_prints_the_exact_command(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed must be what would run, word for word."""
    monkeypatch.chdir(home)
    assert cli.main(["generate", "mine", "--prompt", "a b$(x)", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.endswith(" -m recipes.generate mine --prompt 'a b$(x)'\n")
