"""Strategies by name, as plain functions on a module and a mesh; Lightning adapters call them.

    ddp        every rank holds all; gradients are averaged
    fsdp       parameters, gradients and optimizer state are sharded over all ranks (FSDP2)
    hsdp       fsdp within a replica, gradients averaged over replicas: shards stay in a node
    tp         each layer is split over tp ranks; the rest are replicas of that
    fsdp, tp   both, on a two-dimensional mesh
    deepspeed  ZeRO-1, 2, 3: dist/deepspeed_zero.py

Order of wrapping: tensor parallelism (the model's own plan), activation checkpointing, sharding,
then memory and first values.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dist.errors import ConfigError
from dist.mesh import Layout
from dist.precision import Precision
from dist.ranks import Ranks

StrategyName = Literal["ddp", "fsdp", "hsdp", "tp", "deepspeed"]
_NO_SHARDS = (
    "parallel.reduce_each micro_batch with strategy {strategy}: it saves memory only where FSDP2 "
    "holds shards of gradients (ddp and tp hold whole ones, ZeRO-2 and 3 reduce every micro-batch "
    "anyway); leave it out, or use fsdp or hsdp"
)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks share the work."""

    strategy: StrategyName = "fsdp"
    """ddp: each rank holds all; fsdp: parameters, gradients and optimizer state are sharded; hsdp:
    sharded within replicas; tp: each layer is split; deepspeed: ZeRO."""
    tp: int = 0
    """Ranks that split each layer (neighbours, so within a node), with strategy tp or fsdp; 0: all
    ranks under tp, one under the others."""
    replicas: int = 0
    """hsdp: copies of the model; 0: one a node, or 2 on a single node."""
    zero_stage: Literal[1, 2, 3] = 2
    """deepspeed: what is sharded. 1: optimizer state; 2: gradients too; 3: parameters too."""
    offload_optimizer: bool = False
    """deepspeed: optimizer state in the host's memory."""
    reduce_each: Literal["step", "micro_batch"] = "step"
    """fsdp, hsdp: when gradients go to their shards. step: once, so a rank holds whole fp32
    gradients between micro-batches; micro_batch: each time, so it never does."""
    start_timeout_s: float = 1800.0
    """How long ranks wait for each other until the first step has ended."""
    step_timeout_s: float = 600.0
    """How long from then on: a rank that hangs ends the run after this."""

    def __post_init__(self) -> None:
        if self.strategy not in get_args(StrategyName):
            raise ConfigError(
                f"parallel.strategy is {self.strategy!r}; it must be one of "
                f"{', '.join(get_args(StrategyName))}"
            )
        if self.tp < 0 or self.replicas < 0:
            raise ConfigError(
                f"parallel: tp is {self.tp} and replicas {self.replicas}; neither may be negative"
            )
        if self.zero_stage not in (1, 2, 3):
            raise ConfigError(f"parallel.zero_stage is {self.zero_stage}; it must be 1, 2 or 3")
        if self.start_timeout_s <= 0 or self.step_timeout_s <= 0:
            raise ConfigError("parallel: start_timeout_s and step_timeout_s must be above 0")
        if self.tp > 1 and self.strategy not in ("tp", "fsdp"):
            raise ConfigError(
                f"parallel.tp is {self.tp} with strategy {self.strategy}; layers are split under "
                "strategy tp, or fsdp for both"
            )
        if self.replicas and self.strategy != "hsdp":
            raise ConfigError(
                f"parallel.replicas is {self.replicas} with strategy {self.strategy}; only hsdp "
                "takes it"
            )
        if self.offload_optimizer and self.strategy != "deepspeed":
            raise ConfigError(
                f"parallel.offload_optimizer with strategy {self.strategy}; only deepspeed has it"
            )
        if self.reduce_each not in ("step", "micro_batch"):
            raise ConfigError(
                f"parallel.reduce_each is {self.reduce_each!r}; it must be step or micro_batch"
            )
        if self.reduce_each == "micro_batch" and not self.policy_owns_dtypes:
            raise ConfigError(_NO_SHARDS.format(strategy=self.strategy))

    @property
    def policy_owns_dtypes(self) -> bool:
        """Whether bf16 comes from FSDP2's policy and not from autocast."""
        return self.strategy in ("fsdp", "hsdp")

    def __str__(self) -> str:
        if self.strategy == "deepspeed":
            return f"deepspeed ZeRO-{self.zero_stage}"
        return f"fsdp x tp {self.tp}" if self.strategy == "fsdp" and self.tp > 1 else self.strategy


