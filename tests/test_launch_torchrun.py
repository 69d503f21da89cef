"""The torchrun command as text, the agent's exit code, and how many ranks `auto` means."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from dist.errors import ConfigError
from launch.agent import exit_code, rank_processes
from launch.torchrun import AGENT, num_gpus, parse_nproc, torchrun_argv, torchrun_env


def test_module_and_file() -> None:
    """`-m` in front of a path, or a `--` that ends up among the recipe's arguments."""
    assert torchrun_argv("recipes.pretrain", ["--run", "x"], nproc=2, python="py") == [
        *("py", "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"),
        *("--nproc-per-node=2", "--max-restarts=0", "-m", "--", "recipes.pretrain", "--run", "x"),
    ]
    command = torchrun_argv("a/mine.py", [], nproc=1, python="py", launcher=AGENT)
    assert command[1:3] == ["-m", "launch.agent"]
    assert command[-3:] == ["--max-restarts=0", "--", "a/mine.py"]


def test_torchrun_understands_it() -> None:
    """Torchrun reads `--run` as a short form of its --run-path, if nothing keeps it away."""
    run = pytest.importorskip("torch.distributed.run")
    words = ["--run", "x", "--", "--max-restarts=7", "-m", ""]
    command = torchrun_argv("recipes.pretrain", words, nproc=2)
    parsed = run.parse_args(["--signals-to-handle=SIGQUIT", *command[3:]])
    assert parsed.training_script == "recipes.pretrain" and parsed.module
    assert parsed.training_script_args == words
    assert parsed.max_restarts == 0 and parsed.nproc_per_node == "2"


def test_threads_share_the_cores() -> None:
    """Two ranks with all cores each run several times slower."""
    assert torchrun_env(2, {}, 8) == {"OMP_NUM_THREADS": "4"}
    assert torchrun_env(4, {}, 2) == {"OMP_NUM_THREADS": "1"}
    assert torchrun_env(2, {"OMP_NUM_THREADS": "3"}, 8) == {}


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, 2), ("0", 1), ("0,1,2", 3), ("", 0), ("-1", 0), ("GPU-8f2c,GPU-11aa", 2)],
)
def test_num_gpus(visible: str | None, expected: int, tmp_path: Path) -> None:
    """A device file that is no GPU (nvidia-uvm, nvidiactl), or a hidden GPU, counted."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-caps"):
        (tmp_path / name).touch()
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert num_gpus(environ, tmp_path) == expected


def test_nproc() -> None:
    """`auto` without a GPU is one rank; nonsense is refused with its value."""
    assert parse_nproc("auto", 0) == 1
    assert parse_nproc("auto", 4) == 4
    assert parse_nproc("3", 0) == 3
    for text in ("", "-1", "1.5", "all"):
        with pytest.raises(ConfigError, match="is not a number of ranks"):
            parse_nproc(text, 0)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([3, 0], 3),
        ([-signal.SIGTERM, 3], 3),  # the other rank was ended by the agent
        ([1, 2], 2),
        ([1, -signal.SIGTERM], 1),
        ([75, 75], 75),
        ([-signal.SIGKILL, -signal.SIGTERM], 137),
        ([-signal.SIGTERM], 143),
    ],
)
def test_exit_code(codes: list[int], expected: int) -> None:
    """The code of a rank that was ended because another failed would hide why."""
    assert exit_code(codes) == expected


def test_rank_processes_sees_children() -> None:
    """A drain signal that reaches no rank."""
    child = os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "30")
    try:
        assert child in rank_processes(os.getpid())
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
