"""The one command for a machine with a GPU: speed, memory, where time goes, and who waits.

    python -m benchmarks.gpu [--output build/benchmarks/gpu] [--config 1b] [--steps 20]
    python -m benchmarks.gpu --device cpu --config tiny --steps 3      # the same path, anywhere

Trains the pretrain recipe on one rank, on shards that it makes itself (benchmarks/gpu_data.py), in
bf16-mixed and bf16-true, with torch.compile per block and without. For each: tokens/s, MFU in
both conventions (the whole and the causal attention), measured peak memory against what
`leyden plan` says, the ten largest costs of a profile, and how often the host waited for the
device in steps that do not log (the goal is 0). Prints one table; OUTPUT holds gpu.json and
the traces. Goal: 55 % MFU for 1B on one H100. Without CUDA it ends with code 4.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_data import write_text_dataset
from dist.trace_summary import host_waits, read_trace, top_costs

PROFILED_STEPS = 2
NO_CUDA = 4
# bf16-true needs stochastic rounding, which needs fsdp; on one rank nothing is sharded.
CASES: dict[str, list[str]] = {
    "bf16-mixed": ["--precision", "bf16-mixed", "--compile", "off"],
    "bf16-mixed, blocks": ["--precision", "bf16-mixed", "--compile", "blocks"],
    "bf16-true": ["--precision", "bf16-true", "--compile", "off"],
    "bf16-true, blocks": ["--precision", "bf16-true", "--compile", "blocks"],
}
TRUE = ["--parallel.strategy", "fsdp", "--optim.stochastic_rounding", "true"]
# Names of devices for leyden plan, by a part of what CUDA calls them; longer parts first.
PLANNED = {
    "H200": "h200", "H100": "h100", "B200": "b200", "A100-SXM4-80GB": "a100-80",
    "A100 80GB": "a100-80", "A100": "a100-40", "L40S": "l40s", "4090": "rtx4090",
}  # fmt: skip


def device_name(device: str) -> str:
    """What CUDA calls the first device, '' without one; asked in a process of its own, which
    leaves all memory to the runs."""
    if device == "cpu":
        return "cpu"
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def shape_words(args: argparse.Namespace) -> list[str]:
    """What run and plan are both told."""
    return [
        *("--config", args.config, "--global_batch", str(args.global_batch)),
        *("--micro_batch", str(args.micro_batch)),
        *("--activation_checkpointing", args.activation_checkpointing),
    ]


def train(args: argparse.Namespace, case: str, data: str, output: Path) -> dict[str, Any]:
    """One run of the recipe: warm-up, the measured steps, then a few under the profiler."""
    steps = args.steps
    first = 2 * steps  # no log falls into the profiled steps, as a log waits for the device
    words = [*shape_words(args), *CASES[case], *(TRUE if case.startswith("bf16-true") else [])]
    words += ["--data.url", data, "--max_steps", str(first + PROFILED_STEPS + 1)]
    words += ["--log_every_steps", str(steps), "--save_every_steps", "0", "--val_rows", "1"]
    words += ["--profile.steps", f"[{first}, {first + PROFILED_STEPS}]"]
    environment = dict(os.environ)
    if args.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(prefix="leyden-gpu-") as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "recipes.pretrain", *words, "--run", str(run)]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            return {"failed": done.returncode, "said": done.stderr[-2000:], "command": command}
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        measured = next(line for line in lines if line.get("step") == first)
        trace = output / f"{case.replace(', ', '-')}.trace.json"
        shutil.copy(run / "profile" / "rank-0.json", trace)
    events = read_trace(trace)
    memory = measured.get("peak_memory_bytes", measured.get("peak_rss_bytes"))
    return {
        **{key: measured.get(key) for key in ("tokens_per_s", "step_s", "mfu", "mfu_causal")},
        "loss": measured["loss"], "peak_memory_bytes": memory, "trace": str(trace),
        "host_waits": host_waits(events), "profiled_steps": PROFILED_STEPS,
        "top_costs": [asdict(cost) for cost in top_costs(events)],
        "wall_s": time.monotonic() - started, "command": command,
    }  # fmt: skip


def planned_bytes(args: argparse.Namespace, case: str, data: str, name: str) -> dict[str, Any]:
    """What `leyden plan` says of the same run; its error's text where it cannot say."""
    device = next((word for part, word in PLANNED.items() if part in name), "cpu")
    words = [*shape_words(args), *CASES[case][:2], *(TRUE if "true" in case else [])]
    command = [sys.executable, "-m", "recipes.plan", "pretrain", "--device", device, "--json"]
    done = subprocess.run([*command, *words, "--data.url", data], capture_output=True, text=True)
    try:
        record = json.loads(done.stdout)
    except ValueError:
        return {"failed": done.returncode, "said": done.stderr[-1000:]}
    return {"peak_bytes": record["peak_bytes"], "device": device, "step_s": record["step_s"]}


