"""The second optimizer step of a recipe's module on fake tensors, as each strategy runs it.

The second, since then the optimizer has its state and the gradients of the step before are still
there. Order as in Lightning's loop: forward, the last step's gradients freed, backward, ...
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dist.memory_trace import GRADIENTS, OPTIMIZER, PARAMETERS, MemoryTrace
from dist.mesh import Layout, data_axes
from dist.op_cost import Costs
from dist.pretend import DdpBuckets, FsdpGradients, fake_batch
from dist.pretend_zero import ZeroPartitions
from dist.sharding import average_gradients, without_gradient_sync

AVERAGING = "averaging gradients"


class Step:
    """A step of `num_micro` micro-batches, of which the first and the last are traced."""

    def __init__(
        self, config: Any, schema: dict[str, Any], layout: Layout, mesh: DeviceMesh, module: Any,
        trace: MemoryTrace, costs: Costs, num_micro: int, external: dict[nn.Module, list[Tensor]],
        *, on_gpu: bool,
    ) -> None:  # fmt: skip
        self.config, self.schema, self.layout, self.module = config, schema, layout, module
        self.trace, self.costs = trace, costs
        self.num_micro, self.traced = num_micro, min(num_micro, 2)
        self.state_bytes = 0
        self._mesh = mesh
        # As dist.loader cuts a step: short micro-batches are not padded beyond the rank's rows.
        per_rank = -(-config.global_batch // layout.dp_size)
        self.rows = min(config.micro_batch, per_rank)
        self._optimizer = module.configure_optimizers()["optimizer"]
        self._fsdp = FsdpGradients(module.net, trace)
        strategy = config.parallel.strategy
        self._ddp = DdpBuckets(module.net, trace, costs) if strategy == "ddp" else None
        self._zero: ZeroPartitions | None = None
        if strategy == "deepspeed":
            self._zero = ZeroPartitions(
                module.net, self._optimizer, config.parallel, layout.dp_size, trace, costs,
                external, on_gpu=on_gpu,
            )  # fmt: skip

    @property
    def host_bytes(self) -> int:
        """Of the optimizer, where it is offloaded from a GPU."""
        return self._zero.host_bytes if self._zero is not None else 0

    def remember_the_last(self) -> None:
        """Leave gradients and optimizer state as a first step would."""
        if self._zero is not None:
            self._zero.remember_the_last(lambda: self._micro_batch(0).backward())
            self.state_bytes = self._zero.state_bytes
            return
        parameters = [p for p in self.module.net.parameters() if p.requires_grad]
        if self._ddp is not None:
            self._ddp.fill()
        else:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        states = [one for state in self._optimizer.state.values() for one in state.values()]
        self.trace.enter(self.module.net.parameters(), PARAMETERS)
        self.trace.enter(self.module.net.buffers(), PARAMETERS)
        self.trace.enter((p.grad for p in parameters), GRADIENTS)
        self.trace.enter(states, OPTIMIZER)
        # What is frozen is not saved.
        saved = [p.to_local() if isinstance(p, DTensor) else p for p in (*parameters, *states)]
        self.state_bytes = sum(one.numel() * one.element_size() for one in saved)

    def run(self) -> None:
        """One step; gradients are gathered or reduced as the strategy does in each micro-batch."""
        for micro in range(self.traced):
            last = micro == self.traced - 1
            self.trace.in_phase("forward" if last else "forward, earlier micro-batches")
            loss = self._micro_batch(micro)
            if micro == 0:
                # Lightning frees the last step's gradients between forward and backward.
                self._optimizer.zero_grad()
            self.trace.in_phase("backward" if last else "backward, earlier micro-batches")
            if self._ddp is not None:
                self._ddp.syncs = last
            if self._zero is not None:
                self._zero.begin_backward(last=last)
            each = self.config.parallel.reduce_each
            with nullcontext() if last else without_gradient_sync(self.module.net, each):
                loss.backward()
            self._look()
            if self._zero is not None:
                self._zero.end_backward()
        self._end()

    def _micro_batch(self, micro: int) -> Any:
        """The forward of one, as loss."""
        targets = self.config.global_batch * int(self.schema["seq_len"])
        batch = fake_batch(self.rows, self.schema, targets)
        loss = self.module.training_step(batch, micro)["loss"] / self.num_micro
        self._look()
        return loss

    def _end(self) -> None:
        """What comes after the last backward."""
        if self._ddp is not None:
            self._ddp.count_messages(self.layout.dp_size)
        if self.config.parallel.strategy == "tp" and self.layout.dp_size > 1:
            # As TensorParallelStrategy.post_backward: nothing else runs meanwhile.
            self.trace.in_phase(AVERAGING)
            average_gradients(self.module.parameters(), data_axes(self._mesh).get_group())
        self.trace.in_phase("optimizer")
        self.module.on_before_optimizer_step(self._optimizer)
        if self._zero is not None:
            self._zero.step()
        else:
            self._optimizer.step()

    def _look(self) -> None:
        """What has turned out to be parameters, buffers or gradients."""
        if self._zero is not None:
            return
        self._fsdp.look()
        # FSDP2 pads the parameters' storages at its first forward.
        self.trace.enter(self.module.net.parameters(), PARAMETERS)
        self.trace.enter((p.grad for p in self.module.net.parameters()), GRADIENTS)
