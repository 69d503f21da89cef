"""What one rank of a run would hold and compute, from one step of the recipe on fake tensors.

The recipe's own module is built, sharded and stepped (forward, loss, backward, clipping, optimizer)
as on rank 0 of N ranks, with tensors that have no memory: nothing is modelled a second time but
DistributedDataParallel's buckets (dist.pretend), DeepSpeed's partitions (dist.pretend_zero) and
gloo's copies (dist.memory_trace). dist.plan_step takes the step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from dist.deepspeed_zero import gathers_noted
from dist.devices import Device
from dist.errors import ConfigError
from dist.initialise import without_values
from dist.memory_trace import MemoryTrace, Peak
from dist.mesh import Layout, make_mesh
from dist.op_cost import Costs
from dist.order import num_micro_batches
from dist.plan_step import Step
from dist.precision import Precision, PrecisionName, decide_precision
from dist.pretend import CPU, choices_of, loss_marked, pretended_world, stand_in_trainer
from dist.ranks import Ranks
from dist.sharding import arrange

MAX_RANKS = 4096
# What CUDA's caching allocator rounds each tensor up to (kMinBlockSize of CUDACachingAllocator).
_CUDA_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run to plan."""

    make_module: Callable[[Any, dict[str, Any], Precision], Any]
    """(config, schema, precision) -> the recipe's LightningModule; its `layout` is set here."""
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
    """A checkpoint's bytes on this rank: what is trained, and its optimizer state."""
    host_bytes: int
    """Of host memory for this rank's optimizer, where it is offloaded."""
    layout: Layout
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
    layout = layout_of(request)
    num_micro = num_micro_batches(config.global_batch, layout.dp_size, config.micro_batch)
    precision = planned_precision(config.precision, device)
    module = request.make_module(config, request.schema, precision)
    module.layout = layout
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
        # Of modules whose inputs are no tensors, for ZeRO-3: that is meant.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        external = stack.enter_context(gathers_noted())
        mesh = module._device_mesh = make_mesh(CPU, layout)
        if layout.tp > 1:
            costs.waited_for.add(mesh["tp"].get_group().group_name)
        with without_values(fake):
            # Outside the fake mode: FSDP2 cuts every parameter into one piece a rank, which a
            # thousand times over takes half a minute of fake tensors and no time of meta ones.
            module.configure_model()
        params = sum(p.numel() for p in module.net.parameters())
        with fake:
            step = Step(
                config, request.schema, layout, mesh, module, trace, costs, num_micro,
                external, on_gpu=device.kind == "cuda",
            )  # fmt: skip
            step.remember_the_last()
            with trace:
                step.run()
        peak = trace.peak()
    rows = num_micro * step.rows * layout.dp_size
    return Plan(
        peak=peak,
        costs=costs,
        num_params=params,
        state_bytes=step.state_bytes,
        host_bytes=step.host_bytes,
        layout=layout,
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


def layout_of(request: Request) -> Layout:
    """Where rank 0 would stand; ConfigError where the sizes do not fill the world."""
    most = min(request.num_ranks, request.device.ranks_per_node)
    # Nodes hold equally many ranks.
    local = next(size for size in range(most, 0, -1) if request.num_ranks % size == 0)
    ranks = Ranks(world_size=request.num_ranks, local_world_size=local)
    return arrange(request.config.parallel, ranks)


def planned_precision(name: PrecisionName, device: Device) -> Precision:
    """What `auto` comes to on the planned device."""
    if device.kind == "cpu" or name != "auto":
        return decide_precision(name, CPU)
    if device.half != "bf16":
        return Precision(name="fp32", reason=f"auto: {device.name} has no bf16 units")
    return Precision(name="bf16-mixed", reason=f"auto: {device.name} has bf16 units")
