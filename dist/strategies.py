"""Lightning adapters of dist.sharding, by name, and the environment that tells it the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh

from dist.mesh import data_mesh
from dist.ranks import Ranks
from dist.sharding import StrategyName, ddp_options, without_gradient_sync


class LeydenEnvironment(ClusterEnvironment):
    """Ranks as dist.ranks found them; Lightning starts no process and opens no port."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "unused: the process group exists before Lightning starts"

    @property
    def main_port(self) -> int:
        return 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._ranks.world_size

    def set_world_size(self, size: int) -> None:
        self._check("world size", size, self._ranks.world_size)

    def global_rank(self) -> int:
        return self._ranks.rank

    def set_global_rank(self, rank: int) -> None:
        self._check("rank", rank, self._ranks.rank)

    def local_rank(self) -> int:
        return self._ranks.local_rank

    def node_rank(self) -> int:
        return self._ranks.node_rank

    def _check(self, what: str, lightning: int, ours: int) -> None:
        if lightning != ours:
            raise ValueError(
                f"Lightning computes the {what} {lightning} where it is {ours}: every node must "
                "run the same number of processes, in order"
            )


class FsdpStrategy(ModelParallelStrategy):
    """FSDP2 on CPU/gloo and CUDA/NCCL. The module shards itself in configure_model, by
    dist.sharding.shard_fsdp on `self.device_mesh`."""

    def __init__(self) -> None:
        # Both sizes: the defaults are dp = nodes, tp = all devices, which is no FSDP at all.
        super().__init__(
            data_parallel_size=torch.distributed.get_world_size(), tensor_parallel_size=1
        )

    def setup_environment(self) -> None:
        self._setup_distributed()
        self._device_mesh: DeviceMesh = data_mesh(self.root_device)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning enters this for all micro-batches of a step but the last."""
        assert self.lightning_module is not None
        with without_gradient_sync(self.lightning_module):
            yield


class DdpStrategy(DDPStrategy):
    """Lightning's DDP with our options; the module makes equal first values on every rank."""

    def __init__(self) -> None:
        super().__init__(**ddp_options())


def make_strategy(name: StrategyName) -> Strategy:
    """The Lightning strategy of a name; the process group must exist."""
    if name == "fsdp":
        return FsdpStrategy()
    if name == "ddp":
        return DdpStrategy()
    raise ValueError(f"parallel.strategy is {name!r}; it must be ddp or fsdp")
