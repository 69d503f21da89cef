"""dist/checkpoint.py: what is saved comes back on any ranks, and nothing damaged is loaded."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed
from torch.distributed.tensor import DTensor

import dist.checkpoint
from dist.checkpoint import (
    CheckpointSaver,
    SaveFailed,
    check_files,
    check_same_run,
    checkpoint_name,
    find_checkpoint,
    load_checkpoint,
    read_record,
    save_checkpoint,
)
from dist.checkpoint_files import HashedFiles
from dist.checkpoint_folder import (
    COMMIT,
    delete_checkpoint,
    newer_than,
    remove_leftovers,
    retire,
    write_commit,
)
from dist.errors import ConfigError
from dist.initialise import materialise
from dist.mesh import data_mesh
from dist.optim import OptimConfig, adamw
from dist.precision import Precision
from dist.sharding import shard_fsdp
from recipes import llama
from tests.make_dataset import flip_byte
from tests.run_ranks import run_ranks
from tests.test_dist_attention import CONFIG, SCHEMA, packed_and_padded

CPU = torch.device("cpu")
TENSORS = dict[str, torch.Tensor]


def make(strategy: str, seed: int) -> tuple[llama.PackedDecoder, torch.optim.Optimizer]:
    model = llama.build(CONFIG, SCHEMA)
    if strategy == "fsdp":
        shard_fsdp(model, llama.blocks(model), data_mesh(CPU), Precision(name="fp32", reason=""))
    materialise(model, CPU, seed, 0.02)
    return model, adamw(model.named_parameters(), OptimConfig(lr=1e-2))


def whole(model: llama.PackedDecoder, optimizer: torch.optim.Optimizer) -> TENSORS:
    found: TENSORS = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            found[f"{name}.{key}"] = value
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).clone()
        for name, t in found.items()
    }


def train_and_save(strategy: str, folder: Path) -> TENSORS:
    model, optimizer = make(strategy, seed=1)
    batch, _ = packed_and_padded()
    for _ in range(2):
        (model(batch) / 40).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = whole(model, optimizer)
    with torch.no_grad():
        model(batch)  # as after a validation: FSDP's root holds gathered parameters
    save_checkpoint(folder, model, optimizer, {"step": 2})
    return state


def load(strategy: str, folder: Path) -> TENSORS:
    model, optimizer = make(strategy, seed=2)
    rate = optimizer.param_groups[0]["lr"]
    load_checkpoint(folder, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == rate
    assert all(parameter.grad is None for parameter in model.parameters())
    return whole(model, optimizer)


@pytest.mark.parametrize(
    ("saver", "ranks", "loader", "other_ranks"),
    [("fsdp", 2, "fsdp", 2), ("fsdp", 3, "ddp", 1), ("ddp", 2, "fsdp", 3), ("ddp", 1, "ddp", 2)],
)
def test_comes_back_on_any_ranks(
    tmp_path: Path, saver: str, ranks: int, loader: str, other_ranks: int
) -> None:
    """A shard restored to the wrong place, or fresh optimizer moments, would show here."""
    folder = tmp_path / checkpoint_name(2, 0)
    saved = run_ranks(train_and_save, ranks, 240, saver, folder)[0]
    assert check_files(folder) == "" and read_record(folder) == {"step": 2}
    for loaded in run_ranks(load, other_ranks, 240, loader, folder):
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)


@pytest.fixture(scope="module")
def saved_bytes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("c") / "step-1-a0"
    train_and_save("none", folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def place(root: Path, files: dict[str, bytes], *names: str, loss: float | None = None) -> None:
    """Checkpoints of other names with the same tensors."""
    for name in names:
        (root / name).mkdir(parents=True)
        for file, data in files.items():
            (root / name / file).write_bytes(data)
        write_commit(root / name, json.loads(files[COMMIT])["files"], loss)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "uncommitted", "torn commit"])
@pytest.mark.parametrize("which", ["__0_0.distcp", ".metadata", "state.json"])
def test_damage_is_passed_over(
    tmp_path: Path, saved_bytes: dict[str, bytes], damage: str, which: str
) -> None:
    """Loading a damaged checkpoint, or unpickling a damaged .metadata, is worse than an older
    one; the log must say which was left and why."""
    place(tmp_path, saved_bytes, "step-5-a0", "step-10-a0")
    path = tmp_path / "step-10-a0" / which
    if damage == "flip":
        flip_byte(path, len(path.read_bytes()) // 2)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "delete":
        path.unlink()
    elif damage == "uncommitted":
        (tmp_path / "step-10-a0" / COMMIT).unlink()
    else:
        (tmp_path / "step-10-a0" / COMMIT).write_bytes(b'{"format_version": 1, "fil')
    found, passed_over = find_checkpoint(tmp_path)
    assert found == tmp_path / "step-5-a0"
    assert len(passed_over) == 1 and passed_over[0].startswith("step-10-a0: ")
    if damage in ("flip", "truncate", "delete"):
        assert which in passed_over[0]


def test_newest_is_by_attempt_then_step(tmp_path: Path, saved_bytes: dict[str, bytes]) -> None:
    """As text, step-9 is after step-10; and attempt 2 goes on from what attempt 1 left."""
    place(tmp_path, saved_bytes, "step-9-a0", "step-10-a0")
    assert find_checkpoint(tmp_path)[0] == tmp_path / "step-10-a0"
    place(tmp_path, saved_bytes, "step-8-a2")
    (tmp_path / "step-99-a7.tmp").mkdir()
    assert find_checkpoint(tmp_path)[0] == tmp_path / "step-8-a2"
    assert find_checkpoint(tmp_path / "none") == (None, [])


def test_retention_counts_only_committed_ones(
    tmp_path: Path, saved_bytes: dict[str, bytes]
) -> None:
    """Half-written newer folders must not push the last good one out."""
    place(tmp_path, saved_bytes, *(f"step-{s}-a0" for s in (1, 2, 3, 4)))
    (tmp_path / "step-4-a0" / COMMIT).unlink()
    retire(tmp_path, 2)
    assert names(tmp_path) == ["step-2-a0", "step-3-a0", "step-4-a0"]


def test_best_ones_stay_out_of_turn(tmp_path: Path, saved_bytes: dict[str, bytes]) -> None:
    """The best model of a run that overfits is gone after `keep` saves; one that was not
    validated has no loss to rank by."""
    losses = {1: 3.0, 2: 1.0, 3: None, 4: float("nan"), 5: 2.0, 6: 4.0}
    for step, loss in losses.items():
        place(tmp_path, saved_bytes, f"step-{step}-a0", loss=loss)
    assert retire(tmp_path, 1, 2) == ["step-4-a0", "step-3-a0", "step-1-a0"]
    assert names(tmp_path) == ["step-2-a0", "step-5-a0", "step-6-a0"]
    assert retire(tmp_path, 0) == ["step-5-a0", "step-2-a0"]  # the newest stays whatever is asked
    assert names(tmp_path) == ["step-6-a0"]


def test_damaged_ones_never_push_a_valid_one_out(
    tmp_path: Path, saved_bytes: dict[str, bytes]
) -> None:
    """Resumed from step 2, as 3 and 4 are damaged: counted, they would let 2 be deleted."""
    place(tmp_path, saved_bytes, *(f"step-{s}-a0" for s in (1, 2, 3, 4)))
    for step in (3, 4):
        flip_byte(tmp_path / f"step-{step}-a0" / "state.json", 9)
    found, passed_over = find_checkpoint(tmp_path)
    assert found == tmp_path / "step-2-a0" and len(passed_over) == 2
    damaged = newer_than(tmp_path, found, 1)
    place(tmp_path, saved_bytes, "step-3-a1")
    assert newer_than(tmp_path, found, 1) == damaged == {"step-3-a0", "step-4-a0"}
    retire(tmp_path, 2, ignore=damaged)
    assert names(tmp_path) == ["step-2-a0", "step-3-a0", "step-3-a1", "step-4-a0"]


def test_half_deleted_is_no_checkpoint(
    tmp_path: Path, saved_bytes: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the files: a folder that still has its commit would be tried first."""
    place(tmp_path, saved_bytes, "step-1-a0")
    monkeypatch.setattr(shutil, "rmtree", lambda path: (path / "state.json").unlink())
    delete_checkpoint(tmp_path / "step-1-a0")
    assert find_checkpoint(tmp_path)[1] == ["step-1-a0: no COMMIT.json, so it was never finished"]


