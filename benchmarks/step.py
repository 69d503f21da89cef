"""Time of a training step of the pretrain recipe against a hand-written loop, on one process.

    python -m benchmarks.step --data DATASET [--config tiny] [--steps 60] [--repeat 3]

Both train the same model on the same batches with the same optimizer and clipping. The loop by
hand has no Lightning, no records, no checkpoints, no agreement on stopping. Median step seconds,
the first ten steps left out; the two take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

WARM_UP = 10


def recipe_step_s(data: str, config: str, steps: int) -> float:
    """Median step of `python -m recipes.pretrain`, from its metrics.jsonl."""
    with tempfile.TemporaryDirectory(prefix="leyden-bench-") as folder:
        command = [
            *(sys.executable, "-m", "recipes.pretrain", "--config", config, "--data.url", data),
            *("--max_steps", str(steps), "--run", f"{folder}/run", "--val_rows", "1"),
            *("--log_every_steps", "1", "--save_every_steps", "0", "--parallel.strategy", "ddp"),
        ]
        subprocess.run(command, check=True, capture_output=True)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    seconds = [record["step_s"] for record in records if "step_s" in record]
    return statistics.median(seconds[WARM_UP:])


def by_hand_step_s(data: str, config_name: str, steps: int) -> float:
    """Median step of the shortest loop that trains the same."""
    from dist.activation import checkpoint_blocks
    from dist.config import parse_config
    from dist.dataset import open_dataset
    from dist.initialise import materialise
    from dist.loader import LoaderPlan, TokenLoader
    from dist.optim import adamw, lr_schedule
    from dist.order import Order
    from dist.precision import decide_precision
    from recipes import llama
    from recipes.pretrain import Config

    configs = Path(__file__).parent.parent / "recipes" / "configs"
    argv = ["--config", config_name, "--max_steps", str(steps)]
    config = parse_config(
        Config, argv, prog="step", description="", configs=configs, prefix="pretrain_"
    )
    dataset, device = open_dataset(data), torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
    net = llama.build(config.model, dataset.manifest.schema)
    checkpoint_blocks(llama.blocks(net), config.activation_checkpointing)
    precision = decide_precision(config.precision, device)
    llama.set_precision(net, precision, by_policy=False)
    materialise(net, device, config.seed, config.model.init_std)
    optimizer = adamw(net.named_parameters(), config.optim)
    factor = lr_schedule(config.optim, steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    split = dataset.split("train")
    plan = LoaderPlan(batch=config.global_batch, micro_batch=config.micro_batch, end_step=steps)
    seconds = []
    with TokenLoader(dataset, split, Order(split.num_rows, config.seed), plan) as loader:
        started, targets = time.perf_counter(), 1
        for batch in loader:
            targets = max(batch.step_targets, 1)
            (net(batch.to(device)) / targets).backward()
            if not batch.ends_step:
                continue
            torch.nn.utils.clip_grad_norm_(net.parameters(), config.optim.clip_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
    return statistics.median(seconds[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="data/quickstart/dataset")
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    pairs = []
    for _ in range(args.repeat):
        recipe = recipe_step_s(args.data, args.config, args.steps)
        by_hand = by_hand_step_s(args.data, args.config, args.steps)
        pairs.append((recipe, by_hand, by_hand / recipe))
        print(f"recipe {recipe:.4f} s, by hand {by_hand:.4f} s, speed {by_hand / recipe:.3f}")
    recipe, by_hand, speed = (statistics.median(column) for column in zip(*pairs, strict=True))
    found = {"recipe_step_s": recipe, "by_hand_step_s": by_hand, "speed": speed}
    print(json.dumps({**found, **vars(args)}))


if __name__ == "__main__":
    main()
