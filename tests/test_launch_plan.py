"""`leyden plan`: the command it starts, its help, its errors, and one real plan."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest

from launch import cli, plan
from launch.rooms import ROOT


def test_dry_run_prints_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Words that do not arrive as they were typed."""
    assert cli.main(["plan", "pretrain", "--config", "8b", "--ranks", "64", "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[0] == "CUDA_VISIBLE_DEVICES="
    assert words[2:] == ["-m", "recipes.plan", "pretrain", "--config", "8b", "--ranks", "64"]


def test_an_unknown_recipe_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback of another process for a typing error."""
    assert cli.main(["plan", "pretrian"]) == 2
    assert "did you mean 'pretrain'" in capsys.readouterr().err


def test_help_names_every_option_of_the_recipe() -> None:
    """An option of recipes/plan.py that was renamed, and the help was not."""
    source = (ROOT / "recipes" / "plan.py").read_text()
    options = set(re.findall(r'add_argument\("(--[\w-]+)"', source))
    assert options == set(re.findall(r"^  (--[\w-]+)", plan.help_text(), re.MULTILINE)) - {
        "--dry-run"
    }
    assert options


def test_a_plan_of_a_shipped_config() -> None:
    """The whole path: the verb, the process, a shipped YAML, the table and the exit code."""
    words = (
        *("plan", "pretrain", "--config", "tiny", "--ranks", "256", "--device", "a100-40"),
        *("--vocab_size", "4096", "--seq_len", "256", "--json"),
    )
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["ranks"] == 256 and record["strategy"] == "fsdp" and record["fits"]
    assert record["parameters"] == 4_212_992
    assert record["peak_bytes"] < 1 << 30


@pytest.mark.parametrize(
    "line",
    [
        one.strip()
        for text in ((ROOT / "docs" / "plan.md").read_text(), plan.help_text())
        for one in text.splitlines()
        if one.strip().startswith("leyden plan ")
    ],
)
def test_shown_plans_are_accepted(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An option, config or recipe that was renamed, and docs/plan.md or the help was not."""
    words = shlex.split(line)[1:]
    assert cli.main([*words, "--dry-run"]) == 0
    command = shlex.split(capsys.readouterr().out)
    known = re.findall(r"^  (--[\w-]+)", plan.help_text(), re.MULTILINE)
    known += ["--config", "--data.url"]
    assert {word for word in command[4:] if word.startswith("--")} <= set(known)
    if "--config" in command:
        name = command[command.index("--config") + 1]
        assert (ROOT / "recipes" / "configs" / f"pretrain_{name}.yaml").is_file()
