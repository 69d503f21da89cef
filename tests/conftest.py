"""What every test has: a quiet, offline environment that no user setting leaks into."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A busy machine is slow, and a change is judged by the same examples each time; new ones are drawn
# by `make test-all`.
settings.register_profile(
    "leyden", deadline=None, derandomize=not os.environ.get("LEYDEN_ALL_CELLS")
)
settings.load_profile("leyden")
# What tests compute in this process takes one thread: two that wait for each other on busy cores
# are ten times slower. quiet_environment takes it away again for what tests start; only what a
# module's fixtures start has it too.
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
# Settings of the person who runs the tests that would change what the tests see.
_LEAKS = (
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LEYDEN_LAUNCH"),
    *("LEYDEN_RUN_DIR", "LEYDEN_ATTEMPT", "LEYDEN_RUN", "LEYDEN_NODE", "LEYDEN_NUM_RANKS"),
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of many minutes run where they are asked for: -m slurm_long, `make test-slurm`; further
    seeds and combinations by `make test-all`."""
    left_out = {"slurm_long"} - set(str(config.option.markexpr).split())
    if not os.environ.get("LEYDEN_ALL_CELLS"):
        left_out.add("all_cells")
    deselected = [one for one in items if any(map(one.get_closest_marker, left_out))]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network look-ups, no W&B prompt, no launcher's variables."""
    for name in _LEAKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Any]:
    """A real Slurm of four nodes for the whole session (tests/slurm_cluster.py)."""
    from tests.slurm_cluster import missing, running_cluster

    reason = missing()
    if reason and os.environ.get("LEYDEN_REQUIRE_SLURM"):
        pytest.fail(f"Slurm was installed for this, and cannot be used: {reason}")
    if reason:
        pytest.skip(f"no Slurm here: {reason}")
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """One S3 server for all files of the session: s3fs keeps the endpoint it saw first."""
    from tests.s3_server import running_server

    with running_server() as url:
        yield url


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """small_disk("6m"): a file system of that size of its own, one a test; needs root."""
    mount = tmp_path / "disk"
    mounted = False

    def make(size: str) -> Path:
        nonlocal mounted
        mount.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "leyden-test", str(mount)]
        if shutil.which("mount") is None:
            pytest.skip("no mount command")
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a tmpfs needs root: {done.stderr.strip()}")
        mounted = True
        return mount

    yield make
    if mounted:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)