def arrange(config: ParallelConfig, ranks: Ranks) -> Layout:
    """Where this rank stands; ConfigError where the sizes do not fill the world."""
    world_size, tp, replicas = ranks.world_size, config.tp, config.replicas
    if config.strategy == "hsdp":
        num_nodes = world_size // ranks.local_world_size
        replicas = replicas or max(2, num_nodes)
        if world_size % replicas:
            raise ConfigError(
                f"parallel: hsdp of {replicas} replicas does not fill {world_size} ranks; set "
                "parallel.replicas to a divisor of the ranks, or use fsdp"
            )
        return Layout(rank=ranks.rank, replicas=replicas, shards=world_size // replicas)
    tp = tp or (world_size if config.strategy == "tp" else 1)
    if world_size % tp:
        raise ConfigError(
            f"parallel: tp {tp} does not divide {world_size} ranks; set parallel.tp to a divisor"
        )
    if tp > 1 and ranks.local_world_size % tp:
        raise ConfigError(
            f"parallel: tp {tp} does not divide the {ranks.local_world_size} ranks of a node: a "
            "layer would be split across the network; set parallel.tp to a divisor of them"
        )
    replicate = config.strategy in ("ddp", "tp")
    name = "replicas" if replicate else "shards"
    return Layout(rank=ranks.rank, tp=tp, **{name: world_size // tp})


def shard_fsdp(
    root: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, precision: Precision
) -> None:
    """FSDP2 on each block and on the root (in place); parameters become DTensors on `mesh`.

    On a mesh of two axes the first holds replicas.

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
def without_gradient_sync(root: nn.Module, reduce_each: str = "step") -> Iterator[None]:
    """Gradients stay on this rank: for all micro-batches of an accumulation but the last.

    With `reduce_each` micro_batch FSDP2 adds them to its shards each time; those of replicas
    (hsdp) are still averaged once.
    """
    if isinstance(root, DistributedDataParallel):
        with root.no_sync():
            yield
        return
    sharded = [module for module in root.modules() if isinstance(module, FSDPModule)]

    def set_sync(on: bool) -> None:
        for module in sharded:
            if reduce_each == "micro_batch":
                module.set_requires_all_reduce(on, recurse=False)
            else:
                module.set_requires_gradient_sync(on, recurse=False)

    set_sync(False)
    try:
        yield
    finally:
        set_sync(True)


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor], group: torch.distributed.ProcessGroup) -> None:
    """Mean of the gradients over the ranks of `group`, in fp32, by buckets of 64 MiB.

    For replicas of a tensor-parallel group. Local parts of DTensors are averaged as they are, so
    the group must hold the same parts. Parameters without gradient must be the same on all ranks.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    bucket: list[Tensor] = []
    for index, grad in enumerate(local):
        bucket.append(grad)
        if sum(one.numel() for one in bucket) < 1 << 24 and index < len(local) - 1:
            continue
        flat = torch.cat([one.flatten().float() for one in bucket])
        torch.distributed.all_reduce(flat, group=group)
        flat /= group.size()
        pieces = flat.split([one.numel() for one in bucket])
        for one, piece in zip(bucket, pieces, strict=True):
            one.copy_(piece.view_as(one))
        bucket = []


def num_parameters(module: nn.Module) -> int:
    """Parameters of the whole model, tied ones once, however they are sharded."""
    # ZeRO-3 leaves empty tensors and keeps the number beside them.
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters())


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients to a global norm of at most `max_norm` (0: leave them); returns the norm.

    Works on plain tensors and on DTensors of any layouts, also mixed: one norm a layout, combined.
    The norm is a scalar on the gradients' device; nothing waits for it.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros(())
    groups: dict[Any, list[Tensor]] = {}
    for grad in grads:
        layout = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None
        groups.setdefault(layout, []).append(grad)
    total = torch.stack([_squared_norm(group) for group in groups.values()]).sum().sqrt()
    if max_norm > 0:
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        torch._foreach_mul_(local, factor)
    return total


def _squared_norm(grads: list[Tensor]) -> Tensor:
    """Of tensors of one layout, over all ranks that hold other parts of them; fp32."""
    first = grads[0]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    square = torch.stack(torch._foreach_norm(local)).float().square().sum()
    if isinstance(first, DTensor):
        # DTensor's own norm warns on meshes of two axes, and reduces each tensor's.
        for axis, placement in enumerate(first.placements):
            if not placement.is_replicate():
                torch.distributed.all_reduce(square, group=first.device_mesh.get_group(axis))
    return square