def test_leftovers_of_dead_attempts_only(tmp_path: Path, saved_bytes: dict[str, bytes]) -> None:
    """The folder that this attempt is writing has no commit yet either."""
    place(tmp_path, saved_bytes, "step-1-a0", "step-2-a0", "step-3-a1")
    for name in ("step-2-a0", "step-3-a1"):
        (tmp_path / name / COMMIT).unlink()
    (tmp_path / "notes").mkdir()
    assert remove_leftovers(tmp_path, 1) == ["step-2-a0"]
    assert names(tmp_path) == ["notes", "step-1-a0", "step-3-a1"]


def test_any_flipped_bit_of_the_commit_shows(tmp_path: Path, saved_bytes: dict[str, bytes]) -> None:
    """It says what the other files must be, so a flip in the loss or a step must show in it."""
    place(tmp_path, saved_bytes, "step-5-a0", loss=1.25)
    path = tmp_path / "step-5-a0" / COMMIT
    good = path.read_bytes()
    for position in range(len(good)):
        flip_byte(path, position)
        assert check_files(path.parent) != "", good[position - 20 : position + 1]
        path.write_bytes(good)
    assert check_files(path.parent) == ""
    path.parent.rename(tmp_path / "step-9-a9")
    assert find_checkpoint(tmp_path) == (None, [
        "step-9-a9: COMMIT.json is that of step-5-a0; was the folder renamed?"
    ])  # fmt: skip


