"""Whether two runs are one and the same: their files and tensors, compared bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dist.checkpoint import find_checkpoint


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint: weights and optimizer state, unsharded."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    found, _ = find_checkpoint(folder / "checkpoints")
    assert found is not None
    path = folder / "unsharded.pt"
    dcp_to_torch_save(found, path)
    state = torch.load(path)
    flat = {f"{part}.{name}": value for part in state for name, value in state[part].items()}
    assert any(name.startswith("optimizer.") for name in flat) and len(flat) > 20
    return flat


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    found = []
    for line in (folder / name).read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # torn by the kill
    return found


def last_attempts(folder: Path, name: str, *keys: str) -> list[tuple[Any, ...]]:
    """A log by step, the last attempt of a step counting."""
    by_step = {line["step"]: line for line in lines(folder, name) if all(k in line for k in keys)}
    return [tuple(by_step[step][k] for k in ("step", *keys)) for step in sorted(by_step)]


def assert_same_run(folder: Path, whole: Path) -> None:
    """Bit for bit: weights, optimizer, what was consumed, and every loss."""
    one, other = tensors(folder), tensors(whole)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"differ: {different[:5]} ({len(different)} of {len(one)})"
    keys = ("t0", "t1", "batch", "targets")
    consumed = last_attempts(folder, "consumed.jsonl", *keys)
    assert consumed == last_attempts(whole, "consumed.jsonl", *keys)
    losses = last_attempts(folder, "metrics.jsonl", "loss")
    assert losses == last_attempts(whole, "metrics.jsonl", "loss")
