"""A memory plan as a table, and what fits into a device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dist.devices import Device
from dist.memory_plan import Plan
from dist.step_time import ASSUMPTIONS, StepTime

GIB = float(1 << 30)
# Outside torch's tensors on a GPU: the CUDA context, cuBLAS workspaces, NCCL's channels. About
# 0.5 GiB alone, more with NCCL; and blocks that the caching allocator cannot use.
_OUTSIDE_GIB = {"cuda": 2.0, "cpu": 0.75}
_UNUSABLE_SHARE = {"cuda": 0.06, "cpu": 0.0}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration, planned."""

    name: str
    """What is different from the one asked for; '' for that one."""
    ranks: int
    strategy: str
    micro_batch: int
    checkpointing: str
    device: Device
    plan: Plan
    time: StepTime

    @property
    def needed_gib(self) -> float:
        """Of one device: tensors, what the allocator cannot use, what is not tensors."""
        tensors = self.plan.peak.total / GIB
        kind = self.device.kind
        return tensors * (1 + _UNUSABLE_SHARE[kind]) + _OUTSIDE_GIB[kind]

    @property
    def fits(self) -> bool:
        return self.needed_gib <= self.device.memory_gib


def case_record(case: Case, max_steps: int) -> dict[str, Any]:
    """The case as JSON."""
    plan, time = case.plan, case.time
    return {
        "change": case.name,
        "ranks": case.ranks,
        "strategy": case.strategy,
        "micro_batch": case.micro_batch,
        "activation_checkpointing": case.checkpointing,
        "fits": case.fits,
        "device": asdict(case.device),
        "needed_gib": round(case.needed_gib, 3),
        "peak_bytes": plan.peak.total,
        "peak_phase": plan.peak.phase,
        "categories_bytes": plan.peak.categories,
        "parameters": plan.num_params,
        "precision": plan.precision.name,
        "micro_batches": plan.num_micro,
        "checkpoint_bytes": plan.state_bytes,
        "host_bytes": plan.host_bytes,
        "step_s": time.seconds,
        "compute_s": time.compute_s,
        "communication_s": time.communication_s,
        "flops": time.flops,
        "utilisation": time.utilisation,
        "tokens_per_step": plan.tokens_per_step,
        "tokens_per_s": time.tokens_per_s,
        "days": time.days(max_steps),
        "assumptions": [*ASSUMPTIONS, _reserve(case)],
    }


def case_text(case: Case, title: str, max_steps: int) -> str:
    """The plan of one configuration as a page."""
    plan, time, device = case.plan, case.time, case.device
    ranks = f"{case.ranks:,} rank{'s' if case.ranks > 1 else ''} of {device.name}"
    lines = [
        f"{title}: {plan.num_params / 1e6:,.1f}M parameters, {case.strategy} on {ranks}, "
        f"{plan.precision.name}",
        f"a step: {plan.tokens_per_step:,} tokens, {plan.num_micro} micro-batch"
        f"{'es' if plan.num_micro > 1 else ''} of {case.micro_batch} rows a rank, activation "
        f"checkpointing {case.checkpointing}",
        "",
        f"memory of one rank at its peak ({plan.peak.phase})",
    ]
    lines += [
        f"  {name:<24} {size_text(size)}" for name, size in plan.peak.categories.items() if size
    ]
    lines += [
        f"  {'tensors in all':<24} {size_text(plan.peak.total)}",
        f"  {'needed':<24} {case.needed_gib:9.2f} GiB of {device.memory_gib:.1f} GiB: "
        f"{'fits' if case.fits else 'DOES NOT FIT'}",
        f"  {'checkpoint, host memory':<24} {size_text(plan.state_bytes)}",
        *(
            [f"  {'optimizer, host memory':<24} {size_text(plan.host_bytes)}"]
            if plan.host_bytes
            else []
        ),
        "",
        "time of one step (an estimate)",
        f"  {'step':<24} {time.seconds:9.3f} s",
        f"  {'computing alone':<24} {time.compute_s:9.3f} s",
        f"  {'communication alone':<24} {time.communication_s:9.3f} s",
        f"  {'FLOPs a rank':<24} {time.flops / 1e12:9.2f} T, {time.utilisation:.0%} of the peak, "
        "what is computed again included",
        f"  {'tokens/s':<24} {time.tokens_per_s:9,.0f}",
        f"  {f'{max_steps:,} steps':<24} {days_text(time.days(max_steps))}",
        "",
        "assumed",
        *(f"  {one}" for one in (*ASSUMPTIONS, _reserve(case))),
    ]
    if plan.padded_rows:
        lines += ["", f"note: {plan.padded_rows:,} rows of each step are padding: global_batch "
                  f"does not divide over {case.ranks:,} ranks"]  # fmt: skip
    return "\n".join(lines)


def _reserve(case: Case) -> str:
    kind = case.device.kind
    return (
        f"needed = tensors + {_UNUSABLE_SHARE[kind]:.0%} that the allocator cannot use + "
        f"{_OUTSIDE_GIB[kind]} GiB outside tensors; scratch inside kernels is not counted"
    )


def table(cases: list[Case], *, changes: bool = True) -> str:
    """Several configurations, one a line."""
    rows = [line(case, changes=changes) for case in cases]
    return "\n".join([heading(changes=changes), *rows])


def heading(*, changes: bool) -> str:
    """Of `line`."""
    head = (
        f"{'ranks':>6}  {'strategy':<16} {'micro':>5}  {'ckpt':<5} {'needed GiB':>10}  "
        f"{'fits':<5} {'step s':>9} {'tokens/s':>12}"
    )
    return head + ("  change" if changes else "")


def line(case: Case, *, changes: bool) -> str:
    """One configuration."""
    row = (
        f"{case.ranks:>6}  {case.strategy:<16} {case.micro_batch:>5}  {case.checkpointing:<5} "
        f"{case.needed_gib:>10.2f}  {'yes' if case.fits else 'no':<5} {case.time.seconds:>9.3f} "
        f"{case.time.tokens_per_s:>12,.0f}"
    )
    return row + (f"  {case.name}" if changes else "")


def size_text(size: float) -> str:
    """Bytes in the unit that suits them."""
    if size >= GIB / 10:
        return f"{size / GIB:9.2f} GiB"
    return f"{size / (1 << 20):9.2f} MiB"


def days_text(days: float) -> str:
    """Days, or hours or minutes where those are few."""
    if days >= 2:
        return f"{days:9.1f} days"
    if days >= 2 / 24:
        return f"{days * 24:9.1f} hours"
    return f"{days * 1440:9.1f} minutes"
