"""`leyden check` on real ranks, each with a fault put in: the row that must say it, and who."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist import fabric_probes
from dist.fabric_check import Options, first_host, gather_facts, judged
from dist.fabric_probes import rounds_of_pairs
from dist.fabric_rows import FAIL, OK, WARN, Row, nodes_to_exclude, table_text
from dist.fabric_verdicts import judge
from dist.node_probes import probe_folder
from dist.ranks import Ranks
from tests.make_dataset import tokenizer_json, write_dataset
from tests.run_ranks import run_ranks

CPU = torch.device("cpu")


def check(options: Options, fault: str, where: int) -> dict[str, Any]:
    """On each rank, which is a node of its own: the rows, with one fault on rank `where`."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ranks = Ranks(rank=rank, world_size=world, local_rank=0, local_world_size=1, node_rank=rank)
    os.environ["SLURMD_NODENAME"] = f"n{rank}"
    clock = time.time
    if rank == where:
        if fault == "contribution":
            fabric_probes.contribution = _flipped
        if fault == "result":
            torch.distributed.all_reduce = _flip_after(torch.distributed.all_reduce)
        if fault == "slow":
            fabric_probes._send = _slowly(fabric_probes._send)
        if fault == "clock":
            clock = _ahead
        if fault == "version":
            fabric_probes.platform.python_version = _other_version
    facts = gather_facts(options, ranks, CPU, clock)
    rows = {row.check: row for row in judged(options, facts)}
    return {"rows": rows, "exclude": nodes_to_exclude(rows.values(), [f["node"] for f in facts])}


def _flipped(rank: int, num_elements: int) -> torch.Tensor:
    numbers = fabric_probes.pattern(rank, num_elements)
    numbers[5] ^= 1
    return numbers


def _flip_after(original: Any) -> Any:
    def flip(tensor: torch.Tensor, *args: Any, **options: Any) -> None:
        original(tensor, *args, **options)
        if tensor.dtype == torch.float32:
            tensor[7:8] = (tensor[7:8].view(torch.int32) ^ 1).view(torch.float32)
        elif tensor.numel() > 1:
            tensor[7] ^= 1

    return flip


def _slowly(original: Any) -> Any:
    def send(tensor: torch.Tensor, other: int) -> None:
        time.sleep(0.1)
        original(tensor, other)

    return send


def _ahead() -> float:
    return time.time() + 30.0


def _other_version() -> str:
    return "3.0.0"


def rows_of(options: Options, fault: str = "", where: int = -1, world: int = 3) -> dict[str, Any]:
    answers = run_ranks(check, world, 240, options, fault, where)
    assert all(one == answers[0] for one in answers), "ranks that end with different codes"
    return dict(answers[0])


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(run_root=str(tmp_path / "runs"), scratch=str(tmp_path), disk_mib=2, pair_mib=1)


def test_sound_ranks_pass(options: Options, tmp_path: Path) -> None:
    """A check that cries wolf is switched off."""
    dataset = write_dataset(tmp_path / "data", documents=8, num_train_shards=1)
    expected = {"data_digest": dataset.data_digest,
                "tokenizer_digest": str(dataset.manifest.tokenizer_digest)}  # fmt: skip
    plan = {"needed_gib": 0.01, "checkpoint_bytes": 1 << 20, "ranks": 3, "strategy": "fsdp",
            "keep": 2}  # fmt: skip
    whole = Options(**{**vars(options), "data": dataset.reference, "expected": expected,
                       "plan": plan})  # fmt: skip
    answer = rows_of(whole)
    verdicts = {name: row.verdict for name, row in answer["rows"].items()}
    # Speeds are those of a machine on which other tests run.
    del verdicts["bandwidth"], verdicts["disk scratch"], verdicts["disk run_root"]
    del verdicts["/dev/shm"]
    assert set(verdicts.values()) == {OK}, answer
    assert "3 x 0.00 GiB" in answer["rows"]["checkpoints"].value
    assert not list((tmp_path / "runs").iterdir()), "what it wrote stays behind"


