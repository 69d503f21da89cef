"""torch.compile: per decoder block, or the whole decoder; off where it cannot work.

Blocks of a decoder are alike, so one block's code is compiled once and serves all, and the parts
that resist a graph (sharding's hooks, the chunked loss) stay outside. Shapes are static: rows of
a dataset are equally long, and dist.attention keeps what varies with the documents out of the
guards (packed_info(stable=True)). A last short step or validation batch, and the change between
training and validation, cost one more compilation each.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed
from torch import nn

from dist.errors import ConfigError

CompileName = Literal["off", "blocks", "model"]


@dataclass(frozen=True, kw_only=True)
class Compile:
    """What is compiled, decided alike on all ranks, and why not what was asked for."""

    name: CompileName
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def check_compile(name: CompileName, strategy: str, tp: int = 0) -> None:
    """ConfigError where a mode cannot work with a strategy."""
    if name != "off" and (strategy == "tp" or tp > 1):
        raise ConfigError(
            f"compile {name} under tensor parallelism: torch 2.13 computes wrong gradients there "
            "(seen under fsdp with parallel.tp 2: losses 1 % off after ten steps) or ends with an "
            "AttributeError (under tp); use compile off, or fsdp without parallel.tp"
        )
    if name == "model" and strategy != "ddp":
        raise ConfigError(
            f"compile model with parallel.strategy {strategy}: its hooks cut the graph at every "
            "block; use compile blocks, or ddp"
        )


def decide_compile(name: CompileName, device: torch.device) -> Compile:
    """`name`, or off with the reason where any rank lacks the toolchain. All ranks call it."""
    if name == "off":
        return Compile(name="off")
    problems = [toolchain_problem(device)]
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        mine, problems = problems[0], [""] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(problems, mine)
    for rank, problem in enumerate(problems):
        if problem:
            return Compile(name="off", reason=f"{name} was asked for, but rank {rank}: {problem}")
    return Compile(name=name)


def toolchain_problem(device: torch.device) -> str:
    """What Inductor lacks on this machine to make kernels for `device`; '' where nothing."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is missing"
        # Triton builds its launchers with a C compiler.
        words = [os.environ.get("CC", "")] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    else:
        words = [os.environ.get("CXX", "")] if os.environ.get("CXX") else ["g++"]
    compiler = next(filter(None, map(shutil.which, words)), None)
    if compiler is None:
        kind = "C" if device.type == "cuda" else "C++"
        return f"no {kind} compiler ({' or '.join(words)}); install g++ or set CXX"
    try:
        subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"the compiler {compiler} does not run ({type(error).__name__})"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers (Python.h) are missing; install python3-dev"
    return ""


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compile each block's forward, in place: after checkpointing, before sharding.

    Parameter names stay, and hooks that sharding adds later run outside the graphs.
    """
    for block in blocks:
        _compile_forward(block, backend)


def compile_decoder(decoder: nn.Module, backend: str = "inductor") -> None:
    """Compile a decoder's whole forward (without the loss, whose loop over chunks would be
    unrolled into the graph), in place."""
    _compile_forward(decoder, backend)


def _compile_forward(module: nn.Module, backend: str) -> None:
    module.forward = torch.compile(  # type: ignore[method-assign]
        module.forward, backend=backend, dynamic=False
    )