def test_training_goes_on_while_files_are_written(tmp_path: Path) -> None:
    """Tensors that are written as they are, not as they were at the step, mix two steps."""
    model, optimizer = make("none", seed=1)
    (model(packed_and_padded()[0]) / 40).backward()
    optimizer.step()
    expected = whole(model, optimizer)
    release, writing = threading.Event(), threading.Event()
    original = HashedFiles.create_stream

    def held(self: HashedFiles, *args: Any) -> Any:
        writing.set()
        assert release.wait(60)
        return original(self, *args)

    saver, folder = CheckpointSaver(CPU), tmp_path / "step-1-a0"
    with mock.patch.object(HashedFiles, "create_stream", held):
        saver.start(folder, model, optimizer, {"step": 1})
        assert writing.wait(60)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        assert saver.wait(0.0) is None and find_checkpoint(tmp_path)[0] is None
        release.set()
        saved = saver.wait()
    assert saved is not None and saved.failure == "" and saver.wait() is None
    other, other_optimizer = make("none", seed=2)
    load_checkpoint(folder, other, other_optimizer)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, expected[name])
    # The second save reuses the buffers: of the newer values, in another folder.
    saver.start(tmp_path / "step-2-a0", model, optimizer, {"step": 2})
    assert (second := saver.wait()) is not None and second.failure == ""
    load_checkpoint(tmp_path / "step-2-a0", other, other_optimizer)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, expected[name] + 1.0)


