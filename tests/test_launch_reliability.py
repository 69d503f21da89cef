"""Rows of docs/reliability.md that no other test proves: 8 (storm), 17 (whole), 20 (mismatches)."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist.checkpoint import find_checkpoint
from dist.dataset import Dataset
from dist.errors import LeydenError
from dist.ranks import Ranks
from dist.sharding import ParallelConfig, arrange
from launch.cluster_config import Cluster
from launch.nodes import NodeOptions, find_nodes
from launch.slurm import sbatch_text
from launch.torchrun import parse_nproc
from tests.fake_slurm import FakeSlurm
from tests.make_dataset import write_dataset
from tests.rank_processes import World
from tests.test_drain import SHORT
from tests.test_launch_slurm import REQUEST


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), with_tokenizer=False)


def slow_save(rank: int) -> None:
    """Saves that take a while, so that signals arrive in them."""
    from dist.checkpoint_callback import Checkpoints

    original = Checkpoints.save

    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.5)
        return original(self, *args, **kwargs)

    Checkpoints.save = save  # type: ignore[method-assign]


def test_a_storm_of_a_hundred_signals(dataset: Dataset, tmp_path: Path) -> None:
    """Row 8: a scheduler that repeats itself: a crash in a handler, a second checkpoint, a hang."""
    folder, draw, sent = tmp_path / "run", random.Random(0), 0
    changes = {**SHORT, "save_every_steps": 0, "max_steps": 400, "val_every_steps": 0}
    with World(dataset.storage.url, folder, 2, changes, slow_save) as world:
        until = time.monotonic() + 90
        while not (folder / "consumed.jsonl").exists():
            assert time.monotonic() < until, world.said(0)
            time.sleep(0.02)
        while sent < 100 and any(process.is_alive() for process in world.processes):
            world.signal(draw.randrange(2), draw.choice([signal.SIGUSR1, signal.SIGTERM]))
            sent += 1
            time.sleep(0.01)
        codes = world.wait()
        said = world.said(0) + world.said(1)
    assert codes == [75, 75], said
    assert sent > 30 and "Traceback" not in said
    (only,) = (folder / "checkpoints").iterdir()
    assert only.name.startswith("step-")


def test_the_newest_checkpoint_is_always_whole(dataset: Dataset, tmp_path: Path) -> None:
    """Row 17: a thousand looks at a run that saves after every step and keeps two. A marker
    before its files, or one that outlives them, shows as damage of a committed checkpoint."""
    folder, looks, seen = tmp_path / "run", 0, set()
    changes = {"max_steps": 40, "save_every_steps": 1, "keep": 2, "val_every_steps": 0}
    with World(dataset.storage.url, folder, 2, changes) as world:
        last = -1
        while looks < 1000 or any(process.is_alive() for process in world.processes):
            found, passed_over = find_checkpoint(folder / "checkpoints")
            looks += 1
            # Without its marker it is not a checkpoint yet, or no longer one.
            damaged = [one for one in passed_over if "was never finished" not in one]
            assert not damaged or deleted_meanwhile(folder, damaged), (looks, damaged)
            if found is not None:
                step = int(found.name.split("-")[1])
                assert step >= last, "an older one than before"
                last = step
                seen.add(step)
            else:
                assert last < 0, f"none at look {looks}, after step {last}"
                time.sleep(0.01)
        assert world.wait() == [0, 0]
    assert len(seen) >= 5, f"{looks} looks saw the steps {sorted(seen)}"


def deleted_meanwhile(folder: Path, damaged: list[str]) -> bool:
    """Whether these were being retired while they were read: their marker is gone by now."""
    names = [one.split(":")[0] for one in damaged]
    return not any((folder / "checkpoints" / name / "COMMIT.json").exists() for name in names)


def slurm_tasks(tmp_path: Path, nodes: int, nproc: int, tasks: int) -> None:
    """A job whose allocation has another number of tasks than the script was written for."""
    fake = FakeSlurm(tmp_path)
    request = replace(
        REQUEST, run_dir=str(tmp_path / "run"), work_dir=str(tmp_path), nodes=nodes, nproc=nproc,
        python="true", per_rank=True,
    )  # fmt: skip
    env = {
        "PATH": f"{fake.bin}:/usr/bin:/bin", "FAKE_SLURM": str(fake.state), "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "r1", "SLURM_NNODES": str(nodes), "SLURM_NTASKS": str(tasks),
        "SLURM_JOB_NAME": "x",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", sbatch_text(request, Cluster())], env=env, capture_output=True, text=True
    )
    assert fake.calls("srun") == [], "a rank was started"
    if done.returncode == 64:
        raise LeydenError(done.stderr)


def nodes_of(nnodes: str, rdzv: str, rank: str = "") -> None:
    options = NodeOptions(nnodes=nnodes, rdzv=rdzv, node_rank=rank)
    find_nodes(options, run="/r", target="x")


MISMATCHES: dict[str, Any] = {
    "4 tasks for 2 x 4 ranks": lambda place: slurm_tasks(place, 2, 4, 4),
    "8 tasks for 2 x 2 ranks": lambda place: slurm_tasks(place, 2, 2, 8),
    "1 task for 1 x 8 ranks": lambda place: slurm_tasks(place, 1, 8, 1),
    "no ranks": lambda _: parse_nproc("0", 0),
    "ranks in words": lambda _: parse_nproc("two", 0),
    "half a rank": lambda _: parse_nproc("1.5", 0),
    "two nodes, nowhere to meet": lambda _: nodes_of("2", ""),
    "a node that is not there": lambda _: nodes_of("2", "127.0.1.1:29555", "2"),
    "more at least than at most": lambda _: nodes_of("3:2", "127.0.1.1:29555"),
    "a world of half the ranks": lambda _: Ranks.from_environment(
        {"RANK": "0", "WORLD_SIZE": "4", "LEYDEN_NUM_RANKS": "8"}
    ),
    "a world of one": lambda _: Ranks.from_environment({"LEYDEN_NUM_RANKS": "2"}),
    "3 ranks in groups of 2": lambda _: arrange(
        ParallelConfig(strategy="fsdp", tp=2), Ranks(world_size=3, local_world_size=3)
    ),
}


@pytest.mark.parametrize("case", list(MISMATCHES))
def test_mismatches_are_refused_before_any_rank(case: str, tmp_path: Path) -> None:
    """Row 20: ranks that are started all the same wait for each other until a time-out."""
    with pytest.raises(LeydenError):
        MISMATCHES[case](tmp_path)


def test_the_page_cites_tests_that_exist() -> None:
    """A row whose test was renamed or never written, and that reads as proven."""
    root = Path(__file__).resolve().parent
    page = (root.parent / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| (\d+) \|.*\|$", page, re.MULTILINE)
    assert rows == [str(number) for number in range(1, 27)]
    file = ""
    for name, test in re.findall(r"\b(test_\w+\.py)?(?:::(test_\w+))?", page):
        file = name or file
        if name:
            assert (root / name).is_file(), name
        if test:
            assert f"def {test}(" in (root / file).read_text(), f"{file}::{test}"
