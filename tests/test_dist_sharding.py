"""dist/sharding.py: ddp and fsdp give one process's gradients, whatever the split of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed
from torch import nn
from torch.distributed.tensor import DTensor

from dist.activation import checkpoint_blocks
from dist.agreement import Agreement
from dist.dataset import Dataset, open_dataset
from dist.errors import ConfigError
from dist.initialise import materialise
from dist.loader import LoaderPlan, TokenLoader
from dist.loss import loss_scale
from dist.mesh import Layout, data_mesh, host_group, make_mesh
from dist.order import Order
from dist.precision import Precision
from dist.ranks import Ranks
from dist.sharding import (
    ParallelConfig,
    arrange,
    clip_grad_norm,
    shard_fsdp,
    without_gradient_sync,
    wrap_ddp,
)
from recipes import llama
from tests.make_dataset import write_dataset
from tests.run_ranks import run_ranks
from tests.test_dist_attention import CONFIG

CPU = torch.device("cpu")
GRADS = tuple[dict[str, torch.Tensor], float]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), with_tokenizer=False)


def step_gradients(
    root: str, strategy: str, batch: int, micro_batch: int, clip: float = 0.0
) -> GRADS:
    """Gradients of one optimizer step and their norm, as the recipe makes them, in fp64."""
    dataset = open_dataset(root)
    torch.set_default_dtype(torch.float64)
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if world_size > 1 else 0
    model = llama.build(CONFIG, dataset.manifest.schema)
    checkpoint_blocks(llama.blocks(model), "full")
    if strategy == "fsdp":
        shard_fsdp(model, llama.blocks(model), data_mesh(CPU), Precision(name="fp32", reason=""))
    materialise(model, CPU, 0, 0.02)
    root_module: nn.Module = wrap_ddp(model, CPU) if strategy == "ddp" else model
    table = dataset.split("train")
    plan = LoaderPlan(
        batch=batch, micro_batch=micro_batch, rank=rank, world_size=world_size, end_step=1
    )
    agree = Agreement(host_group())
    with TokenLoader(dataset, table, Order(table.num_rows, 0), plan, agree=agree) as loader:
        for micro in loader:
            loss = root_module(micro) * loss_scale(micro.step_targets, world_size, micro.num_micro)
            loss = loss / micro.num_micro  # Lightning does this
            if micro.ends_step:
                loss.backward()
            else:
                with without_gradient_sync(root_module):
                    loss.backward()
    norm = clip_grad_norm(model.parameters(), clip)
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None
        grads[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    torch.set_default_dtype(torch.float32)
    return grads, norm.item()


def assert_near(grad: torch.Tensor, alone: torch.Tensor, name: str) -> None:
    """Relative to the largest entry: HF's RMSNorm computes in fp32 whatever the dtype."""
    torch.testing.assert_close(grad, alone, rtol=0, atol=2e-6 * alone.abs().max().item(), msg=name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("world_size", "batch", "micro_batch"),
    [(1, 8, 1), (2, 8, 1), (4, 8, 2), (2, 8, 4), (3, 8, 2), (3, 7, 1)],
)
def test_any_split_gives_one_process_gradients(
    dataset: Dataset, strategy: str, world_size: int, batch: int, micro_batch: int
) -> None:
    """Means of means, a lost micro-batch, a padded row that counts, or a gradient summed instead
    of averaged would each show here."""
    root = dataset.storage.url
    alone, norm = step_gradients(root, "none", batch, batch)
    for grads, found in run_ranks(
        step_gradients, world_size, 240, root, strategy, batch, micro_batch
    ):
        assert found == pytest.approx(norm, rel=1e-6)
        for name, grad in grads.items():
            assert_near(grad, alone[name], name)


