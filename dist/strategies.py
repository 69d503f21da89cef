"""Lightning adapters of dist.sharding, by name, and the environment that tells it the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    Strategy,
)
from torch.distributed.device_mesh import DeviceMesh

from dist.deepspeed_zero import join_process_group, require_deepspeed, zero_config
from dist.mesh import Layout, data_axes, make_mesh, shorten_timeouts
from dist.ranks import Ranks
from dist.sharding import ParallelConfig, average_gradients, ddp_options, without_gradient_sync


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


class MeshStrategy(ModelParallelStrategy):
    """FSDP2, HSDP, tensor parallelism and their product, on CPU/gloo and CUDA/NCCL. The module
    shards itself in configure_model, by dist.sharding on `self.device_mesh`."""

    def __init__(self, layout: Layout, reduce_each: str = "step") -> None:
        # Both sizes: the defaults are dp = nodes, tp = all devices, which is no FSDP at all.
        super().__init__(data_parallel_size=layout.dp_size, tensor_parallel_size=layout.tp)
        self._layout = layout
        self._reduce_each = reduce_each
        self._syncs = True

    def setup_environment(self) -> None:
        self._setup_distributed()
        self._device_mesh: DeviceMesh = make_mesh(self.root_device, self._layout)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning enters this for all micro-batches of a step but the last."""
        assert self.lightning_module is not None
        self._syncs = False
        try:
            with without_gradient_sync(self.lightning_module, self._reduce_each):
                yield
        finally:
            self._syncs = True


class TensorParallelStrategy(MeshStrategy):
    """Tensor parallelism; where there are replicas, their gradients are averaged after the last
    backward of a step."""

    def post_backward(self, closure_loss: torch.Tensor) -> None:
        if self._syncs and self._layout.dp_size > 1:
            assert self.lightning_module is not None
            average_gradients(
                self.lightning_module.parameters(), data_axes(self.device_mesh).get_group()
            )


class DdpStrategy(DDPStrategy):
    """Lightning's DDP with our options; the module makes equal first values on every rank."""

    def __init__(self) -> None:
        super().__init__(**ddp_options())


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed, on CPU too, with micro-batches and the step as under the others.

    Lightning's own leaves accumulation to the engine, which counts micro-batches and so loses a
    last step of fewer. Here Lightning says which micro-batch ends the step; it has divided the
    loss already. Clipping is the engine's; the norm before it becomes the module's `grad_norm`.
    """

    def __init__(self, parallel: ParallelConfig, clip_norm: float) -> None:
        require_deepspeed()
        super().__init__(config=zero_config(parallel, clip_norm))

    @property
    def handles_gradient_accumulation(self) -> bool:
        return False

    def setup_environment(self) -> None:
        # Not Lightning's own, which refuses CPUs; the group exists, so no port is needed.
        assert self.accelerator is not None and self.parallel_devices is not None
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()
        join_process_group()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        # Lightning's would partition parameters as they are made, on the meta device: garbage.
        yield

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        device = self.parallel_devices[self.local_rank]
        # Lightning asks for its index.
        return torch.device("cpu", 0) if device.type == "cpu" else device

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning enters this for all micro-batches of a step but the last."""
        self.deepspeed_engine.set_gradient_accumulation_boundary(False)
        try:
            yield
            self.deepspeed_engine.step()  # counts the micro-batch, no more
        finally:
            self.deepspeed_engine.set_gradient_accumulation_boundary(True)

    def backward(
        self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        self.deepspeed_engine.backward(closure_loss, scale_wrt_gas=False)
        return closure_loss

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        module: Any = self.lightning_module
        module.grad_norm = self.deepspeed_engine.get_global_grad_norm()
        return result


def make_strategy(parallel: ParallelConfig, layout: Layout, *, clip_norm: float = 0.0) -> Strategy:
    """The Lightning strategy of a config; the process group must exist.

    Only DeepSpeed takes the largest gradient norm (0: no limit); under the others the module
    clips (dist.sharding.clip_grad_norm).
    """
    if parallel.strategy == "ddp":
        return DdpStrategy()
    if parallel.strategy == "deepspeed":
        return ZeroStrategy(parallel, clip_norm)
    if parallel.strategy == "tp":
        return TensorParallelStrategy(layout)
    return MeshStrategy(layout, parallel.reduce_each)


class StepTimeout(Callback):
    """After the first step of an attempt, ranks wait for each other for less long."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s: float | None = timeout_s

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._timeout_s is not None and batch.ends_step:
            shorten_timeouts(self._timeout_s)
            self._timeout_s = None
