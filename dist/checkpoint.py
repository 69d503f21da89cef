"""Checkpoints by torch's distributed checkpoint (DCP), written in the background.

Tensors are keyed by parameter name, so a checkpoint loads on any number of ranks and under ddp
as under fsdp. dist/checkpoint_folder.py says what makes a folder a checkpoint.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.fsdp import FSDPModule

from dist import strict_json
from dist.checkpoint_folder import (
    STATE,
    check_files,
    checkpoint_name,
    delete_checkpoint,
    find_checkpoint,
    read_record,
    write_commit,
)
from dist.checkpoint_url import files_to_write, reader_of
from dist.deepspeed_zero import empty_state, gather_state, is_zero, scatter_state
from dist.errors import ConfigError, LeydenError, SetupError, describe
from dist.mesh import host_group
from dist.url_path import Place

# What callers need of a checkpoint, in one place.
__all__ = [
    "CheckpointSaver",
    "SaveFailed",
    "check_files",
    "check_same_run",
    "checkpoint_name",
    "find_checkpoint",
    "load_checkpoint",
    "read_record",
    "save_checkpoint",
]


class SaveFailed(SetupError):
    """A checkpoint could not be written; every rank of the save raises it with the same text."""


def save_checkpoint(
    folder: Place, model: nn.Module, optimizer: torch.optim.Optimizer, record: dict[str, Any]
) -> None:
    """Write a complete checkpoint now; all ranks call it. `record` is JSON, the same on all ranks.

    Model parameters are saved in fp32 as they are held, each rank its own part.
    """
    _write(folder, _state(model, optimizer), record, None, None, None)


@dataclass
class Saved:
    """How a save ended, the same on all ranks but for the seconds."""

    folder: Place
    failure: str = ""
    """Why it failed; '' if the checkpoint is there."""
    stall_s: float = 0.0
    """Seconds that training waited for the copies."""
    write_s: float = 0.0
    """Seconds until the files were durable, beside training."""


class CheckpointSaver:
    """Writes copies of the tensors in a thread while training goes on, one save at a time.

    All ranks make the same calls in the same order. The thread has a gloo group of its own.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        # Its buffers (pinned beside a GPU) are kept from save to save.
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_gpu,
            )
        )
        self._group = host_group()
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None

    def start(
        self,
        folder: Place,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        record: dict[str, Any],
        *,
        validation_loss: float | None = None,
        before_commit: Callable[[], None] | None = None,
        then: Callable[[Saved], None] | None = None,
    ) -> None:
        """Copy the tensors, then write them in the background; wait() must have been called.

        On rank 0's thread `before_commit` is called before the checkpoint appears (an error there
        is the save's) and `then` when the save has ended, before wait() returns.
        """
        if self._thread is not None:
            raise RuntimeError("wait() for the previous save first")
        start = time.perf_counter()
        staged = self._stager.stage(_state(model, optimizer))
        saved = Saved(folder, stall_s=time.perf_counter() - start)
        self._saved = saved

        def write() -> None:
            start = time.perf_counter()
            try:
                _write(folder, staged, record, validation_loss, self._group, before_commit)
            except Exception as error:
                saved.failure = str(error) or repr(error)
            saved.write_s = time.perf_counter() - start
            if then is not None and _rank_and_world()[0] == 0:
                then(saved)

        # A daemon: a rank that fails in training must be able to end while a peer hangs.
        self._thread = threading.Thread(target=write, name=f"save {folder.name}", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> Saved | None:
        """Wait until the save is durable or has failed; None if none was started, or at time-out.

        Each save is returned once.
        """
        if self._thread is None:
            return None
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return None
        self._thread = None
        return self._saved


def _write(
    folder: Place,
    state: Any,
    record: dict[str, Any],
    validation_loss: float | None,
    group: torch.distributed.ProcessGroup | None,
    before_commit: Callable[[], None] | None,
) -> None:
    """Write, confirm on all ranks, commit on rank 0. Raises SaveFailed on all ranks or none."""
    rank, world_size = _rank_and_world()
    files = files_to_write(folder, makes_folder=rank == 0)
    failure = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP warns about its own no_dist default
            dcp.save(
                state,
                storage_writer=files.writer(),
                process_group=group,
                no_dist=world_size == 1,
            )
        if rank == 0:
            files.write(STATE, strict_json.dumps(record, indent=1, sort_keys=True).encode())
        files.sync()
    except CheckpointException as error:
        # What every rank reported, DCP has told to all of them.
        failure = "; ".join(f"rank {r}: {_say(e)}" for r, (e, _) in sorted(error.failures.items()))
    except Exception as error:
        failure = f"rank {rank}: {_say(error)}"
    reports: list[Any] = [(files.written, failure)]
    if world_size > 1:
        reports = [None] * world_size
        torch.distributed.all_gather_object(reports, (files.written, failure), group=group)
    failures = sorted({failure for _, failure in reports if failure})
    if rank == 0:
        try:
            if not failures:
                if before_commit is not None:
                    before_commit()
                listed = {name: facts for written, _ in reports for name, facts in written.items()}
                write_commit(folder, listed, validation_loss)
        except Exception as error:
            failures = [f"rank 0: {_say(error)}"]
        if failures and files.made_folder:
            _give_up(folder)
    if world_size > 1:
        box = [failures]
        torch.distributed.broadcast_object_list(box, src=0, group=group)
        failures = box[0]
    if failures:
        raise SaveFailed(f"{folder.name} could not be saved: {'; '.join(failures)}")


def _say(error: BaseException) -> str:
    said = describe(error) if isinstance(error, Exception) else None
    return said[0] if said else repr(error)


def _give_up(folder: Place) -> None:
    """Free the space of a failed save; what cannot be deleted now goes at the next start."""
    try:
        delete_checkpoint(folder)
    except (OSError, LeydenError):
        return


def load_checkpoint(folder: Place, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read a checkpoint's tensors into a model and its optimizer; all ranks call it.

    The caller has checked the files (find_checkpoint does): `.metadata` is a pickle.
    """
    _, world_size = _rank_and_world()
    if is_zero(optimizer):
        state = empty_state(model)
    else:
        _make_optimizer_state(optimizer)
        # Tensors are filled in place: these are the model's and the optimizer's own.
        state = _state(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=reader_of(folder), no_dist=world_size == 1)
    if is_zero(optimizer):
        scatter_state(model, optimizer, state)


def check_same_run(
    saved: dict[str, Any],
    now: dict[str, Any],
    may_change: Iterable[str],
    run: str,
    defaults: dict[str, Any] | None = None,
) -> None:
    """Refuse to resume with other settings than the run's, by name and both values.

    `may_change` holds dotted keys; one of a group lets the whole group change. A key that is
    younger than the run had its default, which `defaults` tells.
    """
    new = _flatten(now)
    younger = {key: value for key, value in _flatten(defaults or {}).items() if key in new}
    old = younger | _flatten(saved)
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


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    if is_zero(optimizer):
        return gather_state(model, optimizer)
    return {"model": _model_tensors(model), "optimizer": _optimizer_tensors(model, optimizer)}


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters by name (tied ones once) and persistent buffers. What is frozen is not
    saved: it comes from where it came from at first."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # After a forward without backward (validation) the root still holds its gathered
            # parameters in place of its shards.
            module.reshard()
    tensors: dict[str, Tensor] = {
        name: p.detach() for name, p in model.named_parameters() if p.requires_grad
    }
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
