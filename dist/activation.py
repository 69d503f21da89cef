"""Activation checkpointing: none, or full per decoder block."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

ActivationCheckpointing = Literal["none", "full"]


def checkpoint_blocks(blocks: Iterable[nn.Module], mode: ActivationCheckpointing) -> None:
    """Recompute each block's activations in backward instead of keeping them (mode `full`).

    Replaces `block.forward`, so parameter names stay as they are, and hooks that sharding adds
    later run outside the recomputed part. Call it before sharding.
    """
    if mode == "none":
        return
    if mode != "full":
        raise ValueError(f"activation_checkpointing is {mode!r}; it must be 'none' or 'full'")
    for block in blocks:
        # Non-reentrant: the only kind that works with FSDP2 and with inputs without gradient.
        # The forward of a decoder block without dropout draws no random numbers.
        block.forward = functools.partial(  # type: ignore[method-assign]
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=uses_dropout(block)
        )


def uses_dropout(block: nn.Module) -> bool:
    """Whether a forward in training draws random numbers that a recomputation must repeat."""
    if any(
        isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        for module in block.modules()
    ):
        return True
    return any(getattr(module, "attention_dropout", 0.0) > 0 for module in block.modules())
