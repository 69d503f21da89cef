"""dist/activation.py: recomputation changes memory, not numbers or names."""

from __future__ import annotations

import pytest
import torch

from dist.activation import checkpoint_blocks
from dist.initialise import materialise
from recipes import llama
from tests.test_dist_attention import CONFIG, SCHEMA, packed_and_padded


def make_model(mode: str) -> llama.PackedLlama:
    model = llama.build(CONFIG, SCHEMA)
    checkpoint_blocks(llama.blocks(model), mode)  # type: ignore[arg-type]
    materialise(model, torch.device("cpu"), seed=0, std=0.02)
    return model


def test_gradients_are_equal_and_names_unchanged() -> None:
    """Renamed parameters would start from other values and break checkpoints."""
    batch, _ = packed_and_padded()
    plain, full = make_model("none"), make_model("full")
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in full.named_parameters()]
    for model in (plain, full):
        model(batch).backward()
    for one, other in zip(plain.parameters(), full.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize(("mode", "calls"), [("none", 2), ("full", 4)])
def test_blocks_run_again_in_backward(mode: str, calls: int) -> None:
    """A wrapper that checkpoints nothing would pass every other test."""
    batch, _ = packed_and_padded()
    model = make_model(mode)
    count = []
    for block in llama.blocks(model):
        block.mlp.register_forward_pre_hook(lambda *_: count.append(1))
    model(batch).backward()
    assert len(count) == calls


def test_less_is_kept_for_backward() -> None:
    """The point of it: bytes saved for backward must fall by half at least."""
    batch, _ = packed_and_padded()
    saved = {}
    for mode in ("none", "full"):
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            make_model(mode)(batch)
        saved[mode] = sum(sizes)
    assert saved["full"] < 0.5 * saved["none"]


def test_unknown_mode_is_refused() -> None:
    """A typo must not train without checkpointing and run out of memory later."""
    with pytest.raises(ValueError, match="'some'"):
        checkpoint_blocks([], "some")  # type: ignore[arg-type]
