"""Small fine-tuning runs of the real recipe, and the tiny base models that they start from."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from tests.make_dataset import tokenizer_json

SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None, "initializer_range": 0.1,
}  # fmt: skip


def write_base(folder: Path, kind: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A random model of a published architecture as a Hugging Face folder, with a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**SHAPE, **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    return folder


def config(url: str, base: str, folder: str, changes: dict[str, Any]) -> Any:
    """A recipe config of a few steps; `changes` by key; lora, parallel, optim as dicts."""
    from dist.lora import LoraConfig
    from dist.optim import OptimConfig
    from dist.sharding import ParallelConfig
    from dist.start import DataConfig
    from recipes.causal_lm import BaseConfig
    from recipes.finetune import Config

    settings = {
        "precision": "fp32", "global_batch": 8, "micro_batch": 2, "max_steps": 6,
        "log_every_steps": 1, "save_every_steps": 3, "val_rows": 8, "async_save": False,
        "keep": 9, **changes,
        "data": DataConfig(url=url), "base": BaseConfig(path=base), "run": folder,
        "optim": OptimConfig(
            **{"lr": 1e-2, "warmup_steps": 2, "weight_decay": 0.0, **changes.get("optim", {})}
        ),
        "lora": LoraConfig(**{"rank": 4, "alpha": 8.0, **changes.get("lora", {})}),
        "parallel": ParallelConfig(**changes.get("parallel", {"strategy": "ddp"})),
    }  # fmt: skip
    return Config(**settings)


def play(url: str, base: str, jobs: list[tuple[str, str, dict[str, Any]]]) -> list[int]:
    """On every rank: the jobs (folder, source, changes) in turn; returns their exit codes.

    With a source, the run goes on from a copy of that run as it was after step 3.
    """
    from dist.ranks import Ranks
    from recipes.finetune import run
    from tests.strategy_runs import copy_at_step_3

    codes = []
    for folder, source, changes in jobs:
        if source:
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
                copy_at_step_3(Path(source), Path(folder))
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
        with ExitStack() as stack:
            codes.append(run(config(url, base, folder, changes), Ranks.from_environment(), stack))
    return codes