def test_a_wrong_sum_is_found_and_named(options: Options) -> None:
    """One bit of one rank's numbers, or of one rank's result: silent corruption of a run."""
    answer = rows_of(options, "contribution", 2)
    row = answer["rows"]["all-reduce"]
    assert row.verdict == FAIL and row.nodes == ("n2",), row
    assert "the contribution of rank 2 on n2 is wrong in 2 of" in row.advice
    damaged = answer["rows"]["bandwidth"]
    assert damaged.verdict == FAIL and "bytes change between rank 2 on n2" in damaged.advice
    assert answer["exclude"] == ["n2"]
    row = rows_of(options, "result", 1)["rows"]["all-reduce"]
    assert "the result of rank 1 on n1 is wrong in 2 of" in row.advice, row


def test_a_slow_rank_is_named(options: Options) -> None:
    """One bad link makes every step of all ranks slow, and no log says whose it is."""
    answer = rows_of(options, "slow", 1)
    row = answer["rows"]["bandwidth"]
    assert row.verdict == FAIL and row.nodes == ("n1",), row
    assert "rank 1 on n1 and all others" in row.advice and answer["exclude"] == ["n1"]


def test_a_clock_that_is_off_is_named(options: Options) -> None:
    """Leases that two nodes both believe to hold."""
    row = rows_of(options, "clock", 2)["rows"]["clocks"]
    assert (row.verdict, row.nodes) == (FAIL, ("n2",)), row
    assert "the clock of n2 is +30.0 s off" in row.advice


def test_another_version_is_named(options: Options) -> None:
    """A node that was not updated with the others."""
    row = rows_of(options, "version", 1)["rows"]["versions"]
    assert row.advice.startswith("python 3.0.0 on n1 (3."), row


@pytest.fixture
def full_disk(small_disk: Callable[[str], Path]) -> Path:
    return small_disk("1m")


def test_a_full_disk_and_what_does_not_fit(options: Options, full_disk: Path) -> None:
    """The first checkpoint fails, hours later."""
    plan = {"needed_gib": 1e6, "checkpoint_bytes": 1 << 50, "ranks": 2, "strategy": "ddp"}
    changed = Options(**{**vars(options), "scratch": str(full_disk), "plan": plan})
    rows = rows_of(changed, world=2)["rows"]
    assert rows["disk scratch"].verdict == FAIL
    assert f"n0: No space left on device ({full_disk})" in rows["disk scratch"].advice
    assert rows["disk run_root"].verdict in (OK, WARN)
    assert rows["memory"].verdict == FAIL and "needs 1000000.00 of" in rows["memory"].value
    assert rows["checkpoints"].verdict == FAIL
    assert not list(full_disk.iterdir())


def test_data_that_is_not_whole_or_another(options: Options, tmp_path: Path) -> None:
    """A copy to the cluster that missed a shard; the tokenizer of another run."""
    dataset = write_dataset(tmp_path / "data", documents=8, num_train_shards=2)
    other = write_dataset(tmp_path / "other", documents=8, seed=3)
    expected = {"data_digest": other.data_digest, "tokenizer_digest": "0" * 64}
    changed = Options(**{**vars(options), "data": str(tmp_path / "data"), "expected": expected})
    rows = rows_of(changed, world=2)["rows"]
    assert f"but the run trains on {other.data_digest[:12]}" in rows["dataset"].advice
    assert rows["tokenizer"].verdict == FAIL and "expects 000000000000" in rows["tokenizer"].advice
    name = dataset.manifest.shards[0].name
    dataset.shard_path(dataset.manifest.shards[0]).unlink()
    rows = rows_of(changed, world=2)["rows"]
    assert rows["dataset"].verdict == FAIL and f"shards/{name} is missing" in rows["dataset"].advice
    assert rows["dataset"].nodes == ("n0", "n1")
    path = other.storage.local_path(f"tokenizers/{other.manifest.tokenizer_digest}.json")
    assert path is not None
    path.write_bytes(tokenizer_json() + b" ")
    changed = Options(**{**vars(options), "data": str(tmp_path / "other")})
    assert "is another tokenizer" in rows_of(changed, world=2)["rows"]["dataset"].advice


