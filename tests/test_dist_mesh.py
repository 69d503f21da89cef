"""dist/mesh.py: errors are reported once, and one rank needs no port."""

from __future__ import annotations

import pytest
import torch
import torch.distributed

from dist.errors import DataRefused, SetupError
from dist.mesh import PeerFailed, on_rank_zero, start_process_group, stop_process_group
from dist.ranks import Ranks
from tests.run_ranks import RankFailed, run_ranks

CPU = torch.device("cpu")


def ask_rank_zero(fail: bool) -> tuple[str, object]:
    def work() -> int:
        if fail:
            raise DataRefused("the shard is damaged")
        return 40 + torch.distributed.get_rank()

    try:
        return "ok", on_rank_zero(work)
    except Exception as error:
        return type(error).__name__, (str(error), getattr(error, "exit_code", None))


def test_rank_zero_decides_for_all() -> None:
    """Ranks that each resolve LATEST could train on two versions; an error on rank 0 alone would
    leave the others waiting."""
    assert run_ranks(ask_rank_zero, 3, 240, False) == [("ok", 40)] * 3
    zero, *others = run_ranks(ask_rank_zero, 3, 240, True)
    assert zero == ("DataRefused", ("the shard is damaged", 3))
    assert others == [(PeerFailed.__name__, ("rank 0: the shard is damaged", 3))] * 2


def test_one_rank_needs_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m recipes.pretrain` on a machine whose port 29500 is taken must work."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    start_process_group(Ranks(), CPU)
    try:
        assert torch.distributed.get_world_size() == 1
        start_process_group(Ranks(), CPU)  # a second call joins the same world
    finally:
        stop_process_group()
    stop_process_group()


def test_several_ranks_without_an_address_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting half an hour for ranks that nobody started helps no one."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(SetupError, match="MASTER_ADDR"):
        start_process_group(Ranks(rank=0, world_size=2, local_world_size=2), CPU)


def first_failure(which: int) -> None:
    if torch.distributed.get_rank() == which:
        raise ValueError("mine")
    torch.distributed.barrier()


def test_run_ranks_names_the_first_failing_rank() -> None:
    """The peers' connection errors must not hide the rank that caused them."""
    with pytest.raises(RankFailed, match=r"rank 1 of 3 failed first: ValueError\('mine'\)"):
        run_ranks(first_failure, 3, 240, 1)


def wait_for_ever() -> None:
    if torch.distributed.get_rank() == 0:
        torch.distributed.barrier()


def test_run_ranks_turns_a_hang_into_a_timeout() -> None:
    """A hang must end the test and name the silent rank. Rank 1 has ended by then."""
    with pytest.raises((TimeoutError, RankFailed), match=r"rank(s \[0\]| 0)"):
        run_ranks(wait_for_ever, 2, 15)
