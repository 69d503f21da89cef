"""The memory plan against the memory that a real run of the pretrain recipe allocates.

    python -m benchmarks.plan_memory --data DATASET [--config tiny] [--device h100]

One rank, eight steps; on a GPU the peak is torch.cuda.max_memory_allocated, on a CPU the peak of
what the profiler sees allocated. Prints the plan, the measurement and the ratio.
"""

from __future__ import annotations

import argparse
import bisect
import json
import multiprocessing
import sys
import tempfile
import typing
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

STEP = "leyden optimizer step"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Bytes of one rank of a real run."""

    peak: int
    """Most tensor memory at once in a step."""
    parameters: int
    optimizer: int


def measure(config: Any) -> Measured:
    """Run the config's recipe as this rank and measure it; for a process of its own."""
    import torch
    from torch.autograd.profiler import record_function
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from dist.ranks import Ranks

    recipe = sys.modules[type(config).__module__]
    # The recipe's LightningModule.
    owner = typing.get_type_hints(recipe.module_to_plan)["return"]
    held = {"parameters": 0, "optimizer": 0, "cuda": 0}
    kept: set[int] = set()

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        states = [one for state in optimizer.state.values() for one in state.values()]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        held["parameters"] = sum(map(_local_bytes, parameters))
        held["optimizer"] = sum(_local_bytes(one) for one in states if torch.is_tensor(one))
        kept.clear()
        kept.update(storages())
        if torch.cuda.is_available():
            held["cuda"] = torch.cuda.max_memory_allocated()

    def marked(module: Any, optimizer: Any) -> None:
        with record_function(STEP):
            pass
        before(module, optimizer)

    before = owner.on_before_optimizer_step
    handle = register_optimizer_step_post_hook(look)
    config = replace(config, max_steps=8, save_every_steps=0, async_save=False, val_rows=1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)
    # Not the hook above: DeepSpeed's optimizers step once a group.
    patched = patch.object(owner, "on_before_optimizer_step", marked)
    with profiler as profile, ExitStack() as stack, patched:
        recipe.run(config, Ranks.from_environment(), stack)
    handle.remove()
    peak = held["cuda"] or _profiled_peak(profile, kept)
    return Measured(peak=peak, parameters=held["parameters"], optimizer=held["optimizer"])


def _local_bytes(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def storages() -> set[int]:
    """Addresses of the memory of all tensors that there are."""
    import gc

    import torch
    from torch._subclasses.fake_tensor import is_fake
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    found = set()
    gc.unfreeze()  # get_objects leaves out what dist.training.LongLived has frozen
    for one in gc.get_objects():
        # Not isinstance, which asks proxies for their class.
        if not issubclass(type(one), torch.Tensor) or one.device.type != "cpu":
            continue
        # DTensor and what a collective gives have no memory but that of a tensor they hold, found
        # by itself; DTensor works out shapes on fake ones, which lie about until collected.
        if not is_traceable_wrapper_subclass(one) and not is_fake(one):
            found.add(one.untyped_storage().data_ptr())
    return found


def _profiled_peak(profile: Any, kept: set[int]) -> int:
    """Most bytes at once of the CPU allocator from one optimizer step to the next, the least of
    those between the first and the last. kept: addresses in use at the last step.

    The profiler sees the frees of this thread only. A tensor that goes through a collective is
    now and then freed by a thread of gloo instead, which lets go of its work a moment after the
    collective has ended; summed up blindly such bytes would stay for ever, some more in each step.
    So memory whose address is given out again was free, and what a collective has allocated
    itself, or what no free is seen of, counts to the end of the first collective after it; but
    for what is still there at the end.
    """
    made, freed, collectives, steps = _events(profile)
    changes: list[tuple[int, int]] = []
    live: dict[int, tuple[int, int, bool]] = {}  # address -> start, size, by a collective

    def close(address: int, at: int) -> None:
        start, size, _ = live.pop(address)
        changes.extend(((start, size), (at, -size)))

    for at, address, size, inside in sorted(made + freed):
        if size < 0:
            if address in live:
                close(address, at)
            continue
        if address in live:
            start = live[address][0]
            close(address, min(at, _first_after(collectives, start)))
        live[address] = (at, size, inside)
    for address, (start, _, inside) in list(live.items()):
        # From the second step on nothing new is kept; and DDP's first buckets, which the second
        # backward replaces, are not.
        unseen = inside or start > steps[1] or address not in kept
        close(address, _first_after(collectives, start) if unseen else steps[-1] + 1)
    total, peaks = 0, [0] * len(steps)
    for at, change in sorted(changes):
        total += change
        step = bisect.bisect_left(steps, at)
        if step < len(steps):
            peaks[step] = max(peaks[step], total)
    # What the last step leaves is not seen freed either.
    return min(peaks[1:-1])


def _first_after(collectives: list[tuple[int, int]], start: int) -> int:
    """When the first collective ends that goes on or begins after `start`, ns."""
    return min((end for _, end in collectives if end >= start), default=start)


Allocation = tuple[int, int, int, bool]


def _events(
    profile: Any,
) -> tuple[list[Allocation], list[Allocation], list[tuple[int, int]], list[int]]:
    """Allocations and frees (ns, address, bytes, whether a collective made it), collectives
    (start and end, ns), and when the optimizer's steps began."""
    made: list[Allocation] = []
    freed: list[Allocation] = []
    collectives: list[tuple[int, int]] = []
    steps: list[int] = []

    def walk(node: Any, inside: bool) -> None:
        if node.tag.name == "Allocation":
            fields = node.extra_fields
            event = (node.start_time_ns, fields.ptr, fields.alloc_size, inside)
            (made if fields.alloc_size > 0 else freed).append(event)
        elif node.name == STEP:
            steps.append(node.start_time_ns)
        elif node.name.startswith("c10d::"):
            collectives.append((node.start_time_ns, node.end_time_ns))
            inside = True
        for child in node.children:
            walk(child, inside)

    for root in profile.profiler.kineto_results.experimental_event_tree():
        walk(root, False)
    return made, freed, collectives, sorted(steps)


def compare(words: Sequence[str], data: str, device: str) -> dict[str, Any]:
    """Plan and measure the recipe on one rank; the figures of both."""
    from recipes.plan import case_of, parse

    asked, _ = parse(["pretrain", "--device", device, "--data.url", data, *words])
    case = case_of(asked)
    with tempfile.TemporaryDirectory(prefix="leyden-bench-") as folder:
        config = replace(asked.config, run=str(Path(folder) / "run"))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured = pool.apply(measure, (config,))
    planned = case.plan.peak
    return {
        "planned_bytes": planned.total,
        "measured_bytes": measured.peak,
        "ratio": planned.total / measured.peak,
        "planned": planned.categories,
        "measured": asdict(measured),
        "planned_step_s": case.time.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a packed-token dataset")
    parser.add_argument("--device", default="cpu", help="what this machine has, as in leyden plan")
    options, rest = parser.parse_known_args()
    print(json.dumps(compare(rest, options.data, options.device), indent=1))


if __name__ == "__main__":
    main()
