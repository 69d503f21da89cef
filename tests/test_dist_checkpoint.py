"""dist/checkpoint.py: what is saved comes back on any ranks, and nothing damaged is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch.distributed.tensor import DTensor

from dist.checkpoint import (
    COMMIT,
    check_files,
    check_same_run,
    checkpoint_name,
    find_checkpoint,
    keep_newest,
    load_checkpoint,
    read_record,
    save_checkpoint,
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


def make(strategy: str, seed: int) -> tuple[llama.PackedLlama, torch.optim.Optimizer]:
    model = llama.build(CONFIG, SCHEMA)
    if strategy == "fsdp":
        shard_fsdp(model, llama.blocks(model), data_mesh(CPU), Precision(name="fp32", reason=""))
    materialise(model, CPU, seed, 0.02)
    return model, adamw(model.named_parameters(), OptimConfig(lr=1e-2))


def whole(model: llama.PackedLlama, optimizer: torch.optim.Optimizer) -> TENSORS:
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


def place(root: Path, files: dict[str, bytes], *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        for file, data in files.items():
            (root / name / file).write_bytes(data)


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
    keep_newest(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-2-a0", "step-3-a0", "step-4-a0"]


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