def test_clipping_equals_one_process(dataset: Dataset) -> None:
    """A norm of the local shard alone would clip each rank by another factor."""
    root = dataset.storage.url
    alone, norm = step_gradients(root, "none", 8, 8, 0.01)
    assert norm > 0.02  # so that clipping does something
    for grads, found in run_ranks(step_gradients, 2, 240, root, "fsdp", 8, 4, 0.01):
        assert found == pytest.approx(norm, rel=1e-6)
        for name, grad in grads.items():
            assert_near(grad, alone[name], name)


def count_reductions(strategy: str) -> tuple[int, int]:
    """Calls of reduce-scatter in a backward without and with synchronisation."""
    from torch.distributed.tensor.debug import CommDebugMode

    from tests.test_dist_attention import SCHEMA, packed_and_padded

    model = llama.build(CONFIG, SCHEMA)
    shard_fsdp(model, llama.blocks(model), data_mesh(CPU), Precision(name="fp32", reason=""))
    materialise(model, CPU, 0, 0.02)
    batch, _ = packed_and_padded()
    counts = []
    for synchronise in (False, True):
        with CommDebugMode() as mode:
            if synchronise:
                model(batch).backward()
            else:
                with without_gradient_sync(model):
                    model(batch).backward()
        counts.append(
            sum(n for op, n in mode.get_comm_counts().items() if "reduce_scatter" in str(op))
        )
    return counts[0], counts[1]


def test_accumulation_does_not_reduce_early() -> None:
    """A reduction every micro-batch gives right gradients and wastes the network."""
    for without, with_sync in run_ranks(count_reductions, 2, 240, "fsdp"):
        assert without == 0 and with_sync == 3  # two blocks and the root


def mixed_precision_dtypes() -> tuple[set[str], set[str]]:
    from tests.test_dist_attention import SCHEMA, packed_and_padded

    model = llama.build(CONFIG, SCHEMA)
    precision = Precision(name="bf16-mixed", reason="test")
    shard_fsdp(model, llama.blocks(model), data_mesh(CPU), precision)
    materialise(model, CPU, 0, 0.02)
    seen = set()
    for block in llama.blocks(model):
        block.mlp.down_proj.register_forward_hook(lambda m, i, o: seen.add(str(o.dtype)))
    batch, _ = packed_and_padded()
    model(batch).backward()
    kept = {str(t.dtype) for p in model.parameters() for t in (p, p.grad)}
    return seen, kept


def test_bf16_policy_computes_in_bf16_and_keeps_fp32() -> None:
    """bf16 parameters or gradients in the optimizer lose small updates silently."""
    for computed, kept in run_ranks(mixed_precision_dtypes, 2, 240):
        assert computed == {"torch.bfloat16"} and kept == {"torch.float32"}


def ranks_of(world_size: int, per_node: int, rank: int = 0) -> Ranks:
    return Ranks(
        rank=rank, world_size=world_size, local_rank=rank % per_node, local_world_size=per_node
    )


@pytest.mark.parametrize(
    ("config", "world_size", "per_node", "expected"),
    [
        ({"strategy": "ddp"}, 4, 2, (4, 1, 1)),
        ({"strategy": "fsdp"}, 4, 2, (1, 4, 1)),
        ({"strategy": "fsdp", "tp": 2}, 8, 4, (1, 4, 2)),
        ({"strategy": "hsdp"}, 8, 2, (4, 2, 1)),  # a replica for each node
        ({"strategy": "hsdp"}, 4, 4, (2, 2, 1)),
        ({"strategy": "hsdp", "replicas": 3}, 6, 6, (3, 2, 1)),
        ({"strategy": "tp"}, 4, 4, (1, 1, 4)),
        ({"strategy": "tp", "tp": 2}, 6, 2, (3, 1, 2)),
        ({"strategy": "deepspeed", "zero_stage": 3}, 4, 4, (1, 4, 1)),
    ],
)
def test_arrangement_and_coordinates(
    config: dict[str, Any], world_size: int, per_node: int, expected: tuple[int, int, int]
) -> None:
    """Ranks of one tensor-parallel group with different coordinates would read different rows;
    two that both count would halve the gradient."""
    layouts = [
        arrange(ParallelConfig(**config), ranks_of(world_size, per_node, rank))
        for rank in range(world_size)
    ]
    replicas, shards, tp = expected
    assert {(one.replicas, one.shards, one.tp) for one in layouts} == {expected}
    assert [one.dp_rank for one in layouts] == sorted(list(range(replicas * shards)) * tp)
    assert {one.dp_size for one in layouts} == {replicas * shards}
    # One rank of each group counts.
    assert [one.dp_rank for one in layouts if one.counts] == list(range(replicas * shards))