def save_beside_collectives(root: Path) -> tuple[TENSORS, list[str]]:
    """Saves in the background while the main thread reduces on the world's group; then rank 1's
    disk is full, then rank 0's at the commit, then all is well."""
    model, optimizer = make("fsdp", seed=1)
    batch, _ = packed_and_padded()
    (model(batch) / 40).backward()
    optimizer.step()
    state = whole(model, optimizer)
    saver, rank, failures = CheckpointSaver(CPU), torch.distributed.get_rank(), []

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"disk-of-rank-{rank}")

    faults = [None, (1, HashedFiles, "create_stream"), (0, dist.checkpoint, "write_commit"), None]
    for step, fault in enumerate(faults, start=1):
        with ExitStack() as stack:
            if fault is not None and fault[0] == rank:
                stack.enter_context(mock.patch.object(fault[1], fault[2], full))
            saver.start(root / checkpoint_name(step, 0), model, optimizer, {"step": step})
            for _ in range(50):
                torch.distributed.all_reduce(torch.ones(1000))
            saved = saver.wait()
        assert saved is not None
        failures.append(saved.failure)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0 if fault is None else 0.5)
    return state, failures


def test_ranks_agree_that_a_save_failed(tmp_path: Path) -> None:
    """One rank that goes on alone to the next collective hangs all; a folder of a failed save
    that stays fills the disk further."""
    outcomes = run_ranks(save_beside_collectives, 2, 240, tmp_path)
    state, failures = outcomes[0]
    assert [failures] * 2 == [failures for _, failures in outcomes]
    space, todo = os.strerror(errno.ENOSPC), "make room, or name a place on another disk"
    assert failures == [
        "",
        f"step-2-a0 could not be saved: rank 1: {space} (disk-of-rank-1); {todo}",
        f"step-3-a0 could not be saved: rank 0: {space} (disk-of-rank-0); {todo}",
        "",
    ]
    assert names(tmp_path) == ["step-1-a0", "step-4-a0"]
    assert check_files(tmp_path / "step-4-a0") == ""
    for loaded in run_ranks(load, 1, 240, "ddp", tmp_path / "step-1-a0"):
        assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """A folder of this name may be somebody's checkpoint, or half of one."""
    model, optimizer = make("none", seed=1)
    (tmp_path / "step-1-a0").mkdir()
    with pytest.raises(SaveFailed, match=r"step-1-a0 could not be saved: rank 0: File exists"):
        save_checkpoint(tmp_path / "step-1-a0", model, optimizer, {})
    save_checkpoint(tmp_path / "step-2-a0", model, optimizer, {})
    with pytest.raises(SaveFailed, match="File exists"):
        save_checkpoint(tmp_path / "step-2-a0", model, optimizer, {})
    assert check_files(tmp_path / "step-2-a0") == ""


def test_commit_lists_every_file(saved_bytes: dict[str, bytes]) -> None:
    """A file outside the commit could be damaged unseen."""
    listed = json.loads(saved_bytes[COMMIT])["files"]
    assert set(listed) == set(saved_bytes) - {COMMIT}


def test_changed_settings_are_named_with_both_values() -> None:
    """Resuming another model into a run would ruin it; changing the cadence must be free."""
    saved = {"model": {"num_layers": 4}, "max_steps": 10, "parallel": {"strategy": "ddp"}}
    now = {"model": {"num_layers": 5}, "max_steps": 20, "parallel": {"strategy": "fsdp"}}
    may = ("max_steps", "parallel")
    check_same_run(saved, {**now, "model": {"num_layers": 4}}, may, "the run x")
    with pytest.raises(ConfigError, match=r"the run x .*model\.num_layers was 4, is 5"):
        check_same_run(saved, now, may, "the run x")


def test_a_key_younger_than_the_run_had_its_default() -> None:
    """A run of an older Leyden could not be resumed after an upgrade that added an option."""
    saved, now = {"seed": 1}, {"seed": 1, "compile": "off"}
    check_same_run(saved, now, (), "the run x", defaults={"seed": 0, "compile": "off"})
    with pytest.raises(ConfigError, match=r"compile was 'off', is 'blocks'"):
        check_same_run(saved, {**now, "compile": "blocks"}, (), "the run x", {"compile": "off"})
