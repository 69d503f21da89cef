"""The training loop that an expert writes with torch alone: the peer of benchmarks/step.py.

    python -m benchmarks.by_hand DATASET CONFIG MICRO_BATCH STEPS none
    torchrun --standalone --nproc-per-node 2 -m benchmarks.by_hand DATASET CONFIG 2 STEPS fsdp

The same model, rows, optimizer, clipping and learning rate as recipes/pretrain.py, sharded by
torch's own calls; no Lightning, records, checkpoints or agreement on stopping. The batches come
from our loader, which every rank asks for its part; the ranks add up a step's targets themselves.
The last line of rank 0 is JSON: the seconds of each step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from dist.activation import checkpoint_blocks
from dist.config import parse_config
from dist.dataset import open_dataset
from dist.initialise import materialise
from dist.loader import LoaderPlan, TokenLoader
from dist.optim import adamw, lr_schedule
from dist.order import Order
from dist.precision import decide_precision
from dist.sharding import ddp_options
from recipes import llama
from recipes.pretrain import Config


def build(config: Config, schema: dict[str, Any], device: torch.device, strategy: str) -> Any:
    """The model, sharded by `strategy`: none, ddp or fsdp."""
    net = llama.build(config.model, schema)
    checkpoint_blocks(llama.blocks(net), config.activation_checkpointing)
    precision = decide_precision(config.precision, device)
    if strategy == "fsdp":
        policy = MixedPrecisionPolicy()
        if precision.name == "bf16-mixed":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        for block in llama.blocks(net):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(net, mesh=mesh, mp_policy=policy)
    llama.set_precision(net, precision, by_policy=strategy == "fsdp")
    materialise(net, device, config.seed, config.model.init_std)
    if strategy == "ddp":
        devices = [device.index] if device.type == "cuda" else None
        # No broadcast of buffers, which are constants; torch 2.13 renamed that option.
        return DistributedDataParallel(net, device_ids=devices, **ddp_options())
    return net


def train(config: Config, data: str, strategy: str) -> list[float]:
    """Seconds of each optimizer step."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if strategy != "none":
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend)
    if device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    dataset = open_dataset(data)
    net = build(config, dataset.manifest.schema, device, strategy)
    optimizer = adamw(net.named_parameters(), config.optim)
    factor = lr_schedule(config.optim, config.max_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    split = dataset.split("train")
    plan = LoaderPlan(
        batch=config.global_batch,
        micro_batch=config.micro_batch,
        rank=rank,
        world_size=world_size,
        end_step=config.max_steps,
    )
    seconds = []
    with TokenLoader(dataset, split, Order(split.num_rows, config.seed), plan) as loader:
        started = time.perf_counter()
        for batch in loader:
            if batch.micro == 0:
                targets = torch.tensor(batch.step_targets, dtype=torch.int64)
                if strategy != "none":
                    torch.distributed.all_reduce(targets)
                scale = world_size / max(int(targets), 1)
            last = batch.ends_step
            if isinstance(net, FSDPModule):
                net.set_requires_gradient_sync(last)
            elif isinstance(net, DistributedDataParallel):
                net.require_backward_grad_sync = last  # what no_sync() sets
            (net(batch.to(device)) * scale).backward()
            if not last:
                continue
            clip_grad_norm_(net.parameters(), config.optim.clip_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            seconds.append(now - started)
            started = now
    if strategy != "none":
        torch.distributed.destroy_process_group()
    return seconds


def main() -> None:
    data, config_name, micro_batch, steps, strategy = sys.argv[1:]
    argv = ["--config", config_name, "--max_steps", steps]
    if int(micro_batch):
        argv += ["--micro_batch", micro_batch]
    config = parse_config(
        Config,
        argv,
        prog="by_hand",
        description="",
        configs=Path(__file__).parent.parent / "recipes" / "configs",
        prefix="pretrain_",
    )
    seconds = train(config, data, strategy)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(seconds))


if __name__ == "__main__":
    main()
