"""Attention within packed documents: varlen kernels on CUDA, a block mask elsewhere.

Hugging Face models take it by name (`attn_implementation=PACKED_ATTENTION`). It is registered
without a mask function, so transformers builds no mask and looks for no packing of its own (which
would cost a host sync a forward); the documents come as one keyword, `packed`.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PACKED_ATTENTION = "leyden_packed"


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The documents of one micro-batch, made once a forward and shared by all layers."""

    mask: Tensor | None = None
    """(batch, 1, seq, seq) additive or bool mask, for SDPA."""
    cu_seqlens: Tensor | None = None
    """(documents + 1,) int32 document borders in the flattened batch, for varlen kernels."""
    max_len: int = 0
    """Longest document in tokens (an upper bound serves)."""


def register_packed_attention() -> None:
    """Make PACKED_ATTENTION known to transformers; safe to call twice."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, packed_attention)


def attention_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """`varlen` where its kernel runs (CUDA, 16-bit), else `mask`."""
    half = dtype in (torch.bfloat16, torch.float16)
    return "varlen" if device.type == "cuda" and half and _varlen() is not None else "mask"


def packed_info(
    doc_ids: Tensor,
    cu_seqlens: Tensor | None,
    max_len: int,
    dtype: torch.dtype,
    dropout: float = 0.0,
) -> Packed:
    """What attention needs of a micro-batch. doc_ids: (batch, seq), equal within a document.

    With dropout always a mask: the varlen kernels have none, and would leave it out in silence.
    """
    varlen = dropout == 0.0 and attention_kernel(doc_ids.device, dtype) == "varlen"
    if cu_seqlens is not None and varlen:
        return Packed(cu_seqlens=cu_seqlens, max_len=max_len)
    return Packed(mask=block_mask(doc_ids))


def block_mask(doc_ids: Tensor) -> Tensor:
    """(batch, 1, seq, seq) bool, True where a query may look: same document, not later."""
    seq = doc_ids.shape[1]
    causal = torch.ones(seq, seq, dtype=torch.bool, device=doc_ids.device).tril_()
    return ((doc_ids.unsqueeze(2) == doc_ids.unsqueeze(1)) & causal).unsqueeze(1)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: Packed | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """HF attention interface. query: (batch, heads, seq, head_dim), key and value may have
    fewer heads; returns (batch, seq, heads, head_dim)."""
    if packed is None:
        raise ValueError("packed attention needs the keyword `packed`: pass it to the model")
    groups = query.shape[1] // key.shape[1]
    if packed.cu_seqlens is not None:
        if dropout > 0.0:
            raise ValueError("varlen kernels have no dropout: pass it to packed_info too")
        return _varlen_attention(query, key, value, packed, scaling, groups), None
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=packed.mask, dropout_p=dropout, scale=scaling
    )
    return out.transpose(1, 2), None


@functools.cache
def _varlen() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, scaling: float | None, groups: int
) -> Tensor:
    varlen_attn = _varlen()
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    # Its keywords changed between torch 2.10 and 2.13.
    options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "scale" in known:
        options["scale"] = scaling
    elif scaling is not None and abs(scaling - query.shape[-1] ** -0.5) > 1e-9:
        raise ValueError(f"this torch's varlen_attn has a fixed scale, the model wants {scaling}")
    if groups > 1:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    # (batch, heads, seq, d) -> (batch * seq, heads, d)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    borders, longest = packed.cu_seqlens, packed.max_len
    out = varlen_attn(q, k, v, borders, borders, longest, longest, **options)
    return out.unflatten(0, (query.shape[0], query.shape[2]))