@pytest.mark.parametrize(
    ("config", "world_size", "said"),
    [
        ({"strategy": "fdsp"}, 4, "'fdsp'"),
        ({"strategy": "fsdp", "tp": 3}, 4, "tp 3 does not divide 4 ranks"),
        ({"strategy": "fsdp", "tp": 4}, 8, "across the network"),
        ({"strategy": "ddp", "tp": 2}, 4, "tp is 2 with strategy ddp"),
        ({"strategy": "hsdp", "replicas": 3}, 4, "3 replicas does not fill 4 ranks"),
        ({"strategy": "hsdp"}, 1, "2 replicas does not fill 1 ranks"),
        ({"strategy": "fsdp", "replicas": 2}, 4, "only hsdp"),
        ({"strategy": "deepspeed", "zero_stage": 4}, 4, "zero_stage is 4"),
        ({"strategy": "fsdp", "offload_optimizer": True}, 4, "only deepspeed has it"),
        ({"tp": -1}, 4, "negative"),
        ({"step_timeout_s": 0}, 4, "above 0"),
    ],
)
def test_impossible_sizes_are_refused_by_name(
    config: dict[str, Any], world_size: int, said: str
) -> None:
    """Ignored, each would train something else than was asked for."""
    with pytest.raises(ConfigError, match=said):
        arrange(ParallelConfig(**config), ranks_of(world_size, min(world_size, 2)))


def refused_plans() -> list[str]:
    """What split_layers says to shapes that two ranks cannot split."""
    from tests.test_dist_attention import SCHEMA

    shape = {"hidden_size": 48, "num_layers": 1, "num_heads": 6, "num_kv_heads": 2}
    cases = [
        ({"num_kv_heads": 3, "intermediate_size": 81}, SCHEMA),
        ({"num_kv_heads": 2, "attention_dropout": 0.1}, SCHEMA),
        ({}, {**SCHEMA, "vocab_size": 101}),
    ]
    said = []
    for changes, schema in cases:
        config = llama.ModelConfig(**{**shape, "intermediate_size": 80, **changes})
        mesh = make_mesh(CPU, Layout(rank=torch.distributed.get_rank(), tp=2))
        with pytest.raises(ConfigError) as error:
            llama.split_layers(llama.build(config, {**SCHEMA, **schema}), mesh["tp"])
        said.append(str(error.value))
    return said


def test_layers_that_do_not_split_are_refused_by_name() -> None:
    """Uneven heads fail in a reshape, and heads that share a dropout mask in silence."""
    for said in run_ranks(refused_plans, 2, 240):
        assert "model.num_kv_heads 3, model.intermediate_size 81" in said[0]
        assert "model.attention_dropout is 0.1" in said[1]
        assert "vocabulary 101" in said[2]


def test_clip_without_gradients_and_without_limit() -> None:
    """A limit of 0 means none; it must not scale gradients to nothing."""
    parameter = nn.Parameter(torch.ones(4))
    assert clip_grad_norm([parameter], 1.0).item() == 0
    parameter.grad = torch.full((4,), 3.0)
    assert clip_grad_norm([parameter], 0.0).item() == pytest.approx(6.0)
    assert parameter.grad.eq(3.0).all()
