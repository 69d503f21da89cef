"""The `leyden` command: help, nearest verbs, exit codes, what a dry run prints, how fast it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli, prep, train
from launch.data import ACTIONS

ROOT = Path(__file__).resolve().parent.parent


def leyden(*words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *words],
        cwd=cwd or ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    """A verb that is dispatched but not listed, or the other way round."""
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in cli.VERBS:
        assert f"\n  {verb} " in text
        assert (ROOT / "launch" / f"{verb}.py").is_file()


@pytest.mark.parametrize(
    "words",
    [[verb] for verb in cli.VERBS] + [["data", action] for action in ACTIONS],
    ids=" ".join,
)
def test_each_verb_has_help_with_an_example(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """--help that starts the work, or that has no line to copy."""
    try:
        code = cli.main([*words, "--help"])
    except SystemExit as exit_:  # argparse's own way out
        code = int(exit_.code or 0)
    out = capsys.readouterr().out
    assert code == 0
    assert "usage: leyden " + " ".join(words) in out
    assert "example" in out


def test_help_lists_jobs_and_recipes() -> None:
    """A job or recipe that is shipped and that nobody can find."""
    assert {"train-tokenizer", "tokenize-text"} <= set(prep.jobs())
    assert "pretrain" in train.recipes()
    assert "llama" not in train.recipes(), "a model file is not a recipe"
    assert all(prep.jobs().values()) and all(train.recipes().values()), "summaries from docstrings"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "'trian' is not a verb of leyden; did you mean 'train'?"),
        (["zzz"], "'zzz' is not a verb of leyden (verbs: quickstart, prep, data, train,"),
        (["train", "pretrian"], "'pretrian' is not a recipe; did you mean 'pretrain'?"),
        (["prep", "tokenise-text"], "did you mean 'tokenize-text'?"),
        (["data", "verfy", "x"], "'verfy' is not an action of leyden data; did you mean 'verify'?"),
        (["train", "no/such.py"], "no such recipe file: no/such.py"),
        (["train", "pretrain", "--nproc", "two"], "--nproc 'two' is not a number of ranks"),
        (["train", "pretrain", "--nproc=0"], "--nproc '0' is not a number of ranks"),
        (["train", "pretrain", "--nproc"], "--nproc needs a number of ranks"),
        (["data", "verify", "/no/such/dataset"], "no dataset at /no/such/dataset"),
    ],
)
def test_usage_errors_say_what_to_do(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback, or exit code 1, for what the user can mend."""
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and said in captured.err
    assert captured.out == ""


def test_no_words_prints_usage_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """A script that forgot the verb must not look successful."""
    assert cli.main([]) == 2
    assert capsys.readouterr().out.startswith("usage: leyden VERB")


def test_starts_without_the_heavy_libraries() -> None:
    """On a login node there is no torch, and importing it costs seconds where there is."""
    blocked = (
        "torch", "pyspark", "pytorch_lightning", "transformers", "pyarrow", "numpy", "rich",
        "accelerate", "deepspeed", "fsspec", "lightning", "pandas", "peft", "tokenizers", "wandb",
    )  # fmt: skip
    code = (
        "import sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "from launch.cli import main\n"
        "for words in (['--help'], ['prep'], ['train'], ['train', 'pretrain', '--dry-run']):\n"
        "    main(words)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_dry_run_prints_the_exact_command() -> None:
    """What is printed must be what would run, word for word, ready to paste."""
    words = ["train", "pretrain", "--config", "tiny", "--nproc", "2", "--run", "a b", "--dry-run"]
    done = leyden(*words, OMP_NUM_THREADS="1")
    python = os.path.relpath(sys.executable, ROOT)
    python = sys.executable if python.startswith("..") else python
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"{python} -m torch.distributed.run --standalone --local-addr=127.0.0.1"
        " --nproc-per-node=2 --max-restarts=0 -m -- recipes.pretrain --config tiny --run 'a b'\n"
    )
    done = leyden("prep", "tokenize-text", "--dry-run", "--input", "x;y", "--output", "out")
    assert done.stdout == (f"{python} -m spark_jobs.tokenize_text --input 'x;y' --output out\n")


