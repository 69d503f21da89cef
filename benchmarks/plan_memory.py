"""The memory plan against the memory that a real run of the pretrain recipe allocates.

    python -m benchmarks.plan_memory --data DATASET [--config tiny] [--device h100]

One rank, three steps; on a GPU the peak is torch.cuda.max_memory_allocated, on a CPU the peak of
what the profiler sees allocated. Prints the plan, the measurement and the ratio.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

STEP_END = "leyden step end"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Bytes of one rank of a real run."""

    peak: int
    """Most tensor memory at once, up to the end of the last optimizer step."""
    parameters: int
    optimizer: int


def measure(config: Any) -> Measured:
    """Run the pretrain recipe as this rank and measure it; for a process of its own."""
    import torch
    from torch.autograd.profiler import record_function
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from dist.ranks import Ranks
    from recipes.pretrain import run

    held = {"parameters": 0, "optimizer": 0, "cuda": 0}

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        states = [one for state in optimizer.state.values() for one in state.values()]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        held["parameters"] = sum(map(_local_bytes, parameters))
        held["optimizer"] = sum(_local_bytes(one) for one in states if torch.is_tensor(one))
        with record_function(STEP_END):
            pass
        if torch.cuda.is_available():
            held["cuda"] = torch.cuda.max_memory_allocated()

    handle = register_optimizer_step_post_hook(look)
    config = replace(config, max_steps=3, save_every_steps=0, async_save=False, val_rows=1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)
    with profiler as profile, ExitStack() as stack:
        run(config, Ranks.from_environment(), stack)
    handle.remove()
    peak = held["cuda"] or _profiled_peak(profile)
    return Measured(peak=peak, parameters=held["parameters"], optimizer=held["optimizer"])


def _local_bytes(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def _profiled_peak(profile: Any) -> int:
    """Largest running sum of the CPU allocator's events before the last step's end."""
    events = list(profile.profiler.kineto_results.events())
    end_ns = max(event.start_ns() for event in events if event.name() == STEP_END)
    memory = sorted(
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and event.start_ns() < end_ns
    )
    total = peak = 0
    for _, change in memory:
        total += change
        peak = max(peak, total)
    return peak


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
