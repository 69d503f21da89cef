"""Checkpoints by torch's distributed checkpoint (DCP), valid only once COMMIT.json is there.

    checkpoints/step-<n>-a<attempt>/
        __<rank>_*.distcp, .metadata    parameters and optimizer state, one file or more a rank
        state.json                      step, order, scheduler, seeds, data digest, config
        COMMIT.json                     every file's size and SHA-256; written last, atomically

Tensors are keyed by parameter name, so a checkpoint loads on any number of ranks and under ddp
as under fsdp.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dist.errors import ConfigError
from dist.local_files import write_atomic
from dist.mesh import on_rank_zero

FORMAT_VERSION = 1
COMMIT = "COMMIT.json"
STATE = "state.json"
_NAME = re.compile(r"step-(\d+)-a(\d+)")


def checkpoint_name(step: int, attempt: int) -> str:
    return f"step-{step}-a{attempt}"


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, record: dict[str, Any]
) -> None:
    """Write a complete checkpoint; all ranks call it. `record` is JSON, the same on all ranks.

    Model parameters are saved in fp32 as they are held, each rank its own part.
    """
    rank, world_size = _rank_and_world()
    state = {"model": _model_tensors(model), "optimizer": _optimizer_tensors(model, optimizer)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP warns about its own no_dist default
        dcp.save(state, checkpoint_id=folder, no_dist=world_size == 1)
    # Each rank hashes what it wrote, while it is still in the page cache.
    mine = [path for path in folder.iterdir() if path.name.startswith(f"__{rank}_")]
    if rank == 0:
        write_atomic(folder / STATE, json.dumps(record, indent=1, sort_keys=True).encode())
        mine += [folder / STATE, folder / ".metadata"]
    files = _hash_files(mine)
    everyone: list[Any] = [files]
    if world_size > 1:
        everyone = [None] * world_size
        torch.distributed.all_gather_object(everyone, files)

    def commit() -> None:
        listed = {name: facts for files in everyone for name, facts in files.items()}
        text = {"format_version": FORMAT_VERSION, "files": listed}
        write_atomic(folder / COMMIT, json.dumps(text, indent=1, sort_keys=True).encode())

    on_rank_zero(commit)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read a checkpoint's tensors into a model and its optimizer; all ranks call it.

    The caller has checked the files (find_checkpoint does): `.metadata` is a pickle.
    """
    _, world_size = _rank_and_world()
    _make_optimizer_state(optimizer)
    state = {"model": _model_tensors(model), "optimizer": _optimizer_tensors(model, optimizer)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Tensors are filled in place: these are the model's and the optimizer's own.
        dcp.load(state, checkpoint_id=folder, no_dist=world_size == 1)


def read_record(folder: Path) -> dict[str, Any]:
    """The JSON record of a checkpoint."""
    return dict(json.loads((folder / STATE).read_bytes()))


def find_checkpoint(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint and, for each newer one passed over, why.

    Newest: the highest step of the highest attempt, as an attempt goes on from what the earlier
    ones left. Valid: COMMIT.json is there and every file has its size and digest.
    """
    passed_over: list[str] = []
    for folder in _by_age(checkpoints):
        problem = check_files(folder)
        if not problem:
            return folder, passed_over
        passed_over.append(f"{folder.name}: {problem}")
    return None, passed_over


def check_files(folder: Path) -> str:
    """What makes a checkpoint invalid, '' if nothing does. Reads every byte."""
    try:
        commit = json.loads((folder / COMMIT).read_bytes())
    except FileNotFoundError:
        return f"no {COMMIT}, so it was never finished"
    except ValueError:
        return f"{COMMIT} is not JSON"
    if commit.get("format_version") != FORMAT_VERSION:
        return f"format version {commit.get('format_version')!r}, this Leyden has {FORMAT_VERSION}"
    for name, facts in commit["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}"
    found = _hash_files(folder / name for name in commit["files"])
    damaged = [name for name, facts in found.items() if facts != commit["files"][name]]
    return f"another SHA-256: {', '.join(sorted(damaged))}" if damaged else ""


def keep_newest(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep` committed checkpoints and whatever is older than them."""
    committed = 0
    for folder in _by_age(checkpoints):
        if committed >= keep:
            # Without its commit first: a half-deleted checkpoint must not look like one.
            (folder / COMMIT).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        committed += (folder / COMMIT).exists()


def check_same_run(
    saved: dict[str, Any], now: dict[str, Any], may_change: Iterable[str], run: str
) -> None:
    """Refuse to resume with other settings than the run's, by name and both values.

    `may_change` holds dotted keys; one of a group lets the whole group change.
    """
    old, new = _flatten(saved), _flatten(now)
    allowed = tuple(may_change)
    changed = [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
        and not any(key == name or key.startswith(f"{name}.") for name in allowed)
    ]
    if changed:
        raise ConfigError(
            f"{run} was started with other settings: {'; '.join(changed)}. Give it the old ones, "
            "or start another run (another --run, or --fresh)"
        )


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _by_age(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, committed or not, newest first."""
    found = []
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if match := _NAME.fullmatch(path.name):
            found.append(((int(match[2]), int(match[1])), path))
    return [path for _, path in sorted(found, reverse=True)]


def _hash_files(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    def facts(path: Path) -> tuple[str, dict[str, Any]]:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return path.name, {"bytes": path.stat().st_size, "sha256": digest}

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return dict(pool.map(facts, paths))


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name (tied ones once) and persistent buffers."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # After a forward without backward (validation) the root still holds its gathered
            # parameters in place of its shards.
            module.reshard()
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    persistent = model.state_dict(keep_vars=True).keys()
    tensors |= {name: b for name, b in model.named_buffers() if name in persistent}
    return tensors


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as `<parameter name>.<key>`, in the parameters' layout."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _make_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer create its state, by a step of zero gradients at learning rate 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _rank_and_world() -> tuple[int, int]:
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
