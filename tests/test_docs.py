"""What README and the help texts tell a reader to type is what the programs accept."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from launch import check, cli, prep, submit, train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
OURS = ("config", "dry-run", "cluster", "nodes")
"""Options of `leyden prep` itself."""


def shown_commands() -> list[str]:
    """Lines in README's code blocks and in the help texts that begin with `leyden`."""
    texts = [*re.findall(r"^```\n(.*?)^```", README, re.DOTALL | re.MULTILINE)]
    texts += [prep.help_text(), train.help_text(), check.help_text(), submit.help_text()]
    texts += [(ROOT / "docs" / "slurm.md").read_text()]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    lines = [line for line in lines if line.startswith("leyden ") and "usage" not in line]
    # Without the comment behind a command; usage lines hold brackets.
    commands = [line.split("   ")[0] for line in lines if "[" not in line]
    return list(dict.fromkeys(commands))


def write_what_they_name(folder: Path) -> None:
    """Cluster files, a script, a run and prep jobs, by the names that the pages use."""
    for name in ("cluster.yaml", "cpu.yaml"):
        (folder / name).write_text("nodes: 2\n")
    (folder / "job.sbatch").write_text("#!/bin/bash\ntrue\n")
    (folder / "runs" / "first").mkdir(parents=True)
    identity = {"recipe": "pretrain", "data": "/shared/data@abcdef"}
    (folder / "runs" / "first" / "run.json").write_text(json.dumps(identity))
    for number, output in enumerate(("/shared/data", str(folder / "data" / "corpus"))):
        prep_dir = folder / "runs" / "prep" / str(number)
        prep_dir.mkdir(parents=True)
        record = {"job": "tokenize_text", "job_id": str(1234 + number), "output": output}
        (prep_dir / "prep.json").write_text(json.dumps(record))


def test_the_first_command_stands_early() -> None:
    """A reader who has to scroll for the first command."""
    lines = README.splitlines()
    assert "make quickstart" in lines[:40]


@pytest.mark.parametrize("line", shown_commands())
def test_shown_commands_are_accepted(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A verb, job, recipe or option of our own that was renamed, and the page was not."""
    words = shlex.split(line)[1:]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "mine.py").touch()
    write_what_they_name(tmp_path)
    static = "--static" in words
    if words[0] in ("prep", "train") or (words[0] == "check" and not static):
        assert cli.main([*words, "--dry-run"]) == 0, capsys.readouterr().err
    elif words[0] == "submit":
        # L09: a test's folder is on no shared file system.
        allowed = [*words, "--dry-run", "--allow", "L09"]
        assert cli.main(allowed) == 0, capsys.readouterr().err
    else:
        assert words[0] in cli.VERBS


@pytest.mark.parametrize("line", [one for one in shown_commands() if " prep " in one])
def test_shown_keys_are_keys_of_the_job(line: str) -> None:
    """A key of a job that was renamed, and the page was not."""
    words = shlex.split(line)[2:]
    source = (ROOT / "spark_jobs" / f"{words[0].replace('-', '_')}.py").read_text()
    for word in words[1:]:
        name = word.removeprefix("--")
        if word.startswith("--") and name not in OURS:
            assert re.search(rf"^    {re.escape(name)}: ", source, re.MULTILINE), f"{line}: {word}"


def test_shown_configs_are_shipped() -> None:
    """`--config 124m` that no file stands behind."""
    for name in re.findall(r"pretrain .*?--config (\w+)", README):
        assert (ROOT / "recipes" / "configs" / f"pretrain_{name}.yaml").is_file(), name


def test_files_and_targets_that_readme_names_exist() -> None:
    """The annotated tree of a house that was rebuilt."""
    tree = README.split("## The house")[1].split("```")[1]
    for name in re.findall(r"^(\S+?)/? {2,}", tree, re.MULTILINE):
        assert (ROOT / name).exists(), name
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_make_sets_up_before_anything_else() -> None:
    """`make quickstart` or `make test` on a fresh clone must make .venv first, by our script."""
    for target in ("quickstart", "test", "lint", "bench"):
        done = subprocess.run(
            ["make", "-n", target, "PYTHON=py3"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        first = next(i for i, text in enumerate(lines) if "py3 launch/bootstrap.py" in text)
        used = next(i for i, text in enumerate(lines) if ".venv/bin/" in text)
        assert first < used, target


def test_make_says_which_python_is_missing() -> None:
    """`make: no-such-python: No such file` tells nobody what to install."""
    done = subprocess.run(
        ["make", "setup", "PYTHON=no-such-python"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "error: no no-such-python on PATH; install Python 3.11 to 3.13" in done.stderr
