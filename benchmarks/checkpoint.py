"""What a checkpoint costs training: saves in the background against saves that are waited for.

    python -m benchmarks.checkpoint --data DATASET [--config tiny] [--steps 100] [--repeat 5]
    torchrun --standalone --nproc-per-node 2 -m benchmarks.checkpoint ...    # fsdp, two ranks

A loop by hand trains windows of --steps steps that take turns: without a save, with a background
save at its start, with a save waited for. A window ends when its checkpoint is durable, so that
the work of the thread counts. Printed: the median over the repeats of the extra time of a window
as a share of the window without, and how long training stood still (copying the tensors, or the
whole save).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed

from benchmarks.by_hand import build
from dist.checkpoint import CheckpointSaver
from dist.checkpoint_folder import COMMIT, checkpoint_name
from dist.config import parse_config
from dist.dataset import open_dataset
from dist.loader import LoaderPlan, TokenLoader
from dist.optim import adamw
from dist.order import Order
from recipes.pretrain import Config

MODES = ("none", "background", "waited for")
RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def start_ranks() -> torch.device:
    """Join the other ranks, if there are any; this one's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1:
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        )
        if device.type == "cpu":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // WORLD_SIZE))
    return device


def same_on_all(value: str) -> str:
    """Rank 0's value."""
    box = [value]
    if WORLD_SIZE > 1:
        torch.distributed.broadcast_object_list(box)
    return box[0]


def make_training(
    data: str, config_name: str, device: torch.device
) -> tuple[torch.nn.Module, torch.optim.Optimizer, Callable[[int], None]]:
    """A model, its optimizer, and a function that trains the next n steps."""
    configs = Path(__file__).parent.parent / "recipes" / "configs"
    argv = ["--config", config_name, "--max_steps", "1000000000"]
    config = parse_config(
        Config, argv, prog="checkpoint", description="", configs=configs, prefix="pretrain_"
    )
    dataset = open_dataset(data)
    strategy = "fsdp" if WORLD_SIZE > 1 else "none"
    net = build(config, dataset.manifest.schema, device, strategy)
    optimizer = adamw(net.named_parameters(), config.optim)
    split = dataset.split("train")
    plan = LoaderPlan(
        batch=config.global_batch,
        micro_batch=config.micro_batch,
        rank=RANK,
        world_size=WORLD_SIZE,
        end_step=10**9,
    )

    def batches() -> Iterator[object]:
        with TokenLoader(dataset, split, Order(split.num_rows, config.seed), plan) as loader:
            yield from loader

    stream = batches()

    def train(steps: int) -> None:
        done = 0
        while done < steps:
            batch = next(stream)
            (net(batch.to(device)) / max(batch.step_targets, 1)).backward()  # type: ignore[attr-defined]
            if batch.ends_step:  # type: ignore[attr-defined]
                torch.nn.utils.clip_grad_norm_(net.parameters(), config.optim.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
                done += 1
        if device.type == "cuda":
            torch.cuda.synchronize()

    return net, optimizer, train


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="data/quickstart/dataset")
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where checkpoints go (a temporary folder)")
    args = parser.parse_args()
    device = start_ranks()
    net, optimizer, train = make_training(args.data, args.config, device)
    saver = CheckpointSaver(device)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    still: dict[str, list[float]] = {mode: [] for mode in MODES}
    write_s, num_bytes = [], 0
    train(10)
    with tempfile.TemporaryDirectory(prefix="leyden-bench-", dir=args.folder) as own:
        folder = same_on_all(own)
        for repeat in range(args.repeat + 1):
            for mode in MODES:
                start = time.perf_counter()
                path = Path(folder) / checkpoint_name(repeat, 0)
                if mode != "none":
                    saver.start(path, net, optimizer, {"repeat": repeat})
                saved = saver.wait() if mode == "waited for" else None
                stood_still_s = time.perf_counter() - start
                train(args.steps)
                saved = saver.wait() if mode == "background" else saved
                window_s = time.perf_counter() - start
                if saved is not None:
                    assert not saved.failure, saved.failure
                    if RANK == 0:
                        listed = json.loads((path / COMMIT).read_bytes())["files"]
                        num_bytes = sum(facts["bytes"] for facts in listed.values())
                        shutil.rmtree(path)
                if repeat == 0:
                    continue  # buffers are made and lazy imports done
                seconds[mode].append(window_s)
                still[mode].append(stood_still_s)
                if saved is not None and mode == "background":
                    write_s.append(saved.write_s)
            if repeat and RANK == 0:
                print(", ".join(f"{mode} {seconds[mode][-1]:.3f} s" for mode in MODES), flush=True)
    plain = statistics.median(seconds["none"])
    share = {
        mode: statistics.median(
            (with_save - without) / without
            for with_save, without in zip(seconds[mode], seconds["none"], strict=True)
        )
        for mode in MODES[1:]
    }
    found = {
        "window_s": plain,
        "background_extra": share["background"],
        "background_stands_still": statistics.median(still["background"]) / plain,
        "background_write_s": statistics.median(write_s),
        "waited_for_extra": share["waited for"],
        "waited_for_stands_still": statistics.median(still["waited for"]) / plain,
        "checkpoint_mb": num_bytes / 1e6,
    }
    if RANK == 0:
        print(json.dumps({**found, "ranks": WORLD_SIZE, **vars(args)}))
    if WORLD_SIZE > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
