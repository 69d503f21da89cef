"""dist/initialise.py: the same first weights on any number of ranks, and none forgotten."""

from __future__ import annotations

import pytest
import torch
import torch.distributed
from torch import nn
from torch.distributed.tensor import DTensor

from dist.errors import SetupError
from dist.initialise import materialise, seed_of
from dist.mesh import Layout, data_axes, data_mesh, make_mesh
from dist.precision import Precision
from dist.sharding import shard_fsdp
from recipes import llama
from tests.run_ranks import run_ranks
from tests.test_dist_attention import CONFIG, SCHEMA

CPU = torch.device("cpu")
FP32 = Precision(name="fp32", reason="test")
# A row count that 3 and 4 do not divide, so that ranks hold uneven shards.
ODD = {**SCHEMA, "vocab_size": 101}
EVEN = {**SCHEMA, "vocab_size": 102}  # 2 divides it, and 3 not what is left
TENSORS = dict[str, torch.Tensor]


def whole(model: nn.Module) -> TENSORS:
    named = (*model.named_parameters(), *model.named_buffers())
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in named
    }


def make_sharded(seed: int) -> TENSORS:
    model = llama.build(CONFIG, ODD)
    shard_fsdp(model, llama.blocks(model), data_mesh(CPU), FP32)
    materialise(model, CPU, seed, 0.02)
    return whole(model)


def make_alone(seed: int) -> TENSORS:
    model = llama.build(CONFIG, ODD)
    materialise(model, CPU, seed, 0.02)
    return whole(model)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_equal_bit_for_bit_on_any_number_of_ranks(world_size: int) -> None:
    """Seeded init of sharded parameters repeats its halves; a broadcast may miss one."""
    alone = make_alone(seed=5)
    for tensors in run_ranks(make_sharded, world_size, 240, 5):
        assert tensors.keys() == alone.keys()
        assert all(torch.equal(tensors[name], alone[name]) for name in alone)


def make_split(seed: int, shards: int, replicas: int, tp: int) -> TENSORS:
    rank = torch.distributed.get_rank()
    model = llama.build(CONFIG, EVEN)
    mesh = make_mesh(CPU, Layout(rank=rank, shards=shards, replicas=replicas, tp=tp))
    if tp > 1:
        llama.split_layers(model, mesh["tp"])
    if shards > 1:
        shard_fsdp(model, llama.blocks(model), data_axes(mesh), FP32)
    materialise(model, CPU, seed, 0.02)
    assert all(isinstance(p, DTensor) or p.ndim == 1 for p in model.parameters())
    return whole(model)


@pytest.mark.parametrize(
    ("shards", "replicas", "tp"), [(2, 2, 1), (1, 1, 2), (1, 2, 2), (2, 1, 2), (3, 1, 2)]
)
def test_equal_bit_for_bit_on_any_mesh(shards: int, replicas: int, tp: int) -> None:
    """A dimension that both FSDP and tensor parallelism cut, cut in the wrong order: rows of
    another rank, and a model that no longer equals one process's."""
    alone = llama.build(CONFIG, EVEN)
    materialise(alone, CPU, 5, 0.02)
    for tensors in run_ranks(make_split, shards * replicas * tp, 240, 5, shards, replicas, tp):
        for name, value in whole(alone).items():
            assert torch.equal(tensors[name], value), name


def test_values_are_what_the_config_says() -> None:
    """Meta-init of HF Llama under Lightning left norms at 9882 and inv_freq at -1e16."""
    config = llama.ModelConfig(hidden_size=128, num_layers=2, intermediate_size=256)
    model = llama.build(config, {**SCHEMA, "vocab_size": 1000})
    materialise(model, CPU, seed=0, std=0.02)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert parameter.eq(1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03), name
            assert abs(parameter.mean().item()) < 0.001, name
    rotary = model.model.model.rotary_emb
    assert torch.equal(rotary.inv_freq, type(rotary)(rotary.config).inv_freq)


def test_parameters_differ_from_each_other_and_by_seed() -> None:
    """One generator state used twice would make layers equal."""
    one, other = make_alone(seed=1), make_alone(seed=2)
    layers = [t for name, t in one.items() if name.endswith("q_proj.weight")]
    assert not torch.equal(*layers)
    assert not torch.equal(one["model.lm_head.weight" if "model.lm_head.weight" in one else
                               "model.model.embed_tokens.weight"],
                           other["model.model.embed_tokens.weight"])  # fmt: skip


def test_tied_embeddings_stay_one_tensor() -> None:
    """to_empty unties: the head would train apart from the embedding, from NaN."""
    model = llama.build(CONFIG, SCHEMA)
    materialise(model, CPU, 0, 0.02)
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight


def tied_when_sharded() -> tuple[bool, bool]:
    """Also after a step: (one tensor, gradient equal to a single process's)."""
    from tests.test_dist_attention import packed_and_padded

    batch, _ = packed_and_padded()
    grads = []
    for sharded in (True, False):
        model = llama.build(CONFIG, SCHEMA)
        if sharded:
            shard_fsdp(model, llama.blocks(model), data_mesh(CPU), FP32)
        materialise(model, CPU, 0, 0.02)
        model(batch).backward()
        grad = model.model.model.embed_tokens.weight.grad
        grads.append(grad.full_tensor() if sharded else grad)
        if sharded:
            one = model.model.lm_head.weight is model.model.model.embed_tokens.weight
    return one, torch.allclose(*grads, rtol=1e-5, atol=1e-7)


def test_tied_embeddings_stay_one_tensor_under_fsdp() -> None:
    """The head's gradient would be lost, or the embedding's."""
    assert run_ranks(tied_when_sharded, 2, 240) == [(True, True)] * 2


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Buffer(torch.ones(3), persistent=False)


@pytest.mark.parametrize(("kind", "name"), [(Strange, "scale"), (Stateful, "table")])
def test_what_no_rule_reaches_is_an_error(kind: type[nn.Module], name: str) -> None:
    """Left to chance, memory of to_empty is often zeros in tests and garbage in production."""
    with torch.device("meta"):
        model = nn.Sequential(kind())
    with pytest.raises(SetupError, match=name):
        materialise(model, CPU, 0, 0.02)


def test_seeds_do_not_collide_by_addition() -> None:
    """seed + epoch makes run 1 at epoch 2 equal to run 2 at epoch 1."""
    assert len({seed_of(a, b) for a in range(20) for b in range(20)}) == 400
