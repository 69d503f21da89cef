"""dist/loss.py: the chunked loss equals the plain one, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dist.loss import chunk_tokens, loss_scale, summed_loss

N, D, V = 37, 8, 23


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    valid = torch.rand(N, generator=generator) < 0.7
    return hidden, weight, targets, valid


@pytest.mark.parametrize("chunk", [1, 7, N, 100])
def test_equals_plain_cross_entropy(chunk: int) -> None:
    """A chunk that is dropped, counted twice or not masked would change loss or gradient."""
    hidden, weight, targets, valid = inputs(torch.float64)
    ours = summed_loss(hidden, weight, targets, valid, chunk)
    plain = (F.cross_entropy(hidden @ weight.t(), targets, reduction="none") * valid).sum()
    assert ours.item() == pytest.approx(plain.item(), rel=1e-12)
    mine = torch.autograd.grad(3 * ours, (hidden, weight))
    theirs = torch.autograd.grad(3 * plain, (hidden, weight))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_nothing_valid_gives_zero() -> None:
    """A padding micro-batch must add 0 and no NaN, forward and backward."""
    hidden, weight, targets, valid = inputs(torch.float32)
    loss = summed_loss(hidden, weight, targets, torch.zeros_like(valid))
    grads = torch.autograd.grad(loss * loss_scale(0, 4, 2), (hidden, weight))
    assert loss.item() == 0 and all(grad.eq(0).all() for grad in grads)


def test_bf16_sums_in_fp32() -> None:
    """A bf16 sum of thousands of tokens stops growing at 256; ours must not."""
    hidden = torch.zeros(4096, D, dtype=torch.bfloat16)
    weight = torch.zeros(V, D, dtype=torch.bfloat16)
    targets = torch.zeros(4096, dtype=torch.long)
    loss = summed_loss(hidden, weight, targets, targets == 0, 64)
    expected = 4096 * torch.tensor(float(V)).log().item()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)


def test_autocast_gives_parameter_dtype_gradients() -> None:
    """Under ddp with bf16 by autocast, fp32 parameters must get fp32 gradients."""
    hidden, weight, targets, valid = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_loss(hidden, weight, targets, valid, 8)
    loss.backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    plain = (F.cross_entropy(hidden @ weight.t(), targets, reduction="none") * valid).sum()
    assert loss.item() == pytest.approx(plain.item(), rel=2e-2)


def test_chunks_bound_the_logits() -> None:
    """128k vocabularies must not get chunks of gigabytes."""
    assert chunk_tokens(128256, torch.device("cuda")) * 128256 * 4 <= 512 << 20
    assert chunk_tokens(128256, torch.device("cpu")) >= 16
