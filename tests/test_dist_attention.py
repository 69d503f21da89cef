"""dist/attention.py: packed documents are as separate as documents in rows of their own."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dist.attention
from dist.attention import Packed, block_mask, packed_attention
from dist.batch import Batch, documents_of, make_batches
from dist.initialise import materialise
from recipes import llama

SEQ_LEN, VOCAB = 24, 50
SCHEMA = {"vocab_size": VOCAB, "bos_id": None, "eos_id": None}
CONFIG = llama.ModelConfig(
    hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48
)


def make_batch(rows: list[list[np.ndarray]]) -> Batch:
    """A batch from the documents of each row."""
    tokens = np.zeros((len(rows), SEQ_LEN + 1), np.uint16)
    for i, documents in enumerate(rows):
        flat = np.concatenate(documents)
        tokens[i, : len(flat)] = flat
    lens = np.array([len(d) for documents in rows for d in documents], np.int32)
    splits = np.cumsum([0, *map(len, rows)])
    documents = documents_of(lens, splits, SEQ_LEN + 1, len(rows))
    return make_batches(tokens, np.arange(len(rows)), documents)[0]


def make_documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, n).astype(np.uint16) for n in (7, 1, 9, 5, 12, 10, 3)]


def make_model() -> llama.PackedDecoder:
    model = llama.build(CONFIG, SCHEMA)
    # A large spread makes attention sharp: a leak changes the loss by far more than rounding.
    materialise(model, torch.device("cpu"), seed=0, std=0.3)
    return model


def packed_and_padded() -> tuple[Batch, Batch]:
    docs = make_documents()
    packed = make_batch([docs[:4], docs[4:]])
    return packed, make_batch([[doc] for doc in docs])


def test_packed_loss_equals_padded_loss() -> None:
    """Attention across documents, positions that run on, or targets across a border: each would
    make the packed loss another than that of one document a row."""
    model = make_model()
    packed, padded = packed_and_padded()
    assert int(packed.valid.sum()) == int(padded.valid.sum())
    losses, grads = [], []
    for batch in (packed, padded):
        loss = model(batch)
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_document_does_not_see_the_one_before() -> None:
    """Changing document 0 must not change a bit of document 1's hidden states."""
    model = make_model()
    seen = []
    for first in (3, 4):
        docs = make_documents()
        docs[0][:] = first
        batch = make_batch([docs[:4]])
        packed = dist.attention.packed_info(batch.doc_ids, None, 0, torch.float32)
        hidden = model.model.model(
            input_ids=batch.tokens.long()[:, :-1], position_ids=batch.position_ids,
            use_cache=False, packed=packed,
        ).last_hidden_state  # fmt: skip
        seen.append(hidden[0, 7:22])
    assert torch.equal(seen[0], seen[1])


def test_registered_name_gets_no_mask_from_transformers() -> None:
    """transformers building a mask of its own would cost a host sync a forward and be wrong."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    make_model()
    assert dist.attention.PACKED_ATTENTION not in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    with pytest.raises(ValueError, match="keyword `packed`"):
        make_model().model(input_ids=torch.zeros(1, 4, dtype=torch.long))


def reference_varlen(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, scale: float) -> Tensor:
    """Causal attention per document of (tokens, heads, d), by a loop."""
    out = torch.empty_like(q)
    for lo, hi in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        x, y, z = (t[lo:hi].transpose(0, 1) for t in (q, k, v))
        y, z = (t.repeat_interleave(x.shape[0] // t.shape[0], 0) for t in (y, z))
        got = nn.functional.scaled_dot_product_attention(x, y, z, is_causal=True, scale=scale)
        out[lo:hi] = got.transpose(0, 1)
    return out


def varlen_213(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    assert window_size == (-1, 0) and enable_gqa and max_q == max_k
    return reference_varlen(q, k, v, cu_q, scale or q.shape[-1] ** -0.5)


def varlen_210(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False,
) -> Tensor:  # fmt: skip
    assert is_causal and q.shape[1] == k.shape[1]
    return reference_varlen(q, k, v, cu_q, q.shape[-1] ** -0.5)


@pytest.mark.parametrize("kernel", [varlen_213, varlen_210])
def test_varlen_equals_mask(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    """The GPU path's plumbing (borders, heads, layouts), by a stand-in with each torch's
    signature; a wrong transpose would show."""
    monkeypatch.setattr(dist.attention, "_varlen", lambda: kernel)
    packed, _ = packed_and_padded()
    torch.manual_seed(0)
    q = torch.randn(2, 4, SEQ_LEN, 8)
    k, v = torch.randn(2, 2, 2, SEQ_LEN, 8)
    scaling = 8**-0.5
    by_mask, _ = packed_attention(
        nn.Module(), q, k, v, None, scaling, packed=Packed(mask=block_mask(packed.doc_ids))
    )
    info = Packed(cu_seqlens=packed.cu_seqlens, max_len=packed.max_len)
    by_kernel, _ = packed_attention(nn.Module(), q, k, v, None, scaling, packed=info)
    torch.testing.assert_close(by_mask, by_kernel)


@pytest.mark.parametrize("kernel", [varlen_213, varlen_210])
def test_varlen_takes_what_autocast_leaves(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    """Under autocast rotary embeddings give fp32 queries and keys beside bf16 values, which the
    real kernel refuses: ddp with bf16-mixed failed so on a GPU."""

    def strict(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert {q.dtype, k.dtype, v.dtype} == {torch.bfloat16}
        return torch.zeros_like(q)

    strict.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
    monkeypatch.setattr(dist.attention, "_varlen", lambda: strict)
    packed, _ = packed_and_padded()
    q, k, v = torch.randn(3, 2, 4, SEQ_LEN, 8)
    info = Packed(cu_seqlens=packed.cu_seqlens, max_len=packed.max_len)
    packed_attention(nn.Module(), q, k, v.to(torch.bfloat16), None, 8**-0.5, packed=info)


@pytest.mark.parametrize(
    ("dtype", "flash", "capability", "dropout", "said"),
    [
        (torch.bfloat16, True, (9, 0), 0.0, "varlen"),
        (torch.bfloat16, True, (9, 0), 0.1, "block mask by SDPA (varlen kernels have no dropout)"),
        (torch.bfloat16, True, (7, 5), 0.0, "block mask by SDPA (FlashAttention needs compute"),
        (torch.float16, False, (8, 0), 0.0, "block mask by SDPA (this torch was built without"),
        (torch.float32, True, (9, 0), 0.0, "block mask by SDPA (varlen kernels take 16-bit"),
    ],
)
def test_a_gpu_without_flash_gets_the_mask_and_says_so(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, flash: bool,
    capability: tuple[int, int], dropout: float, said: str,
) -> None:  # fmt: skip
    """On an old GPU, or a torch without FlashAttention, the kernel raises at the first step."""
    monkeypatch.setattr(dist.attention, "_flash_was_built", lambda: flash)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda", 0)
    assert dist.attention.describe_attention(device, dtype, dropout).startswith(said)
    kernel = dist.attention.attention_kernel(device, dtype)
    assert (kernel == "varlen") == (said == "varlen" or dropout > 0)
    assert "cpu" in dist.attention.describe_attention(torch.device("cpu"), dtype)