def test_every_pair_once() -> None:
    """A pair that is measured twice at the same time, or never."""
    for count in (2, 3, 4, 7, 8):
        members = list(range(10, 10 + count))
        rounds = rounds_of_pairs(members)
        pairs = [pair for one in rounds for pair in one]
        assert sorted(pairs) == [(a, b) for a in members for b in members if a < b]
        for one in rounds:
            busy = [rank for pair in one for rank in pair]
            assert len(busy) == len(set(busy))
    assert rounds_of_pairs([3]) == [[]]
    assert fabric_probes.members_of_pairs([0, 1] * 40) == list(range(0, 80, 2))


def test_the_head_node_without_scontrol() -> None:
    """Ranks that wait for a node of another name."""
    lists = {"n1": "n1", "n[01-04,7],m3": "n01", "r[3]": "r3", "a-b[2,5]-ib": "a-b2-ib", "": ""}
    assert {text: first_host(text) for text in lists} == lists
    assert first_host("x,y[1-2]") == "x"


def facts_of(nodes: int, **changes: Any) -> list[dict[str, Any]]:
    """What sound ranks of two a node would gather."""
    facts = []
    for rank in range(2 * nodes):
        first = rank % 2 == 0
        disk = {"what": "run_root", "path": "/r", "error": "", "free_bytes": 1 << 40,
                "write_bytes_per_s": 1e9, "fsync_s": 0.1, "read_bytes_per_s": 1e9}  # fmt: skip
        facts.append({
            "rank": rank, "node": f"n{rank // 2}", "local_rank": rank % 2, "local_world_size": 2,
            "device": {"kind": "cuda", "name": "H100", "driver": "driver 1", "count": 2,
                       "memory_bytes": 80 << 30},
            "versions": {"torch": "2"}, "pairs": [], "disks": [disk] if first else [],
            "all_reduce": {"elements": 9, "wrong": 0, "blamed": [], "backend": "nccl"},
            "clock": {"offset_s": 0.0, "rtt_s": 0.0}, "sees_run_root": True if first else None,
            "shm_free_bytes": 8 << 30,
        })  # fmt: skip
    for rank in range(2 * nodes):
        facts[rank]["pairs"] = [
            {"a": rank, "b": b, "bytes_per_s": 1e11 if rank // 2 == b // 2 else 1e10, "wrong": 0}
            for b in range(rank + 1, 2 * nodes)
        ]
    return facts


def rows_for(facts: list[dict[str, Any]], **plan: Any) -> dict[str, Row]:
    return {row.check: row for row in judge(facts, run_root="/r", expected={}, plan=plan)}


def test_verdicts_of_gathered_facts() -> None:
    """A pair between nodes held against one inside; a bad pair whose ranks are fine otherwise; a
    rule that takes every node out."""
    facts = facts_of(3)
    assert {row.verdict for row in rows_for(facts).values()} <= {OK, "-"}
    facts[1]["pairs"][2]["bytes_per_s"] = 4e9
    row = rows_for(facts)["bandwidth"]
    assert (row.verdict, row.nodes) == (WARN, ()) and "ranks 1 (n0) and 4 (n2): 40%" in row.advice
    facts = facts_of(3)
    facts[2]["sees_run_root"] = False
    facts[4]["device"]["count"] = 1
    rows = rows_for(facts)
    assert rows["run_root shared"].nodes == ("n1",) and rows["devices"].nodes == ("n2",)
    assert nodes_to_exclude(rows.values(), ["n0", "n1", "n2"]) == ["n1", "n2"]
    for one in facts:
        one["sees_run_root"] = False
    rows = rows_for(facts)
    assert nodes_to_exclude(rows.values(), ["n0", "n1", "n2"]) == ["n2"]
    facts[4]["device"]["driver"] = "driver 2"
    assert rows_for(facts)["devices"].verdict == FAIL
    facts[4]["device"]["count"] = 2
    assert rows_for(facts)["devices"].verdict == WARN
    text = table_text(list(rows.values()))
    assert text.splitlines()[0].startswith("fail  devices")
    assert json.dumps([vars(row) for row in rows.values()])
    assert rows_for(facts, error="config refused")["memory"].advice == "config refused"


def test_a_disk_that_fails_while_it_is_read() -> None:
    """An exception of one node that leaves the others in a collective."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "file").write_text("")
        found = probe_folder("scratch", Path(place) / "file" / "x", 1)
    assert "Not a directory" in found["error"]
