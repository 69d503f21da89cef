"""The guard in real runs: one bad micro-batch on one rank, and each policy on all of them."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dist.audit import replay, who_saw
from dist.bundle import read_bundle, replay_bundle
from dist.dataset import Dataset, open_dataset
from dist.errors import ConfigError, DataRefused
from dist.guard import GuardConfig
from dist.order import Order
from dist.run_dir import RunDir
from dist.skips import Skips
from launch import audit as launch_audit
from tests.make_dataset import write_dataset
from tests.rank_processes import World, train
from tests.same_run import assert_same_run, lines, tensors

BAD_STEP = 5
STEPS = 9


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), documents=200, num_train_shards=2)


def poison(
    rank: int, victim: int, steps: tuple[int, ...], factor: float, lag: int | None = None,
    stop_in: int = -1, bad_row: int = -1,
) -> None:  # fmt: skip
    """Multiply a micro-batch's loss on one rank: at given steps, or wherever a row is met."""
    import dist.guard
    from recipes import llama

    original = llama.PackedDecoder.forward
    if lag is not None:
        init = dist.guard.Guard.__init__

        def lagging(self: Any, *args: Any, **more: Any) -> None:
            init(self, *args, **{**more, "lag": lag})

        dist.guard.Guard.__init__ = lagging  # type: ignore[method-assign]

    def forward(self: Any, batch: Any) -> torch.Tensor:
        loss = original(self, batch)
        if not self.training:
            return loss
        if rank == 0 and batch.step == stop_in:
            os.kill(os.getpid(), signal.SIGTERM)
        here = rank == victim and batch.step in steps and batch.micro == 1
        return loss * factor if here or bad_row in batch.rows.tolist() else loss

    llama.PackedDecoder.forward = forward  # type: ignore[method-assign]


def never_applied(rank: int, calls: tuple[int, ...]) -> None:
    """The reference: AdamW steps of these numbers are undone by copies, without any guard."""
    original = torch.optim.AdamW.step
    count = [0]

    def step(self: Any, closure: Any = None) -> Any:
        count[0] += 1
        if count[0] - 1 not in calls:
            return original(self, closure)
        held = [p for group in self.param_groups for p in group["params"]]
        weights = [p.detach().clone() for p in held]
        states = [{k: v.clone() for k, v in self.state[p].items()} for p in held]
        made = original(self, closure)
        with torch.no_grad():
            for p, weight, state in zip(held, weights, states, strict=True):
                p.copy_(weight)
                for key, value in state.items():
                    self.state[p][key].copy_(value)
        return made

    torch.optim.AdamW.step = step  # type: ignore[method-assign]


def settings(strategy: str, policy: str, **guard: Any) -> dict[str, Any]:
    made = GuardConfig(policy=policy, **guard)  # type: ignore[arg-type]
    return {"strategy": strategy, "guard": made, "max_steps": STEPS, "save_every_steps": 2}


