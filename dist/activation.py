"""Activation checkpointing: which activations are kept for backward, and which computed again.

none       all are kept
full       a block keeps its input only
every-N    blocks 0, N, 2N, ... as in full, the others keep all
op-level   a block keeps its input, attention's outputs, every second matrix product's and
           what collectives brought; the rest, cheap or halved, is computed again
           (selective checkpointing as in torchtitan, arXiv 2410.06511)
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from dist.errors import ConfigError

# As overloads of ops; a torch that lacks one goes without.
_KEPT_OPS = (
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_attention_math_for_mps",
    "aten._flash_attention_forward",
    "torch_attn._varlen_attn",
    "_c10d_functional.all_reduce",
    "_c10d_functional.reduce_scatter_tensor",
    "_c10d_functional.all_gather_into_tensor",
    "_c10d_functional.wait_tensor",
)
_MATMULS = ("aten.mm", "aten.addmm", "aten.linear", "aten.mkldnn_linear_pointwise")


def check_activation_checkpointing(mode: str) -> tuple[str, int]:
    """(kind, N): `none`, `full`, `op-level`, or `every` with its N. ConfigError for others."""
    if mode in ("none", "full", "op-level"):
        return mode, 1
    kind, _, number = mode.partition("-")
    if kind == "every" and number.isdigit() and int(number) > 0:
        return kind, int(number)
    raise ConfigError(
        f"activation_checkpointing is {mode!r}; it must be none, full, op-level or every-N, such "
        "as every-2 for every second block"
    )


def checkpoint_blocks(blocks: Iterable[nn.Module], mode: str) -> None:
    """Recompute activations of these blocks in backward instead of keeping them.

    Replaces `block.forward`, so parameter names stay as they are, and hooks that sharding adds
    later run outside the recomputed part. Call it before compiling and sharding.
    """
    kind, every = check_activation_checkpointing(mode)
    if kind == "none":
        return
    more: dict[str, Any] = {"context_fn": _selective_contexts} if kind == "op-level" else {}
    for number, block in enumerate(blocks):
        if number % every:
            continue
        # Non-reentrant: the only kind that works with FSDP2 and with inputs without gradient.
        # The forward of a decoder block without dropout draws no random numbers.
        block.forward = functools.partial(  # type: ignore[method-assign]
            checkpoint,
            block.forward,
            use_reentrant=False,
            preserve_rng_state=uses_dropout(block),
            **more,
        )


def uses_dropout(block: nn.Module) -> bool:
    """Whether a forward in training draws random numbers that a recomputation must repeat."""
    if any(
        isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        for module in block.modules()
    ):
        return True
    return any(getattr(module, "attention_dropout", 0.0) > 0 for module in block.modules())


def _selective_contexts() -> tuple[Any, Any]:
    # Forward and recomputation count their matrix products apart: the n-th is the same one.
    counts = {False: 0, True: 0}
    kept, matmuls = _ops(_KEPT_OPS), _ops(_MATMULS)

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in kept:
            return CheckpointPolicy.MUST_SAVE
        if op in matmuls:
            counts[ctx.is_recompute] += 1
            if counts[ctx.is_recompute] % 2 == 0:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@functools.cache
def _ops(names: tuple[str, ...]) -> frozenset[Any]:
    found = []
    for name in names:
        space, _, op = name.partition(".")
        packet = getattr(getattr(torch.ops, space), op, None)
        if packet is not None:
            found += [getattr(packet, overload) for overload in packet.overloads()]
    return frozenset(found)
