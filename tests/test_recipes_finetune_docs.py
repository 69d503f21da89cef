"""docs/finetuning.md's worked example, as a reader would type it, on a smaller base."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.finetune_runs import write_base

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("json/decoder.py", "json/encoder.py", "textwrap.py", "shlex.py", "glob.py", "bisect.py")


def blocks(language: str) -> list[str]:
    """Code blocks of the page's example."""
    text = (ROOT / "docs" / "finetuning.md").read_text()
    example = text[text.index("## An example") :]
    found = re.findall(r"^```(\w*)\n(.*?)^```\n?", example, re.DOTALL | re.MULTILINE)
    return [body for kind, body in found if kind == language]


@pytest.mark.spark
@pytest.mark.timeout(600)
def test_the_worked_example(tmp_path: Path) -> None:
    """A command of the page that was renamed, a template without a stop, a run that cannot chat."""
    (script,) = blocks("python")
    (commands,) = blocks("")
    (tmp_path / "docstrings.py").write_text(script)
    library = Path(os.__file__).parent
    for name in SOURCES:
        target = tmp_path / "data" / "quickstart" / "input" / f"{name}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library / name, target)
    write_base(tmp_path / "base")  # in place of the quickstart's
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = {}
    for line in commands.strip().splitlines():
        words = shlex.split(line.replace("--max_steps 150", "--max_steps 3"))
        if words[:2] == ["leyden", "export"]:
            continue
        start = [sys.executable, *(["-m", "launch.cli"] if words[0] == "leyden" else [])]
        done = subprocess.run(
            [*start, *words[1:]], cwd=tmp_path, env=env, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        said[" ".join(words[:2])] = done.stdout
    questions = (tmp_path / "docstrings.jsonl").read_text().splitlines()
    assert len(questions) > 30 and json.loads(questions[0])["messages"][0]["role"] == "user"
    assert "completed: step 3/3" in said["leyden train"]
