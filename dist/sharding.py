"""ddp and fsdp as plain functions on a module and a mesh; the Lightning adapters only call them.

Order of wrapping: activation checkpointing, then sharding, then memory and first values.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dist.precision import Precision

StrategyName = Literal["ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks share the work."""

    strategy: StrategyName = "fsdp"
    """ddp: each rank holds all; fsdp: parameters, gradients and optimizer state are sharded."""


def shard_fsdp(
    root: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, precision: Precision
) -> None:
    """FSDP2 on each block and on the root (in place); parameters become DTensors on `mesh`.

    Parameters keep their dtype, compute has the decided one, gradients are reduced in fp32
    always.
    """
    policy = MixedPrecisionPolicy()
    if precision.compute_dtype != torch.float32:
        policy = MixedPrecisionPolicy(
            param_dtype=precision.compute_dtype, reduce_dtype=torch.float32
        )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)


def wrap_ddp(root: nn.Module, device: torch.device) -> DistributedDataParallel:
    """DDP with gradients as views of its buckets; equal first values are the caller's work."""
    return DistributedDataParallel(
        root, device_ids=[device.index] if device.type == "cuda" else None, **ddp_options()
    )


def ddp_options() -> dict[str, Any]:
    """Arguments of DistributedDataParallel; torch 2.13 renamed one."""
    # Buffers are constants (rotary frequencies): a broadcast would cost a collective a forward.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {name: False, "gradient_as_bucket_view": True}


@contextmanager
def without_gradient_sync(root: nn.Module) -> Iterator[None]:
    """Gradients stay on this rank: for all micro-batches of an accumulation but the last."""
    if isinstance(root, DistributedDataParallel):
        with root.no_sync():
            yield
        return
    sharded = [module for module in root.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.set_requires_gradient_sync(True, recurse=False)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients to a global norm of at most `max_norm` (0: leave them); returns the norm.

    Works on plain tensors and on DTensors of any meshes, also mixed: one norm per mesh, combined.
    The norm is a scalar on the gradients' device; nothing waits for it.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros(())
    groups: dict[Any, list[Tensor]] = {}
    for grad in grads:
        groups.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(grad)
    norms = []
    for group in groups.values():
        norm = torch.nn.utils.get_total_norm(group)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm > 0:
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        torch._foreach_mul_(local, factor)
    return total
