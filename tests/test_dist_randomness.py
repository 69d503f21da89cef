"""dist/randomness.py and dropout: the same numbers in the same place, other ones elsewhere."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dist.attention
from dist.activation import checkpoint_blocks
from dist.attention import packed_attention, packed_info
from dist.errors import ConfigError
from dist.initialise import materialise
from dist.randomness import derive_seed, seed_micro_batch
from recipes import llama

CPU = torch.device("cpu")
SCHEMA = {"vocab_size": 50, "bos_id": None, "eos_id": None}
CONFIG = llama.ModelConfig(
    hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=24,
    attention_dropout=0.3, residual_dropout=0.2,
)  # fmt: skip


def test_seeds_are_golden_and_all_different() -> None:
    """A changed derivation breaks the resume of every older run; sums would alias neighbours."""
    assert derive_seed(0, 0, 0, 0) == 338565400105403336
    assert derive_seed(7, 1000, 3, 2, "crop") == 2609177200584861478
    places = itertools.product(range(4), repeat=4)
    seeds = {derive_seed(*place) for place in places}
    assert len(seeds) == 4**4 and all(0 <= seed < 1 << 63 for seed in seeds)


def test_what_came_before_does_not_matter() -> None:
    """A resumed run has drawn other numbers before than an uninterrupted one."""

    def drawn(place: tuple[int, int, int, int], before: int) -> list[float]:
        torch.rand(before)
        seed_micro_batch(*place, CPU)
        return torch.rand(3).tolist()

    assert drawn((0, 5, 1, 2), 0) == drawn((0, 5, 1, 2), 17) != drawn((0, 5, 1, 3), 0)


def model(config: llama.ModelConfig, checkpointing: Any = "none") -> Any:
    net = llama.build(config, SCHEMA)
    checkpoint_blocks(llama.blocks(net), checkpointing)
    materialise(net, CPU, 0, config.init_std)
    return net


def batch() -> Any:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50, (2, 9), generator=generator)
    doc_ids = torch.tensor([[0] * 5 + [1] * 3] * 2, dtype=torch.int32)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]] * 2, dtype=torch.int32)
    return SimpleNamespace(
        tokens=tokens, doc_ids=doc_ids, position_ids=position_ids,
        valid=torch.ones(2, 8, dtype=torch.bool), cu_seqlens=None, max_len=5,
    )  # fmt: skip


def gradients(net: Any) -> tuple[float, dict[str, torch.Tensor]]:
    seed_micro_batch(0, 3, 1, 0, CPU)
    loss = net(batch())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in net.named_parameters()}


def test_recomputed_activations_use_the_same_dropout() -> None:
    """A recomputation with other masks gives gradients of another function, without a word."""
    loss, grads = gradients(model(CONFIG))
    again, recomputed = gradients(model(CONFIG, "full"))
    assert loss == again
    assert all(torch.equal(grads[name], recomputed[name]) for name in grads)


@pytest.mark.parametrize("name", ["attention_dropout", "residual_dropout"])
def test_each_dropout_acts_in_training_only(name: str) -> None:
    """Dropout that an own attention function ignores, or that stays on in evaluation."""
    plain = dataclasses.replace(CONFIG, attention_dropout=0.0, residual_dropout=0.0)
    one = model(dataclasses.replace(plain, **{name: 0.3}))
    none = model(plain)
    assert list(one.state_dict()) == list(none.state_dict())
    assert gradients(one)[0] != gradients(none)[0]
    with torch.no_grad():
        assert one.eval()(batch()).item() == none.eval()(batch()).item()
    with pytest.raises(ConfigError, match=name):
        dataclasses.replace(plain, **{name: 1.0})


def test_varlen_kernels_never_leave_dropout_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have none: a model with dropout would train without it on GPUs."""
    monkeypatch.setattr(dist.attention, "attention_kernel", lambda *_: "varlen")
    documents = (torch.zeros(1, 4, dtype=torch.int32), torch.tensor([0, 4]), 4, torch.bfloat16)
    assert packed_info(*documents).cu_seqlens is not None
    with_dropout = packed_info(*documents, 0.1)
    assert with_dropout.cu_seqlens is None and with_dropout.mask is not None
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="no dropout"):
        packed_attention(
            torch.nn.Module(), x, x, x, None, dropout=0.1, packed=packed_info(*documents)
        )
