"""What one rank of a run would hold and compute, from one step of the recipe on fake tensors.

The recipe's own module is built, sharded and stepped (forward, loss, backward, clipping, optimizer)
as on rank 0 of N ranks, with tensors that have no memory: nothing is modelled a second time but
DistributedDataParallel's buckets (dist.pretend) and gloo's copies (dist.memory_trace). The step is
the second of a run, since then the optimizer has its state and the gradients of the step before
are still there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dist.devices import Device
from dist.errors import ConfigError
from dist.initialise import without_values
from dist.memory_trace import GRADIENTS, OPTIMIZER, PARAMETERS, MemoryTrace, Peak
from dist.mesh import data_mesh
from dist.op_cost import Costs
from dist.order import num_micro_batches
from dist.precision import Precision, PrecisionName, decide_precision
from dist.pretend import (
    CPU,
    DdpBuckets,
    FsdpGradients,
    choices_of,
    fake_batch,
    loss_marked,
    pretended_world,
    stand_in_trainer,
)
from dist.sharding import without_gradient_sync

PLANNED_STRATEGIES = ("ddp", "fsdp")
MAX_RANKS = 4096
# What CUDA's caching allocator rounds each tensor up to (kMinBlockSize of CUDACachingAllocator).
_CUDA_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run to plan."""

    make_module: Callable[[Any, dict[str, Any], Precision], Any]
    """(config, schema, precision) -> the recipe's LightningModule."""
    config: Any
    """The recipe's, with parallel, precision, global_batch and micro_batch."""
    schema: dict[str, Any]
    """vocab_size and seq_len, as in a manifest."""
    num_ranks: int
    device: Device


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What came out."""

    peak: Peak
    """Of one rank."""
    costs: Costs
    """Of the traced micro-batches and the optimizer step of one rank."""
    num_params: int
    """Of the whole model, tied ones once."""
    state_bytes: int
    """A checkpoint's bytes on this rank: parameters and optimizer state."""
    num_micro: int
    """Micro-batches of a step on each rank."""
    traced_micro: int
    """How many of them were traced: 1, or 2 for the first and the last."""
    precision: Precision
    tokens_per_step: int
    """Over all ranks."""
    padded_rows: int
    """Rows of a step, over all ranks, that are padding because the batch does not divide."""


def plan(request: Request) -> Plan:
    """Trace one step. Takes seconds to a minute; the process must be in no process group."""
    check(request)
    config, device = request.config, request.device
    num_micro = num_micro_batches(config.global_batch, request.num_ranks, config.micro_batch)
    precision = planned_precision(config.precision, device)
    module = request.make_module(config, request.schema, precision)
    module._trainer = stand_in_trainer(request.num_ranks, num_micro)
    costs = Costs()
    trace = MemoryTrace(
        round_to=_CUDA_BLOCK if device.kind == "cuda" else 1,
        costs=costs,
        gloo_copies=device.kind == "cpu" and request.num_ranks > 1,
    )
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        for one in (pretended_world(request.num_ranks), choices_of(device), loss_marked(trace)):
            stack.enter_context(one)
        module._device_mesh = data_mesh(CPU)
        with without_values(fake):
            # Outside the fake mode: FSDP2 cuts every parameter into one piece a rank, which a
            # thousand times over takes half a minute of fake tensors and no time of meta ones.
            module.configure_model()
        with fake:
            step = _Step(request, module, trace, costs, num_micro)
            step.remember_the_last()
            with trace:
                step.run()
        params = sum(p.numel() for p in module.net.parameters())
        peak = trace.peak()
    rows = num_micro * step.rows * request.num_ranks
    return Plan(
        peak=peak,
        costs=costs,
        num_params=params,
        state_bytes=step.state_bytes,
        num_micro=num_micro,
        traced_micro=step.traced,
        precision=precision,
        tokens_per_step=config.global_batch * int(request.schema["seq_len"]),
        padded_rows=rows - config.global_batch,
    )


def check(request: Request) -> None:
    """ConfigError for what cannot be planned."""
    if not 1 <= request.num_ranks <= MAX_RANKS:
        raise ConfigError(f"--ranks {request.num_ranks}: it must be 1 to {MAX_RANKS}")
    if request.config.micro_batch == "auto":
        raise ConfigError("micro_batch auto is found by trial steps: give a number to plan with")
    strategy = request.config.parallel.strategy
    if strategy not in PLANNED_STRATEGIES or getattr(request.config.parallel, "tp", 1) > 1:
        raise ConfigError(
            f"parallel.strategy {strategy} is not planned yet; "
            f"`leyden plan` knows {' and '.join(PLANNED_STRATEGIES)} without tp"
        )


def planned_precision(name: PrecisionName, device: Device) -> Precision:
    """What `auto` comes to on the planned device."""
    if device.kind == "cpu" or name != "auto":
        return decide_precision(name, CPU)
    return Precision(name="bf16-mixed", reason=f"auto: {device.name} has bf16 units")


class _Step:
    """The second optimizer step of the recipe's module, in the order that Lightning runs it."""

    def __init__(
        self, request: Request, module: Any, trace: MemoryTrace, costs: Costs, num_micro: int
    ) -> None:
        self.request, self.module, self.trace = request, module, trace
        self.num_micro, self.traced = num_micro, min(num_micro, 2)
        self.state_bytes = 0
        self._ranks = request.num_ranks
        # As dist.loader cuts a step: short micro-batches are not padded beyond the rank's rows.
        per_rank = -(-request.config.global_batch // request.num_ranks)
        self.rows = min(request.config.micro_batch, per_rank)
        self._optimizer = module.configure_optimizers()["optimizer"]
        self._fsdp = FsdpGradients(module.net, trace)
        ddp = request.config.parallel.strategy == "ddp"
        self._ddp = DdpBuckets(module.net, trace, costs) if ddp else None

    def remember_the_last(self) -> None:
        """Leave gradients and optimizer state as a first step would."""
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
        before = self.trace.peak().categories
        self.trace.enter(states, OPTIMIZER)
        held = self.trace.peak().categories
        self.state_bytes = before[PARAMETERS] + held[OPTIMIZER]

    def run(self) -> None:
        """One step; gradients are gathered or reduced in its last micro-batch only."""
        module, config = self.module, self.request.config
        targets = config.global_batch * int(self.request.schema["seq_len"])
        for micro in range(self.traced):
            last = micro == self.traced - 1
            self.trace.in_phase("forward" if last else "forward, earlier micro-batches")
            batch = fake_batch(self.rows, self.request.schema, targets)
            loss = module.training_step(batch, micro)["loss"] / self.num_micro
            self._look()
            if micro == 0:
                # Lightning frees the last step's gradients between forward and backward.
                self._optimizer.zero_grad()
            self.trace.in_phase("backward" if last else "backward, earlier micro-batches")
            if self._ddp is not None:
                self._ddp.syncs = last
            local = nullcontext() if last else without_gradient_sync(module.net)
            with local:
                loss.backward()
            self._look()
        if self._ddp is not None:
            self._ddp.count_messages(self._ranks)
        self.trace.in_phase("optimizer")
        module.on_before_optimizer_step(self._optimizer)
        self._optimizer.step()

    def _look(self) -> None:
        """What has turned out to be parameters, buffers or gradients."""
        self._fsdp.look()
        # FSDP2 pads the parameters' storages at its first forward.
        self.trace.enter(self.module.net.parameters(), PARAMETERS)
        self.trace.enter((p.grad for p in self.module.net.parameters()), GRADIENTS)