def same_weights(folder: Path, whole: Path) -> bool:
    one, other = tensors(folder), tensors(whole)
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_raise_ends_all_ranks_and_leaves_a_bundle(
    dataset: Dataset, tmp_path: Path, strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN raised on one rank alone leaves the others waiting for half an hour; a checkpoint
    saved after it would be poisoned; a bundle with other rows than the model's is worthless."""
    url, folder = dataset.storage.url, tmp_path / "run"
    changes = settings(strategy, "raise")
    with World(url, folder, 2, changes, poison, 1, (BAD_STEP,), math.nan) as world:
        assert world.wait() == [93, 93], world.said(0)
        said = world.said(0)
    assert "Traceback" not in said and f"step {BAD_STEP}: loss is not finite" in said
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["status"] == "no_restart" and f"step {BAD_STEP}" in outcome["error"]
    assert {p.name for p in (folder / "checkpoints").iterdir()} <= {"step-2-a0", "step-4-a0"}
    bundle = folder / "guard" / f"step-{BAD_STEP}"
    record = read_bundle(bundle)
    assert (record["step"], record["loss"], record["world_size"]) == (BAD_STEP, "nan", 2)
    # The poisoned micro-batch is named: rank 1, micro-batch 1.
    losses = [one["losses"] for one in record["ranks"]]
    assert losses[1][1] == "nan" and all(isinstance(x, float) for x in [*losses[0], losses[1][0]])
    # Two independent ways to the same rows.
    found = replay_bundle(bundle)
    assert found.rows == replay(RunDir(folder), BAD_STEP).rows
    assert len(found.rows) == 8 and all(row.pieces[0].text for row in found.rows)
    assert launch_audit.replay([str(folder), "--bundle", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert "loss is not finite" in shown and f"train:{found.rows[0].row}" in shown


@pytest.mark.parametrize(("strategy", "lag"), [("ddp", 0), ("fsdp", 1)])
def test_skip_equals_a_run_that_never_applied_the_update(
    dataset: Dataset, tmp_path: Path, strategy: str, lag: int
) -> None:
    """NaN in a moment, Adam's count or weight decay: each would show in a bit at the end."""
    url = dataset.storage.url
    changes = settings(strategy, "skip")
    calls = (2, BAD_STEP)
    assert train(url, tmp_path / "run", 2, changes, poison, 1, calls, math.nan, lag) == [0, 0]
    off = settings(strategy, "off")
    assert train(url, tmp_path / "whole", 2, off, never_applied, calls) == [0, 0]
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert train(url, tmp_path / "all", 2, off) == [0, 0]
    assert not same_weights(tmp_path / "run", tmp_path / "all")
    events = [e for e in lines(tmp_path / "run", "ledger.jsonl") if e["event"] == "bad_step"]
    assert [event["step"] for event in events] == list(calls)
    # The data and the learning rate went on.
    for name in ("consumed.jsonl", "metrics.jsonl"):
        assert [line["step"] for line in lines(tmp_path / "run", name)][:STEPS] == [
            line["step"] for line in lines(tmp_path / "whole", name)
        ][:STEPS]
    rates = [
        [line["lr"] for line in lines(tmp_path / one, "metrics.jsonl") if "lr" in line]
        for one in ("run", "whole")
    ]
    assert rates[0] == rates[1]


def test_skips_without_end_are_an_error(dataset: Dataset, tmp_path: Path) -> None:
    """A run whose every step is skipped trains nothing and looks healthy."""
    changes = settings("ddp", "skip", max_skips=3)
    args = (poison, 1, tuple(range(2, 9)), math.inf)
    with World(dataset.storage.url, tmp_path / "run", 2, changes, *args) as world:
        assert world.wait() == [93, 93]
        assert "3 skipped steps within 100" in world.said(0)
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert "step 4" in outcome["error"]


def test_a_resumed_guard_judges_like_an_uninterrupted_one(dataset: Dataset, tmp_path: Path) -> None:
    """The history of norms is lost on resume: the spike soon after it goes into the weights."""
    url = dataset.storage.url
    changes = {**settings("fsdp", "skip", spike_factor=4.0), "max_steps": 28, "save_every_steps": 0}
    spikes = (18, 24)
    assert train(url, tmp_path / "whole", 2, changes, poison, 1, spikes, 1e4) == [0, 0]
    stopped = train(url, tmp_path / "run", 2, changes, poison, 1, spikes, 1e4, None, 19)
    assert stopped == [75, 75]
    assert train(url, tmp_path / "run", 2, changes, poison, 1, spikes, 1e4) == [0, 0]
    for name in ("whole", "run"):
        events = [e for e in lines(tmp_path / name, "ledger.jsonl") if e["event"] == "bad_step"]
        assert [event["step"] for event in events] == list(spikes)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(("strategy", "lag"), [("ddp", 1), ("fsdp", 0)])
def test_rollback_leaves_the_bad_rows_out_and_finishes(
    dataset: Dataset, tmp_path: Path, strategy: str, lag: int
) -> None:
    """The same rows again after going back: NaN for ever. Or others lost, or met twice."""
    url, folder = dataset.storage.url, tmp_path / "run"
    data = open_dataset(url)
    num_rows = data.split("train").num_rows
    bad_row = int(Order(num_rows, 0).rows(8 * BAD_STEP + 3, 8 * BAD_STEP + 4)[1][0])
    changes = settings(strategy, "rollback")
    args = (poison, -1, (), math.nan, lag, -1, bad_row)
    assert train(url, folder, 2, changes, *args) == [0, 0]
    outcome = json.loads((folder / "outcome.json").read_text())
    assert (outcome["status"], outcome["attempt"], outcome["step"]) == ("completed", 1, STEPS)
    first = json.loads((folder / "attempts" / "0" / "outcome.json").read_text())
    assert first["rolled_back"] and f"step {BAD_STEP}" in first["reason"]
    # From the checkpoint before the bad step on, in the order without its 8 rows.
    second = lines(folder, "order.jsonl")[1]
    assert (second["step0"], second["skipped"]) == (4, [[8 * BAD_STEP, 8 * BAD_STEP + 8]])
    run = RunDir(folder)
    expected = Order(num_rows, 0).rows(0, 8 * (STEPS + 1))[1]
    left = Skips(second["skipped"]).to_stream(torch.arange(8 * STEPS).numpy())
    replayed = [row.row for step in range(STEPS) for row in replay(run, step, text=False).rows]
    assert replayed == expected[left].tolist()
    assert not who_saw(run, f"train:{bad_row}", epochs=1, progress=False).sightings
    # Until the bad step both attempts are the same run: saved state is exact.
    by_attempt: dict[int, dict[int, float]] = {0: {}, 1: {}}
    for line in lines(folder, "metrics.jsonl"):
        if "loss" in line:
            by_attempt[line["attempt"]][line["step"]] = line["loss"]
    assert by_attempt[1][5] == by_attempt[0][5]
    assert all(math.isfinite(loss) for loss in by_attempt[1].values())


def test_rollbacks_are_bounded(dataset: Dataset, tmp_path: Path) -> None:
    """A step that is bad on any data makes a run go back for ever."""
    changes = settings("ddp", "rollback", max_rollbacks=2)
    args = (poison, 1, (BAD_STEP,), math.nan)
    with World(dataset.storage.url, tmp_path / "run", 2, changes, *args) as world:
        assert world.wait() == [93, 93]
        assert "it went back 2 times" in world.said(0)
    assert len(list((tmp_path / "run" / "attempts").iterdir())) == 3


def test_a_bundle_that_was_edited_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    """Text of other rows than the guard named would send a person after the wrong document."""
    with pytest.raises(ConfigError, match="no repro bundle"):
        read_bundle(tmp_path)
    (tmp_path / "bundle.json").write_text("{}")
    with pytest.raises(DataRefused, match="not a repro bundle"):
        read_bundle(tmp_path)
    row = {"t": 0, "epoch": 0, "rank": 0, "micro": 0, "index": 0, "row": 1, "pieces": [],
           "shard": dataset.split("train").shards[0].name, "row_in_shard": 0}  # fmt: skip
    facts = {"format": 1, "data": dataset.reference, "step": 0, "attempt": 0, "t0": 0, "t1": 1,
             "world_size": 1, "rows": [row]}  # fmt: skip
    (tmp_path / "bundle.json").write_text(json.dumps(facts))
    with pytest.raises(DataRefused, match="elsewhere"):
        replay_bundle(tmp_path)
