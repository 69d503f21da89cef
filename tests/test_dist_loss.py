"""dist/loss.py: the chunked loss equals the plain one, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dist.batch import Batch
from dist.dataset import Dataset
from dist.initialise import materialise
from dist.loss import chunk_tokens, loss_scale, summed_loss
from dist.mesh import data_mesh
from dist.micro_batch import PeakBytes, full_batch
from dist.precision import Precision
from dist.sharding import shard_fsdp
from recipes import llama
from tests.make_dataset import write_dataset
from tests.run_ranks import run_ranks
from tests.test_dist_sharding import step_gradients

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


def test_backward_makes_no_second_wide_gradient() -> None:
    """V x D in fp32 is the largest tensor of a step; twice, it decides whether a model fits."""
    weight = torch.zeros(4000, 64, requires_grad=True)
    loss = summed_loss(
        torch.zeros(2, 64, requires_grad=True), weight, torch.zeros(2, dtype=torch.long),
        torch.ones(2, dtype=torch.bool),
    )  # fmt: skip
    with PeakBytes() as tracker:
        (2.0 * loss).backward()
    assert weight.grad is not None and tracker.peak < weight.nbytes // 2
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


# 64 rows of 64 tokens on a vocabulary of 20,000: logits of 328 MB.
SCHEMA = {"vocab_size": 20_000, "seq_len": 64, "token_dtype": "uint16"}
LOGITS_BYTES = 64 * 64 * 20_000 * 4


def peak_under_fsdp() -> int:
    """Bytes at the peak of a forward and backward on this rank."""
    shape = llama.ModelConfig(
        hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=4, intermediate_size=48
    )
    net = llama.build(shape, SCHEMA)
    cpu = torch.device("cpu")
    shard_fsdp(net, llama.blocks(net), data_mesh(cpu), Precision(name="fp32", reason=""))
    materialise(net, cpu, 0, 0.02)
    batch: Batch = full_batch(64, SCHEMA)
    with PeakBytes() as tracker:
        net(batch).backward()
    return tracker.peak


def test_peak_stays_below_half_the_logits_under_fsdp() -> None:
    """Full logits, or their gradient, held once would be 1.0; both in fp32 are what runs out of
    memory first with vocabularies of 128k."""
    for peak in run_ranks(peak_under_fsdp, 2, 240):
        # Gathered, summed and reduced, the output matrix is there a few times (2.6 MB each).
        assert 16_000_000 < peak < 0.5 * LOGITS_BYTES


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), with_tokenizer=False)


def test_1x8_equals_2x4_equals_8x1(dataset: Dataset) -> None:
    """Micro-batch x accumulation x ranks: a mean of means weighs a short document's tokens more
    wherever it lies alone."""
    root = dataset.storage.url
    whole, norm = step_gradients(root, "none", 8, 8)
    # (ranks, micro-batch): 1 x 8 rows, 2 x 4, 8 x 1, then the same on two and four ranks.
    splits = [(1, 4), (1, 1), (2, 4), (2, 1), (4, 2), (4, 1)]
    for ranks, micro_batch in splits:
        for grads, found in run_ranks(step_gradients, ranks, 240, root, "fsdp", 8, micro_batch):
            assert found == pytest.approx(norm, rel=1e-6)
            for name, grad in grads.items():
                error = (grad - whole[name]).norm() / whole[name].norm()
                assert error < 1e-6, (ranks, micro_batch, name)


def test_terms_of_the_sum_are_handed_out() -> None:
    """A chunk's terms in another chunk's place, or a target that is not valid: losses by source
    would be of other rows."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 8, requires_grad=True), torch.randn(20, 8)
    targets, valid = torch.randint(0, 20, (50,)), torch.rand(50) < 0.7
    losses = torch.full((50,), 7.0)
    total = summed_loss(hidden, weight, targets, valid, 16, losses)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(losses, (expected * valid).detach())
    torch.testing.assert_close(losses.sum(), total.detach())
    assert not losses.requires_grad