def test_own_options_are_taken_and_the_rest_is_left_alone() -> None:
    """argparse would complete `--n`, eat `--`, and refuse values that look like options."""
    request = train.split_arguments(
        ["--a", "--nproc=3", "", "--dry-run", "--run", "r", "--n", "-1", "--", "--nproc", "9", "--"]
    )
    assert request.nproc == "3" and request.dry_run and request.run == "r"
    assert request.passed == ["--a", "", "--run", "r", "--n", "-1", "--nproc", "9", "--"]


def test_fresh_starts_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--fresh that deletes, or that resumes the old run."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "mine-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    for words in (["--run", "mine"], ["--run=mine"], ["--run", "runs/mine"]):
        assert train.main(["pretrain", "--fresh", "--dry-run", *words]) == 0
        assert "mine-3" in capsys.readouterr().out
    assert train.main(["pretrain", "--fresh", "--dry-run", "--run", "new"]) == 0
    assert "--run new\n" in capsys.readouterr().out


def test_a_shadowing_package_is_named(tmp_path: Path) -> None:
    """torchtune ships a `recipes`; the error must name it, not be an ImportError elsewhere."""
    other = tmp_path / "site"
    (other / "recipes").mkdir(parents=True)
    (other / "recipes" / "__init__.py").write_text("")
    done = leyden("train", "pretrain", "--dry-run", PYTHONPATH=f"{other}:{ROOT}", cwd=tmp_path)
    assert done.returncode == 4
    assert f"the package `recipes` is {other}/recipes/__init__.py, which hides" in done.stderr


def test_a_package_in_the_current_folder_is_named(tmp_path: Path) -> None:
    """`python -m` puts the current folder first: the ranks would import the user's `launch`."""
    for room in ("dist", "launch"):
        (tmp_path / room).mkdir()
    (tmp_path / "launch" / "__init__.py").write_text("")
    code = "import sys; sys.path.pop(0); from launch.cli import main; sys.exit(main(['prep']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4, done.stdout + done.stderr
    assert f"the package `launch` is {tmp_path}/launch/__init__.py" in done.stderr
    assert "run leyden from another one" in done.stderr


def test_a_plain_folder_called_dist_is_no_problem(tmp_path: Path) -> None:
    """Build tools leave a dist/ with wheels in every project."""
    (tmp_path / "dist").mkdir()
    done = leyden("train", "pretrain", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_child_gets_every_byte(tmp_path: Path) -> None:
    """Spaces, quotes, `$()`, newlines: nothing may be split, expanded or run."""
    script = tmp_path / "mine.py"
    script.write_text(
        "import json, os, sys\n"
        "open(os.environ['OUT'] + os.environ['RANK'], 'w').write(json.dumps(sys.argv[1:]))\n"
    )
    hostile = [
        *("--run", "a b", "", " ", "$(touch pwned)", "`touch pwned`", "; touch pwned"),
        *("new\nline", "q\"uo'te", "\\", "ünï", "--m", "--x=y z", "-h=", "#no", "*", "{a,b}", "--"),
    ]
    done = leyden(
        "train", str(script), "--nproc", "2", "--", *hostile, cwd=tmp_path, OUT=f"{tmp_path}/rank"
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank{rank}").read_text()) == hostile
    assert not (tmp_path / "pwned").exists()
    # And what was printed, pasted into a shell, gives the same words again.
    printed = done.stderr.split("$ ", 1)[1].removesuffix("\n").removesuffix("\n")
    shown = subprocess.run(
        ["bash", "-c", "show() { printf '%s\\0' \"$@\"; }; show " + printed],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert shown.stdout.split("\0")[-1 - len(hostile) : -1] == hostile


def test_a_config_error_keeps_its_exit_code(tmp_path: Path) -> None:
    """torchrun turns every code into 1 and buries the message in a page of its own."""
    done = leyden("train", "pretrain", "--nproc", "2", "--max_stps", "3", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "unknown key 'max_stps'; did you mean 'max_steps'?" in done.stderr
    assert "ChildFailedError" not in done.stderr and "Traceback" not in done.stderr
