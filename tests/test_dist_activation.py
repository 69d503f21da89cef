"""dist/activation.py: recomputation changes memory, not numbers or names."""

from __future__ import annotations

import pytest
import torch

from dist.activation import check_activation_checkpointing, checkpoint_blocks
from dist.errors import ConfigError
from dist.initialise import materialise
from dist.micro_batch import PeakBytes
from recipes import llama
from tests.test_dist_attention import CONFIG, SCHEMA, packed_and_padded

MODES = ("full", "every-2", "op-level")


def make_model(mode: str, config: llama.ModelConfig = CONFIG) -> llama.PackedDecoder:
    model = llama.build(config, SCHEMA)
    checkpoint_blocks(llama.blocks(model), mode)
    materialise(model, torch.device("cpu"), seed=0, std=0.02)
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_equal_and_names_unchanged(mode: str, dropout: float) -> None:
    """Renamed parameters would start from other values and break checkpoints; a mask of dropout
    drawn anew, or an op taken from the wrong place of a selective recomputation, would show."""
    batch, _ = packed_and_padded()
    config = llama.ModelConfig(
        hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=48,
        attention_dropout=dropout, residual_dropout=dropout,
    )  # fmt: skip
    plain, recomputed = make_model("none", config), make_model(mode, config)
    names = [name for name, _ in plain.named_parameters()]
    assert names == [name for name, _ in recomputed.named_parameters()]
    for model in (plain, recomputed):
        torch.manual_seed(5)
        model(batch).backward()
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize(
    ("mode", "calls"), [("none", 2), ("full", 4), ("every-2", 3), ("every-9", 3), ("op-level", 4)]
)
def test_blocks_run_again_in_backward(mode: str, calls: int) -> None:
    """A wrapper that checkpoints nothing, or every block, would pass every other test."""
    batch, _ = packed_and_padded()
    model = make_model(mode)
    count = []
    for block in llama.blocks(model):
        block.mlp.register_forward_pre_hook(lambda *_: count.append(1))
    model(batch).backward()
    assert len(count) == calls


def held_after_forward(mode: str) -> int:
    """Bytes that a forward leaves for its backward, beyond what it was given."""
    config = llama.ModelConfig(
        hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=4, intermediate_size=192
    )
    model, (batch, _) = make_model(mode, config), packed_and_padded()
    _ = batch.valid  # expanded once, kept by the batch
    with PeakBytes() as tracker:
        loss = model(batch)
        held = tracker.now
    assert loss.requires_grad
    return held


def test_each_mode_keeps_less_than_the_one_before() -> None:
    """The point of it: op-level must keep less than none and more than full, every-2 between."""
    held = {mode: held_after_forward(mode) for mode in ("none", "every-2", "op-level", "full")}
    # The loss keeps a gradient of the vocabulary and of the hidden states, whatever the mode.
    assert held["full"] < 0.4 * held["none"]
    assert held["full"] < held["op-level"] < 0.8 * held["none"]
    assert held["full"] < held["every-2"] < 0.8 * held["none"]


def matmuls_in_backward(mode: str) -> int:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.calls += func is torch.ops.aten.mm.default
            return func(*args, **(kwargs or {}))

    batch, _ = packed_and_padded()
    loss = make_model(mode)(batch)
    with Count() as count:
        loss.backward()
    return count.calls


def test_op_level_recomputes_every_second_matmul_and_no_attention() -> None:
    """A policy that names no op of this torch would recompute all, as full does, in silence."""
    none, full, op_level = (matmuls_in_backward(m) for m in ("none", "full", "op-level"))
    per_block = 7  # q, k, v, o, gate, up, down
    # The last of a block is needed by no gradient, and early stop leaves it out.
    assert full - none == 2 * (per_block - 1)
    assert op_level - none == 2 * 3


@pytest.mark.parametrize("mode", ["some", "every", "every-0", "every-x", "every-1.5", "Full"])
def test_unknown_mode_is_refused(mode: str) -> None:
    """A typo must not train without checkpointing and run out of memory later."""
    with pytest.raises(ConfigError, match=mode):
        checkpoint_blocks([], mode)
    assert check_activation_checkpointing("every-3") == ("every", 3)
