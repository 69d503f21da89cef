"""dist/communication.py: waiting for other ranks is measured, and nothing else is."""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

from dist.communication import CommunicationClock, why_not_measured
from dist.dataset import Dataset
from tests.make_dataset import write_dataset
from tests.rank_processes import train
from tests.run_ranks import run_ranks
from tests.same_run import lines

SLOW_S = 0.3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), with_tokenizer=False)


def clocked() -> tuple[float, float, float, bool]:
    """(late peer, other thread, asynchronous and overlapped, calls put back), seconds of rank 0."""
    rank = torch.distributed.get_rank()
    clock = CommunicationClock(torch.device("cpu"))
    original = torch.distributed.all_reduce
    one, other = torch.ones(4), torch.ones(4)
    group = torch.distributed.new_group(backend="gloo")
    clock.start()
    clock.start()
    torch.distributed.barrier()
    if rank == 1:
        time.sleep(SLOW_S)
    torch.distributed.all_reduce(one)
    late = clock.read_s()

    def elsewhere() -> None:
        if rank == 1:
            time.sleep(SLOW_S)
        torch.distributed.all_reduce(other, group=group)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    in_thread = clock.read_s()
    if rank == 1:
        time.sleep(SLOW_S)
    work: Any = torch.distributed.all_reduce(one, async_op=True)
    if rank == 0:
        time.sleep(SLOW_S)  # computing
    work.wait()
    overlapped = clock.read_s()
    clock.stop()
    return late, in_thread, overlapped, torch.distributed.all_reduce is original


def test_only_waiting_of_the_computing_thread_counts() -> None:
    """The loader's all-reduce waits for whole steps: counted, every run is communication-bound."""
    (late, in_thread, overlapped, put_back), (quick, *_) = run_ranks(clocked, 2, 240)
    assert late > 0.8 * SLOW_S > 0.5 * SLOW_S > quick
    assert in_thread == 0.0 and overlapped == 0.0 and put_back


def slow_forward(rank: int, victim: int) -> None:
    """One rank computes SLOW_S longer each step."""
    from recipes import llama

    original = llama.PackedDecoder.forward

    def forward(self: Any, batch: Any) -> Any:
        if rank == victim and self.training and batch.micro == 0:
            time.sleep(SLOW_S)
        return original(self, batch)

    llama.PackedDecoder.forward = forward  # type: ignore[method-assign]


def waited_s(folder: Path) -> list[float]:
    """Seconds of each step after the first in which a rank waited for another."""
    found = [line for line in lines(folder, "metrics.jsonl") if "step_s" in line]
    assert all(0.0 <= line["communication_share"] <= 1.0 for line in found), found
    return [line["communication_share"] * line["step_s"] for line in found[1:]]


@pytest.mark.parametrize(
    ("parallel", "victim"), [({"strategy": "fsdp"}, 1), ({"strategy": "tp", "tp": 2}, 0)]
)
def test_a_slow_peer_raises_the_number(
    dataset: Dataset, tmp_path: Path, parallel: dict[str, Any], victim: int
) -> None:
    """`communication 0%` in a run that waits for its slowest rank half of the time. Rank 0 is the
    slow one once: what it measures itself is not the whole."""
    from dist.sharding import ParallelConfig

    changes = {
        "parallel": ParallelConfig(**parallel), "max_steps": 6, "save_every_steps": 0,
        "dropout": 0.0, "strategy": parallel["strategy"],
    }  # fmt: skip
    url = dataset.storage.url
    assert train(url, tmp_path / "even", 2, changes) == [0, 0]
    assert train(url, tmp_path / "slow", 2, changes, slow_forward, victim) == [0, 0]
    even, slow = (statistics.median(waited_s(tmp_path / name)) for name in ("even", "slow"))
    assert slow > 0.8 * SLOW_S and slow > even + 0.4 * SLOW_S, (even, slow)


def test_what_is_not_measured_says_why() -> None:
    """A share of 0 for a strategy whose waiting nobody sees."""
    assert why_not_measured("fsdp") == "" and why_not_measured("tp") == ""
    assert "DeepSpeed" in why_not_measured("deepspeed")
