"""The process group and the device mesh; who this process is in them."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dist.errors import LeydenError, SetupError, describe
from dist.ranks import Ranks

T = TypeVar("T")
START_TIMEOUT_S = 1800.0
_HOST_GROUPS: weakref.WeakSet[torch.distributed.ProcessGroup] = weakref.WeakSet()


class PeerFailed(LeydenError):
    """Another rank failed and said why; this one ends quietly with the same exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def choose_device(ranks: Ranks) -> torch.device:
    """The local rank's GPU where there are GPUs, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if ranks.local_rank >= torch.cuda.device_count():
        raise SetupError(
            f"local rank {ranks.local_rank} has no GPU: this machine shows "
            f"{torch.cuda.device_count()}; start at most that many ranks, or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES="
        )
    return torch.device("cuda", ranks.local_rank)


def start_process_group(
    ranks: Ranks, device: torch.device, timeout_s: float = START_TIMEOUT_S
) -> None:
    """Join the world: torchrun's rendezvous, or a world of one that needs no port.

    GPUs get NCCL and, for tensors on the host, gloo. Does nothing if a world exists already.
    """
    if torch.distributed.is_initialized():
        return
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s)}
    options["backend"] = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options |= {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    if ranks.world_size == 1:
        options |= {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
    elif "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise SetupError(
            f"{ranks.world_size} ranks but no MASTER_ADDR and MASTER_PORT in the environment; "
            "start with torchrun or `leyden train`"
        )
    try:
        torch.distributed.init_process_group(**options)
    except (RuntimeError, torch.distributed.DistError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise SetupError(
            f"rank {ranks.rank} could not join the world at {address}: "
            f"{str(error).splitlines()[0]}; if the port is taken, choose another with "
            "--master-port, or use torchrun --standalone"
        ) from error


def stop_process_group() -> None:
    """Leave the world, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The world as replicas x shards x tp ranks; those of a tensor-parallel group are neighbours.

    Ranks of one tensor-parallel group compute the same rows, so `dp_rank` of `dp_size` is the
    coordinate of everything that goes by rows: data, seeds, the scale of the loss, sums.
    """

    rank: int = 0
    replicas: int = 1
    """Groups that hold all parameters and average gradients."""
    shards: int = 1
    """Ranks of a replica that hold other parts of each parameter and read other rows."""
    tp: int = 1
    """Ranks that hold other parts of each layer and read the same rows."""

    @property
    def dp_size(self) -> int:
        return self.replicas * self.shards

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def counts(self) -> bool:
        """Whether this rank stands for its rows in a sum over all ranks: one of a group does."""
        return self.rank % self.tp == 0


def data_mesh(device: torch.device) -> DeviceMesh:
    """All ranks on one axis, `dp`: each holds other rows."""
    return make_mesh(device, Layout(shards=torch.distributed.get_world_size()))


def make_mesh(device: torch.device, layout: Layout) -> DeviceMesh:
    """The mesh of a layout: ("dp",), ("dp_replicate", "dp_shard"), or either with "tp" last."""
    if layout.replicas > 1 and layout.shards > 1:
        sizes, names = [layout.replicas, layout.shards], ["dp_replicate", "dp_shard"]
    else:
        sizes, names = [layout.dp_size], ["dp"]
    if layout.tp > 1:
        sizes, names = [*sizes, layout.tp], [*names, "tp"]
    return init_device_mesh(device.type, tuple(sizes), mesh_dim_names=tuple(names))


def data_axes(mesh: DeviceMesh) -> DeviceMesh:
    """The part of a mesh over which rows differ: all its axes but `tp`."""
    names = mesh.mesh_dim_names
    assert names is not None
    kept = tuple(name for name in names if name != "tp")
    return mesh[kept] if len(kept) < len(names) else mesh


def shorten_timeouts(timeout_s: float) -> None:
    """From the second step on a collective that waits this long fails: all the groups of
    computing, not those of other threads (host_group), which wait for whole steps."""
    c10d = torch.distributed.distributed_c10d
    for group in list(c10d._world.pg_map):
        if group not in _HOST_GROUPS:
            c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def host_group(timeout_s: float = START_TIMEOUT_S) -> torch.distributed.ProcessGroup | None:
    """A gloo group of its own for another thread's collectives; None in a world of one.

    All ranks must call it at the same point. Two threads must never share a group: the order of
    their collectives would differ between ranks.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return None
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    _HOST_GROUPS.add(group)
    return group


def on_rank_zero(fn: Callable[[], T]) -> T:
    """Run `fn` on rank 0 and give its (picklable) result to all ranks.

    If it fails, rank 0 raises its error and the others PeerFailed with the same exit code, so
    that a bad input is reported once.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return fn()
    box: list[Any] = [None]
    failure: Exception | None = None
    if torch.distributed.get_rank() == 0:
        try:
            box = [("ok", fn())]
        except Exception as error:
            failure = error
            said = describe(error) or (repr(error), 1)
            box = [("failed", *said)]
    torch.distributed.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if box[0][0] == "failed":
        raise PeerFailed(f"rank 0: {box[0][1]}", box[0][2])
    return box[0][1]


def share_cores(ranks: Ranks, device: torch.device) -> None:
    """Give each local rank its part of the cores for computing on the CPU."""
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // ranks.local_world_size))
