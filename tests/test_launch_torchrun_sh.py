"""templates/torchrun.sh: it stands alone, restarts by the policy, and passes every byte on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dist.config import to_yaml
from tests.make_dataset import write_dataset
from tests.rank_processes import config, kill, processes_of

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "launch" / "templates" / "torchrun.sh"


def start(work: Path, *words: str, **env: str) -> subprocess.Popen[str]:
    settings = {"CODE": str(ROOT), "RUN": "first", "NPROC": "2", "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        ["bash", str(SCRIPT), *words], cwd=work, env={**os.environ, **settings}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def test_bash_parses_it_and_its_settings_are_named() -> None:
    """An unclosed quote, or a setting that only its source tells of."""
    text = SCRIPT.read_text()
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    head = text.split("set -uo pipefail")[0]
    names = ("RUN", "RUN_ROOT", "TARGET", "NPROC", "MAX_RESTARTS", "CODE", "PYTHON", "NNODES")
    for name in (*names, "RDZV", "NODE_RANK", "LOCAL_ADDR"):
        assert f"#   {name} " in head, name


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"RUN": ""}, "set RUN to the name of the run"),
        ({"NNODES": "2"}, "set RDZV to HOST:PORT"),
        ({"NNODES": "2", "RDZV": "localhost:29500"}, "take itself for the first one"),
        ({"NNODES": "2", "RDZV": "n1:29500"}, "set NODE_RANK"),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, env: dict[str, str], said: str) -> None:
    """A script that starts two worlds of one because a setting was forgotten."""
    out, _ = (front := start(tmp_path, **env)).communicate(timeout=30)
    assert front.returncode != 0 and said in out
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(400)
def test_a_killed_rank_and_the_rest_of_the_run(tmp_path: Path) -> None:
    """The template that a user copies: it must train, survive a killed rank, and leave nothing."""
    data = write_dataset(tmp_path / "data", with_tokenizer=False).storage.url
    changes = {"max_steps": 30, "save_every_steps": 5}
    (tmp_path / "a small.yaml").write_text(to_yaml(config(data, Path("x"), **changes)))
    run = tmp_path / "runs" / "first"
    front = start(tmp_path, "--config", "a small.yaml")
    try:
        until = time.monotonic() + 150
        while not list((run / "checkpoints").glob("step-*/COMMIT.json")):
            assert time.monotonic() < until and front.poll() is None, front.communicate()[0]
            time.sleep(0.02)
        ranks = [
            pid
            for pid in processes_of(str(run))
            if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ]
        os.kill(ranks[0], signal.SIGKILL)
        out, _ = front.communicate(timeout=200)
    finally:
        for pid in processes_of(str(run)):
            kill(pid)
        front.kill()
        front.wait()
    assert front.returncode == 0, out
    assert "attempt 0: again: failed" in out and "step 30/30" in out, out
    end = json.loads((run / "attempts" / "0" / "end.json").read_text())
    assert end["committed_end"] >= 5
    assert not processes_of(str(run))


def test_a_crash_loop_ends_and_words_arrive(tmp_path: Path) -> None:
    """A script that pastes its arguments together, or restarts a bug for ever."""
    (tmp_path / "a b.py").write_text(
        "import json, os, sys\n"
        "if os.environ['RANK'] == '0':\n"
        "    print('WORDS', json.dumps(sys.argv[1:]), flush=True)\n"
        "sys.exit(1)\n"
    )
    hostile = ["a b", "", "$(touch pwned)", "it's", "*", "#x", "new\nline", "--x=y z"]
    front = start(tmp_path, *hostile, TARGET="a b.py", NPROC="1", RUN="r u n")
    out, _ = front.communicate(timeout=120)
    assert front.returncode == 93, out
    assert out.count("WORDS") == 3 and "3 attempts in a row" in out
    words = json.loads(out.split("WORDS ")[1].splitlines()[0])
    assert words == [*hostile, "--run_root", "runs", "--run", "r u n"]
    assert not (tmp_path / "pwned").exists()
