"""Many small runs of the real recipe in one world of ranks, for test_dist_strategies_*.py.

A world is started once a size and runs its jobs one after the other, since the start of the
processes and the import of DeepSpeed cost more than twenty steps.
"""

from __future__ import annotations

import functools
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

# (kind, folder, source folder, changes); see play().
Job = tuple[str, str, str, dict[str, Any]]


def config(url: str, folder: str, changes: dict[str, Any]) -> Any:
    """A recipe config of two layers; the vocabulary of 300 is cut unevenly by no power of two."""
    from dist.optim import OptimConfig
    from dist.sharding import ParallelConfig
    from dist.start import DataConfig
    from recipes.llama import ModelConfig
    from recipes.pretrain import Config

    model = {
        "hidden_size": 40, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
        "intermediate_size": 72, "init_std": 0.1, **changes.get("model", {}),
    }  # fmt: skip
    settings = {
        "precision": "fp32", "global_batch": 8, "micro_batch": 8, "max_steps": 20,
        "log_every_steps": 1, "save_every_steps": 0, "val_rows": 8, "async_save": False,
        "keep": 9, **{key: value for key, value in changes.items() if key != "backend"},
        "data": DataConfig(url=url), "model": ModelConfig(**model), "run": folder,
        "optim": OptimConfig(
            lr=3e-3, warmup_steps=2, stochastic_rounding=changes.get("precision") == "bf16-true"
        ),
        "parallel": ParallelConfig(**changes["parallel"]),
    }  # fmt: skip
    return Config(**settings)


def play(url: str, jobs: list[Job]) -> list[int]:
    """On every rank: do the jobs in turn; returns their exit codes.

    `train`: a run in `folder`. `resume`: the same, from a copy of the run in `source` as it was
    after step 3. `reload`: as resume, but what was loaded is saved again in `folder`/again, and
    the run stops.
    """
    import dist.compile
    from dist.ranks import Ranks
    from recipes.pretrain import run

    codes = []
    compile_forward = dist.compile._compile_forward
    for kind, folder, source, changes in jobs:
        if kind != "train":
            if torch.distributed.get_rank() == 0:
                copy_at_step_3(Path(source), Path(folder))
            torch.distributed.barrier()
        torch._dynamo.reset()  # each run compiles as a process of its own would
        backend = changes.get("backend")
        dist.compile._compile_forward = (  # type: ignore[assignment]
            functools.partial(with_backend, compile_forward, backend)
            if backend
            else compile_forward
        )
        with ExitStack() as stack:
            if kind == "reload":
                stack.enter_context(saved_again(Path(folder)))
            codes.append(run(config(url, folder, changes), Ranks.from_environment(), stack))
    return codes


def with_backend(compile_forward: Any, backend: str, module: Any, _: str) -> None:
    """Compile a forward by another backend than the recipe's."""
    compile_forward(module, backend)


def copy_at_step_3(source: Path, folder: Path) -> None:
    """A run as a kill after its third step would have left it."""
    shutil.copytree(source, folder)
    for later in folder.glob("checkpoints/step-*6-a*"):
        shutil.rmtree(later)
    for outcome in (folder / "outcome.json", *folder.glob("attempts/*/outcome.json")):
        outcome.unlink(missing_ok=True)


def saved_again(folder: Path) -> Any:
    """After what a run resumes from is loaded: save it and stop."""
    from unittest.mock import patch

    from dist.checkpoint import save_checkpoint
    from dist.checkpoint_callback import Checkpoints
    from dist.lightning_plugins import StopRun

    load = Checkpoints.on_fit_start

    def on_fit_start(self: Any, trainer: Any, pl_module: Any) -> None:
        load(self, trainer, pl_module)
        save_checkpoint(folder / "again" / "step-3-a9", pl_module.net, trainer.optimizers[0], {})
        raise StopRun

    return patch.object(Checkpoints, "on_fit_start", on_fit_start)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, unsharded: weights and optimizer state."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    path = checkpoint.parent / f"{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint, path)
    state = torch.load(path)
    path.unlink()
    return {f"{part}.{name}": value for part in state for name, value in state[part].items()}


def at_step(folder: Path, step: int) -> Path:
    """A run's checkpoint at a step."""
    (found,) = folder.glob(f"checkpoints/step-{step}-a*")
    return found


def losses(folder: Path) -> list[float]:
    """Training losses by step, the last attempt of a step counting."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return [by_step[step] for step in sorted(by_step)]
