"""LoRA fine-tuning against TRL's SFTTrainer: one base, chats, threads and batch, in one run.

    python -m benchmarks.sft [--steps 40] [--chats 2000] [--threads 2] [--repeat 1] [--no-peer]

A random Llama of 8 million parameters and chats of log-normal lengths. Ours pads to `max_length`
(rows of one width), so TRL pads to a multiple of it too; TRL's own padding to the longest of a
batch, and our packing, are lines of their own. Loss on the assistant's tokens only. Samples a
second over the steps after the first five; the runs take turns. `python -m benchmarks.sft` needs
the Java that prep needs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.peer_env import TORCH, peer_python, run_peer

ROOT = Path(__file__).resolve().parent.parent
PEER = ["trl==1.16.0", "peft==0.21.2", TORCH]
WARM_UP = 5
STOP = "<|end_of_text|>"
# ChatML with the tokens that the tests' and the quickstart's tokenizers have.
TEMPLATE = (
    "{% for m in messages %}<|reserved_3|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end_of_text|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|end_of_text|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|reserved_3|>assistant\n{% endif %}"
)


def write_base(folder: Path) -> None:
    """A random Llama and a byte-level tokenizer of 1,024 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.make_dataset import tokenizer_json

    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=688, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_json(1024))


def write_chats(path: Path, count: int) -> None:
    """Two turns each, of log-normal lengths."""
    rng = random.Random(0)
    words = ["def", "spark", "jar", "return", "store", "self", "load", "rows", "shard", "step"]

    def text(mean: float) -> str:
        return " ".join(
            rng.choice(words) for _ in range(max(1, int(rng.lognormvariate(mean, 0.7))))
        )

    with open(path, "w") as file:
        for _ in range(count):
            turns = [("user", text(2.0)), ("assistant", text(2.8))]
            messages = [{"role": role, "content": said} for role, said in turns]
            file.write(json.dumps({"messages": messages}) + "\n")


def ours(folder: Path, packing: str, args: argparse.Namespace, examples_a_row: float) -> dict:
    """Samples a second, peak memory, checkpoint size and save seconds of our run."""
    run = folder / f"run-{packing}-{time.monotonic_ns()}"
    command = [
        sys.executable, "-m", "recipes.finetune", "--base.path", str(folder / "base"),
        "--data.url", str(folder / "data"), "--data.packing", packing, "--run", str(run),
        "--max_steps", str(args.steps), "--global_batch", "8", "--micro_batch", "8",
        "--precision", "fp32", "--parallel.strategy", "ddp", "--lora.rank", "16",
        "--optim.lr", "1e-3", "--val_rows", "8", "--log_every_steps", "1000",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    times = [json.loads(line)["time"] for line in (run / "consumed.jsonl").read_text().splitlines()]
    seconds = [b - a for a, b in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)]
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    saves = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "samples_per_s": 8 * examples_a_row * len(seconds) / sum(seconds),
        "peak_mib": max(m["peak_rss_bytes"] for m in metrics if "peak_rss_bytes" in m) / 2**20,
        "adapter_bytes": sum(p.stat().st_size for p in checkpoint.iterdir()),
        "save_s": sum(s["stall_s"] + s["write_s"] for s in saves if s.get("event") == "save"),
    }


def peer(python: str, folder: Path, pad_to: int, args: argparse.Namespace) -> dict[str, Any]:
    """The same of TRL, and its padding."""
    spec = {
        "base": str(folder / "base"), "chats": str(folder / "chats.jsonl"), "template": TEMPLATE,
        "stop": STOP, "max_length": args.max_length, "micro_batch": 8, "accumulation": 1,
        "steps": args.steps, "rank": 16, "alpha": 32, "lr": 1e-3, "pad_to": pad_to,
        "threads": args.threads, "output": str(folder / "trl"),
    }  # fmt: skip
    (folder / "spec.json").write_text(json.dumps(spec))
    found = run_peer(python, "trl_sft.py", str(folder / "spec.json"))
    seconds = found["seconds"][WARM_UP:]
    return {
        **found,
        "samples_per_s": 8 * len(seconds) / sum(seconds),
        "padding": 1 - found["tokens"] / found["slots"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--chats", type=int, default=2000)
    parser.add_argument("--max-length", type=int, default=128, dest="max_length")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--no-peer", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="leyden-sft-") as name:
        folder = Path(name)
        write_base(folder / "base")
        write_chats(folder / "chats.jsonl", args.chats)
        (folder / "template.jinja").write_text(TEMPLATE)
        prep = [
            sys.executable, "-m", "launch.cli", "prep", "chat", "--input",
            str(folder / "chats.jsonl"), "--tokenizer", str(folder / "base"), "--template",
            str(folder / "template.jinja"), "--output", str(folder / "data"), "--max_length",
            str(args.max_length), "--truncation", "right", "--stop", STOP,
        ]  # fmt: skip
        subprocess.run(prep, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        from dist.dataset import open_dataset
        from dist.examples import as_rows

        opened = open_dataset(str(folder / "data"))
        examples = opened.manifest.totals["train"]["rows"]
        packed: Any = as_rows(opened, "packed").split("train")
        padded: Any = as_rows(opened, "padded").split("train")
        python = "" if args.no_peer else peer_python("trl", PEER)
        found: dict[str, list[dict[str, Any]]] = {}
        for _ in range(args.repeat):
            found.setdefault("ours, padded", []).append(ours(folder, "padded", args, 1.0))
            if python:
                found.setdefault("TRL, padded as ours", []).append(
                    peer(python, folder, args.max_length, args)
                )
                found.setdefault("TRL, to the longest", []).append(peer(python, folder, 0, args))
            found.setdefault("ours, packed", []).append(
                ours(folder, "packed", args, examples / packed.num_rows)
            )
        waste = {"ours, padded": padded.padding, "ours, packed": packed.padding}
        print(f"{examples} chats, rows of {args.max_length}, 8 a step, {args.threads} threads")
        for line, runs in found.items():
            share = waste.get(line, runs[0].get("padding", 0.0))
            rate = statistics.median(run["samples_per_s"] for run in runs)
            print(
                f"{line:<22} {rate:8.1f} samples/s  padding {share:5.1%}  peak "
                f"{runs[0]['peak_mib']:6.0f} MiB  adapter {runs[0]['adapter_bytes'] / 1e6:5.2f} MB"
                f"  saved in {runs[0]['save_s']:.2f} s"
            )
        if python:
            for mine, theirs in (
                ("ours, padded", "TRL, padded as ours"), ("ours, padded", "TRL, to the longest"),
                ("ours, packed", "TRL, to the longest"),
            ):  # fmt: skip
                ratios = [
                    a["samples_per_s"] / b["samples_per_s"]
                    for a, b in zip(found[mine], found[theirs], strict=True)
                ]
                shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
                print(f"{mine} / {theirs}: {statistics.median(ratios):.2f} (pairs {shown})")


if __name__ == "__main__":
    main()
