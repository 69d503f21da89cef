"""The published figures: each has a file, a command and raw output; peers' rows are checked."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks import run_all
from benchmarks.gpu_data import write_text_dataset
from dist.verify import verify_full

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()


def test_the_page_cites_files_that_exist() -> None:
    """A figure whose benchmark was renamed, or whose raw output was never kept."""
    for name in re.findall(r"python -m benchmarks\.(\w+)", PAGE):
        assert (ROOT / "benchmarks" / f"{name}.py").is_file(), name
    cited = set(re.findall(r"\]\(benchmarks/(\S+?)\)", PAGE))
    assert cited
    for name in cited:
        first = (ROOT / "docs" / "benchmarks" / name).read_text().splitlines()[0]
        assert first.startswith("$ "), f"{name} does not begin with its command"


def test_bench_runs_every_benchmark() -> None:
    """A new benchmark that `make bench` leaves out."""
    helpers = {"run_all", "by_hand", "peer_env", "gpu_data", "__init__"}
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - helpers
    assert names == set(run_all.FIGURES)
    assert "benchmarks.run_all" in (ROOT / "Makefile").read_text()


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    """The one command for a GPU machine that fails there, minutes after it was rented."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--config", "tiny"]
    command += ["--steps", "3", "--cases", "bf16-mixed", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    case = record["bf16-mixed"]
    # The peak of a CPU is timed, so a busy one gives more than 1; a share in percent gives 50.
    assert case["tokens_per_s"] > 0 and 0 < case["mfu_causal"] <= case["mfu"] < 10
    assert case["peak_memory_bytes"] > case["plan"]["peak_bytes"] > 0
    assert len(case["top_costs"]) == 10 and Path(case["trace"]).is_file()
    assert "| bf16-mixed | " in done.stdout and "aten::" in done.stdout


def test_the_gpu_benchmark_says_that_there_is_none() -> None:
    """A traceback, or figures of a CPU under the title of a GPU."""
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, env=hidden, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == run_all.NOT_HERE and done.stderr.count("\n") == 1
    assert "no CUDA device" in done.stderr


def test_gpu_data_is_the_same_everywhere(tmp_path: Path) -> None:
    """Figures of two machines on other tokens; rows that repeat within the measured steps."""
    found = [
        write_text_dataset(tmp_path / name, vocab_size=512, seq_len=32, num_rows=600)
        for name in ("one", "other")
    ]
    assert found[0].data_digest == found[1].data_digest
    assert found[0].split("train").num_rows >= 600
    verify_full(found[0])


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    """benchmarks/peers/measure.py, which peers import by its bare name."""
    path = ROOT / "benchmarks" / "peers" / "measure.py"
    spec = importlib.util.spec_from_file_location("peers_measure", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbered_rows(num_rows: int) -> np.ndarray:
    rows = np.random.default_rng(0).integers(0, 50_000, (num_rows, 9), np.uint16)
    rows[:, 0], rows[:, 1] = np.arange(num_rows) & 0xFFFF, np.arange(num_rows) >> 16
    return rows


def test_peers_rows_are_counted_and_compared(measure: ModuleType) -> None:
    """A peer that drops or repeats rows, or hands out other tokens, and is called fast."""
    rows = numbered_rows(1000)
    order = np.random.default_rng(1).permutation(1000)
    shuffled = [rows[order[i : i + 50]] for i in range(0, 1000, 50)]
    found = measure.delivered(shuffled, rows)
    assert (found["rows_missing"], found["rows_twice"]) == (0, 0)
    assert found["spread"] == pytest.approx(1.0, abs=0.05)
    in_place = measure.delivered([rows[i : i + 50] for i in range(0, 1000, 50)], rows)
    assert in_place["spread"] < 0.06
    found = measure.delivered([*shuffled[1:], shuffled[1]], rows)
    assert (found["rows_missing"], found["rows_twice"]) == (50, 50)
    shuffled[3][7, 5] ^= 1
    with pytest.raises(RuntimeError, match="other tokens"):
        measure.delivered(shuffled, rows)


def test_a_rate_leaves_out_the_start_of_each_epoch(
    measure: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows counted that came before the clock started, or a start of workers that is timed."""

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

        def process_time(self) -> float:
            return self.now / 2

    clock = Clock()

    class Loader:
        def __iter__(self) -> Iterator[np.ndarray]:
            clock.now += 100.0
            for _ in range(10):
                clock.now += 1.0
                yield np.zeros((4, 1))

    monkeypatch.setattr(measure, "time", clock)
    assert measure.rate(Loader(), 5.0) == {"rows_s": 4.0, "rows_cpu_s": 8.0}


def test_an_epoch_without_a_measured_batch_is_refused(measure: ModuleType) -> None:
    """A rate of 0/0, or a loop without end, on a dataset that is too small."""
    with pytest.raises(RuntimeError, match="no batch after the first 8"):
        measure.rate([np.zeros((4, 1))] * 8, 1.0)
