"""DeepSpeed's ZeRO-1, 2 and 3: its config, and its state in the one checkpoint format.

DeepSpeed holds fp32 parameters and Adam moments in flat buffers cut between ranks, so that no
rank's part is a slice of a tensor. To save, each tensor is gathered and one rank keeps it on the
host; to load, that rank reads it and sends it to all. So a ZeRO checkpoint loads under any other
strategy and any number of ranks, and theirs load here. A save costs a gather of every tensor, and
the host memory of 12 bytes a parameter over all ranks.

Precision: DeepSpeed sees fp32. With bf16-mixed the model computes in bf16 by autocast, and
gradients are reduced in fp32.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from dist.errors import SetupError
from dist.sharding import ParallelConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
REDUCE_BUCKET = 500_000_000
"""Elements of the buffer that gradients are reduced in, DeepSpeed's default: 2 GB in fp32."""
_NOTED: list[dict[nn.Module, list[Tensor]]] = []


def zero_config(parallel: ParallelConfig, clip_norm: float) -> dict[str, Any]:
    """DeepSpeed's config; accumulation is added by Lightning."""
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "contiguous_gradients": True,
        "reduce_bucket_size": REDUCE_BUCKET,
        "overlap_comm": torch.cuda.is_available(),
    }
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        # Only DeepSpeed's own logs read the batch size.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": clip_norm,
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW, also on the host: DeepSpeed's own needs a compiler at run time.
        "zero_force_ds_cpu_optimizer": False,
    }


def require_deepspeed() -> None:
    """Import DeepSpeed for the device at hand; SetupError where it is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise SetupError(
            "parallel.strategy deepspeed needs the package deepspeed, which is not installed: run "
            "`make setup` (it says why if it cannot be built), or use fsdp"
        )
    if not torch.cuda.is_available():
        # DeepSpeed looks for a device when it is imported.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # On a CPU it would compile a library of its own when it joins the group, for minutes, and
    # wait for ever on the lock file of a compilation that was killed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logging.logger.setLevel(logging.ERROR)


def join_process_group() -> None:
    """Let DeepSpeed use the process group that exists."""
    import deepspeed

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def gather_with(module: nn.Module, parameter: nn.Parameter) -> None:
    """Under ZeRO-3 gather `parameter` for the forward of `module`, which uses it without calling
    the module that owns it (an output matrix in a fused loss)."""
    if _NOTED:
        _NOTED[-1].setdefault(module, []).append(parameter)
        return
    import deepspeed

    deepspeed.zero.register_external_parameter(module, parameter)


@contextmanager
def gathers_noted() -> Iterator[dict[nn.Module, list[Tensor]]]:
    """For the memory plan: gather_with fills this, and DeepSpeed is not needed."""
    _NOTED.append({})
    try:
        yield _NOTED[-1]
    finally:
        _NOTED.pop()


def is_zero(optimizer: Any) -> bool:
    """Whether an optimizer is DeepSpeed's wrapper."""
    return type(optimizer).__module__.startswith("deepspeed.")


def gather_state(model: nn.Module, optimizer: Any) -> dict[str, dict[str, Tensor]]:
    """Full tensors on the host, as dist.checkpoint names them: those that this rank keeps (number
    i is kept by rank i modulo the ranks). All ranks call it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    kept: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    steps = _make_state(optimizer)
    for number, (name, parameter) in enumerate(_trained(model)):
        mine = number % world_size == rank
        full = safe_get_full_fp32_param(parameter)
        if mine:
            kept["model"][name] = full.detach().to("cpu", copy=True)
            kept["optimizer"][f"{name}.step"] = steps[0].detach().to("cpu", copy=True)
        for key in MOMENTS:
            full = safe_get_full_optimizer_state(parameter, key)
            if mine:
                kept["optimizer"][f"{name}.{key}"] = full.detach().to("cpu", copy=True)
    return kept


def empty_state(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What this rank reads from a checkpoint: as gather_state, with memory to fill."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    state: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for number, (name, parameter) in enumerate(_trained(model)):
        if number % world_size == rank:
            state["model"][name] = torch.empty(_shape(parameter))
            state["optimizer"][f"{name}.step"] = torch.zeros(())
            for key in MOMENTS:
                state["optimizer"][f"{name}.{key}"] = torch.empty(_shape(parameter))
    return state


@torch.no_grad()
def scatter_state(model: nn.Module, optimizer: Any, state: dict[str, dict[str, Tensor]]) -> None:
    """Put a filled empty_state into DeepSpeed's partitions, tensor by tensor; all ranks call it."""
    steps = _make_state(optimizer)
    stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    if stage_3:
        optimizer.checkpoint_event_prologue()
    for number, (name, parameter) in enumerate(_trained(model)):
        for key in (None, *MOMENTS):
            part, entry = ("optimizer", f"{name}.{key}") if key else ("model", name)
            full = _from_owner(number, state[part].get(entry), _shape(parameter), optimizer.device)
            _set(parameter, full, key, stage_3=stage_3)
        saved = _from_owner(number, state["optimizer"].get(f"{name}.step"), (), optimizer.device)
        for step in steps:
            step.copy_(saved)
    if stage_3:
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What is saved; frozen parameters come from where they came from at first."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _from_owner(
    number: int, mine: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """A full tensor from the rank that read it, on `device`."""
    owner = number % torch.distributed.get_world_size()
    full = torch.empty(shape, device=device) if mine is None else mine.to(device)
    torch.distributed.broadcast(full, src=owner)
    return full


def _set(parameter: nn.Parameter, full: Tensor, key: str | None, *, stage_3: bool) -> None:
    """Write this rank's part of one full tensor: the parameter's own, or a moment's."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if stage_3:
        # Its own setter of full tensors fails where the ranks do not divide the elements.
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        start = torch.distributed.get_rank() * size
        piece = full.flatten()[start : start + size]
        piece = nn.functional.pad(piece, (0, size - piece.numel()))
        if key is None:
            safe_set_local_fp32_param(parameter, piece)
        else:
            safe_set_local_optimizer_state(parameter, piece, key)
    elif key is None:
        safe_set_full_fp32_param(parameter, full)
        parameter.copy_(full)
    else:
        safe_set_full_optimizer_state(parameter, full, key)


def _make_state(optimizer: Any) -> list[Tensor]:
    """Adam's state for each flat buffer, zero where there is none yet; returns their steps."""
    stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    name = "fp32_partitioned_groups_flat" if stage_3 else "single_partition_of_fp32_groups"
    inner = optimizer.optimizer
    fused = bool(inner.defaults.get("fused"))
    steps = []
    for flat in getattr(optimizer, name):
        state = inner.state[flat]
        if not state:
            # As torch.optim.AdamW makes it at the first step.
            state["step"] = torch.zeros((), device=flat.device if fused else "cpu")
            state |= {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
        steps.append(state["step"])
    if not stage_3:
        # DeepSpeed links parameters to their moments once, when only the first group has any.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    return steps
