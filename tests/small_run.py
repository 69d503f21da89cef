"""One small trained run by strategy, made once a test process by the real recipe."""

from __future__ import annotations

import functools
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.make_dataset import write_dataset
from tests.run_ranks import run_ranks

_keep: list[tempfile.TemporaryDirectory[str]] = []


def _train(url: str, folder: str, strategy: str, tied: bool) -> int:
    from dist.optim import OptimConfig
    from dist.ranks import Ranks
    from dist.sharding import ParallelConfig
    from dist.start import DataConfig
    from recipes.llama import ModelConfig
    from recipes.pretrain import Config, run

    config = Config(
        data=DataConfig(url=url),
        model=ModelConfig(
            hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48,
            tie_embeddings=tied, max_position_embeddings=512, init_std=0.1,
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        parallel=ParallelConfig(strategy=strategy),  # type: ignore[arg-type]
        precision="fp32", activation_checkpointing="full", global_batch=8, micro_batch=4,
        max_steps=30, save_every_steps=15, run=folder,
    )  # fmt: skip
    with ExitStack() as stack:
        return run(config, Ranks.from_environment(), stack)


@functools.cache
def _folder() -> Path:
    _keep.append(tempfile.TemporaryDirectory(prefix="leyden-small-"))
    return Path(_keep[0].name)


@functools.cache
def small_data() -> str:
    """A dataset with a tokenizer; its documents follow a rule that 30 steps begin to learn."""
    return write_dataset(_folder() / "data", seq_len=32, longest=60).storage.url


@functools.cache
def small_run(strategy: str = "ddp") -> Path:
    """Thirty steps on two ranks, checkpoints at 15 and 30. ddp ties the embeddings, fsdp not."""
    folder = _folder() / "runs" / strategy
    url: Any = small_data()
    assert run_ranks(_train, 2, 240, url, str(folder), strategy, strategy == "ddp") == [0, 0]
    return folder
