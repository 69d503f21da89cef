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
    """`varlen` where its kernel runs (CUDA, 16-bit, FlashAttention), else `mask`."""
    return "mask" if _no_varlen(device, dtype) else "varlen"


def describe_attention(device: torch.device, dtype: torch.dtype, dropout: float = 0.0) -> str:
    """The kernel chosen for a start's print, with the reason where it is the slower one."""
    reason = _no_varlen(device, dtype)
    if not reason and dropout > 0.0:
        reason = "varlen kernels have no dropout"
    return f"block mask by SDPA ({reason})" if reason else "varlen (FlashAttention)"


def _no_varlen(device: torch.device, dtype: torch.dtype) -> str:
    """Why the varlen kernel cannot run; '' where it can."""
    if device.type != "cuda":
        return f"no varlen kernel on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"varlen kernels take 16-bit numbers, not {str(dtype).removeprefix('torch.')}"
    if _varlen() is None:
        return "this torch has no torch.nn.attention.varlen"
    # The kernel behind it raises at the first forward where either is missing.
    if not _flash_was_built():
        return "this torch was built without FlashAttention"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"FlashAttention needs compute capability 8.0, this GPU has {major}.{minor}"
    return ""


def packed_info(
    doc_ids: Tensor,
    cu_seqlens: Tensor | None,
    max_len: int,
    dtype: torch.dtype,
    dropout: float = 0.0,
    *,
    stable: bool = False,
) -> Packed:
    """What attention needs of a micro-batch. doc_ids: (batch, seq), equal within a document.

    With dropout always a mask: the varlen kernels have none, and would leave it out in silence.
    stable: for compiled code, which must not be made anew when documents' number or lengths vary.
    """
    varlen = dropout == 0.0 and attention_kernel(doc_ids.device, dtype) == "varlen"
    if cu_seqlens is not None and varlen:
        if stable:
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
            max_len = doc_ids.shape[1]
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


def _flash_was_built() -> bool:
    known = getattr(torch.backends.cuda, "is_flash_attention_available", None)
    return bool(known()) if known is not None else True


@functools.cache
def _varlen() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@torch.compiler.assume_constant_result
def _varlen_keywords() -> tuple[str, ...]:
    return tuple(inspect.signature(_varlen()).parameters)


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, scaling: float | None, groups: int
) -> Tensor:
    varlen_attn, known = _varlen(), _varlen_keywords()
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
    # Under autocast rotary embeddings left queries and keys in fp32 and values in 16 bits; autocast
    # does not know this kernel.
    q, k, v = (x.to(value.dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    borders, longest = packed.cu_seqlens, packed.max_len
    out = varlen_attn(q, k, v, borders, borders, longest, longest, **options)
    return out.unflatten(0, (query.shape[0], query.shape[2]))
