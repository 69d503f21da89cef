"""How long a step would take: a roofline over the traced operations and messages.

An estimate under assumptions that are printed with it (ASSUMPTIONS), meant to compare plans and to
tell hours from weeks; on a machine that runs, dist.meter measures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dist.devices import Device
from dist.memory_plan import Plan
from dist.op_cost import Costs, Message, Op

MATMUL_SHARE = 0.70
MEMORY_SHARE = 0.80
LINK_SHARE = 0.75
KERNEL_S = 5e-6
NODE_HOP_S, NETWORK_HOP_S = 1.5e-6, 6e-6

ASSUMPTIONS = (
    f"matrix work runs at {MATMUL_SHARE:.0%} of the peak, other work at {MEMORY_SHARE:.0%} of the "
    f"memory's bandwidth, links at {LINK_SHARE:.0%}",
    f"an operation on a GPU takes at least {KERNEL_S * 1e6:.0f} us (eager, no torch.compile)",
    "collectives are rings over all links of a node and overlap with forward and backward fully "
    "(tensor parallelism's and those between replicas of tp not at all), "
    f"{NETWORK_HOP_S * 1e6:.0f} us a hop between nodes",
    "rows are full, one document each: attention at its longest; no wait for data, validation or "
    "checkpoints",
)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step."""

    seconds: float
    compute_s: float
    """Of that, what computing alone would take."""
    communication_s: float
    """What communication alone would take; overlapped with computing but for tp's."""
    flops: float
    """Executed by one rank in a step, recomputation included."""
    tokens_per_s: float
    """Over all ranks."""
    utilisation: float
    """Executed FLOPs over the peak of the dtype that computes."""

    def days(self, max_steps: int) -> float:
        return self.seconds * max_steps / 86400


def step_time(plan: Plan, device: Device) -> StepTime:
    """Estimate a step from what was traced; micro-batches between first and last are firsts."""
    compute, communication, total, flops = 0.0, 0.0, 0.0, 0
    for phase in sorted({*plan.costs.ops, *plan.costs.messages}):
        times = plan.num_micro - 1 if "earlier" in phase else 1
        ops = plan.costs.ops.get(phase, [])
        here = sum(op_seconds(op, device) for op in ops)
        messages = plan.costs.messages.get(phase, [])
        sent = sum(message_seconds(one, device) for one in messages)
        overlaps = phase.startswith(("forward", "backward"))
        waited = sum(
            message_seconds(one, device) for one in messages if one.waited_for or not overlaps
        )
        compute += times * here
        communication += times * sent
        total += times * (waited + max(here, sent - waited))
        flops += times * sum(op.flops for op in ops)
    peak = device.bf16_flops if plan.precision.name == "bf16-mixed" else device.fp32_flops
    return StepTime(
        seconds=total,
        compute_s=compute,
        communication_s=communication,
        flops=flops,
        tokens_per_s=plan.tokens_per_step / total,
        utilisation=flops / (total * peak),
    )


def op_seconds(op: Op, device: Device) -> float:
    """The slower of computing and of moving bytes."""
    peak = device.bf16_flops if op.half else device.fp32_flops
    least = KERNEL_S if device.kind == "cuda" else 0.0
    memory_s = op.bytes / (device.memory_bytes_per_s * MEMORY_SHARE)
    return max(op.flops / (peak * MATMUL_SHARE), memory_s, least)


def message_seconds(message: Message, device: Device) -> float:
    """A ring over the group: each rank passes on all parts but one, an all-reduce twice.

    The rings of a node leave it by different adapters, so a node's ranks share their sum.
    """
    ranks = message.ranks
    if ranks == 1:
        return 0.0
    local = min(ranks, device.ranks_per_node)
    nodes = -(-ranks // device.ranks_per_node)
    rate = device.node_bytes_per_s
    if nodes > 1:
        rate = min(rate, local * device.network_bytes_per_s)
    rounds = 2 if message.kind == "all_reduce" else 1
    network_hops = nodes if nodes > 1 else 0
    hops_s = network_hops * NETWORK_HOP_S + (ranks - 1 - network_hops) * NODE_HOP_S
    moved = message.bytes * (ranks - 1) / ranks
    return rounds * (moved / (rate * LINK_SHARE) + hops_s)


def total_bytes(messages: Iterable[Message]) -> int:
    """Sum of the messages' sizes."""
    return sum(message.bytes for message in messages)


def wire_bytes(costs: Costs) -> int:
    """Bytes of all traced collectives."""
    return sum(total_bytes(messages) for messages in costs.messages.values())