def row(case: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    if "failed" in found:
        said = found["said"].strip().splitlines()[-1:]
        return f"| {case} | failed ({found['failed']}): {''.join(said)[:80]} | | | | | |"
    planned = found["plan"].get("peak_bytes")
    measured = found["peak_memory_bytes"]
    cells = [
        case,
        f"{found['tokens_per_s']:,.0f}",
        " / ".join("-" if found[k] is None else f"{found[k]:.1%}" for k in ("mfu", "mfu_causal")),
        "-" if measured is None else f"{measured / 2**30:.2f} GiB",
        "-" if planned is None else f"{planned / 2**30:.2f} GiB",
        "-" if planned is None or measured is None else f"{planned / measured:.2f}",
        f"{sum(found['host_waits'].values()) / found['profiled_steps']:g}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """0; 1 if a case failed; 4 without CUDA."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--config", default="1b")
    parser.add_argument("--steps", type=int, default=20, help="measured steps, and warm-up steps")
    parser.add_argument("--seq-len", type=int, default=0, help="2048; on cpu 64")
    parser.add_argument("--vocab-size", type=int, default=0, help="128256; on cpu 512")
    parser.add_argument("--micro-batch", type=int, default=0, help="8; on cpu 2")
    parser.add_argument("--global-batch", type=int, default=0, help="32; on cpu 4")
    parser.add_argument("--activation_checkpointing", default="none")
    parser.add_argument("--cases", default=";".join(CASES), help="some of them, by ;")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/gpu"))
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    args.seq_len = args.seq_len or (64 if on_cpu else 2048)
    args.vocab_size = args.vocab_size or (512 if on_cpu else 128_256)
    args.micro_batch = args.micro_batch or (2 if on_cpu else 8)
    args.global_batch = args.global_batch or (4 if on_cpu else 32)
    if args.steps < 3:
        parser.error("--steps must be at least 3: a log would fall into the profiled steps")
    cases = args.cases.split(";")
    if unknown := [case for case in cases if case not in CASES]:
        parser.error(f"no case {unknown[0]!r}; there are: {'; '.join(CASES)}")
    name = device_name(args.device)
    if not name:
        print("error: no CUDA device here; --device cpu runs the same path", file=sys.stderr)
        return NO_CUDA
    args.output.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"device": name, "options": {**vars(args), "output": str(args.output)}}
    print(f"{args.config}, rows of {args.seq_len}, {args.global_batch} a step, {name}", flush=True)
    print("| case | tokens/s | MFU / causal | measured peak | plan | plan/measured | host waits "
          "a step |\n|---|---|---|---|---|---|---|", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="leyden-gpu-data-") as folder:
        num_rows = (2 * args.steps + PROFILED_STEPS + 1) * args.global_batch
        data = write_text_dataset(
            Path(folder), vocab_size=args.vocab_size, seq_len=args.seq_len, num_rows=num_rows
        ).reference
        for case in cases:
            found = train(args, case, data, args.output)
            if "failed" not in found:
                found["plan"] = planned_bytes(args, case, data, name)
            record[case] = found
            print(row(case, found), flush=True)
            (args.output / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    for case in cases:
        for cost in record[case].get("top_costs", []):
            print(f"{case}: {cost['share']:6.1%} {cost['seconds']:8.4f} s {cost['calls']:6} x "
                  f"{cost['name'][:90]}")  # fmt: skip
        if record[case].get("host_waits"):
            print(f"{case}: host waits in {PROFILED_STEPS} steps: {record[case]['host_waits']}")
    return 1 if any("failed" in record[case] for case in cases) else 0


if __name__ == "__main__":
    sys.exit(main())
