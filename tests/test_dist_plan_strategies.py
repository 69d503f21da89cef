"""The memory plan under every strategy: who holds which part, on 1 to 4,096 ranks."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

import pytest

from dist.devices import find_device
from dist.memory_plan import Plan
from dist.memory_trace import BUFFERS, GRADIENTS, OPTIMIZER, PARAMETERS
from dist.op_cost import Message
from dist.pretend_gather import PERSISTENT
from dist.sharding import ParallelConfig
from dist.step_time import message_seconds, step_time
from recipes import plan as plan_recipe
from recipes.llama import ModelConfig
from tests.test_dist_memory_plan import CPU, SCHEMA, config, planned

# Layers that hold nearly all; every matrix is above what ZeRO-3 leaves whole.
MODEL = ModelConfig(
    hidden_size=512, num_layers=3, num_heads=8, num_kv_heads=8, intermediate_size=1024,
    tie_embeddings=False, max_position_embeddings=512,
)  # fmt: skip
NODE = replace(CPU, ranks_per_node=4)
H100 = find_device("h100")


@functools.cache
def plan_of(
    num_ranks: int, micro: int = 1, rows: int = 1, device: Any = NODE, **parallel: Any
) -> Plan:
    """`micro` micro-batches of `rows` rows on each rank."""
    shards = num_ranks // max(1, parallel.get("tp", 1))
    asked = config(model=MODEL, global_batch=shards * micro * rows, micro_batch=rows)
    return planned(replace(asked, parallel=ParallelConfig(**parallel)), num_ranks, device)


@pytest.mark.parametrize("parallel", [{"strategy": "fsdp"}, {"strategy": "deepspeed"}])
def test_shards_fall_as_the_ranks_grow(parallel: dict[str, Any]) -> None:
    """A part that every rank holds, or one divided by the wrong number of ranks."""
    if parallel["strategy"] == "deepspeed":
        parallel = {**parallel, "zero_stage": 3}
    kept: list[float] = []
    for ranks in (2, 4, 8):
        made = plan_of(ranks, **parallel)
        held = made.peak.categories
        # ZeRO-3 leaves norms and the vocabulary of 300 whole, on purpose.
        size = 4 * made.num_params
        whole = 7 * 512 * 4 if parallel["strategy"] == "deepspeed" else 0
        kept.append((held[PARAMETERS] + held[OPTIMIZER] - whole) / size)
    assert PERSISTENT < 300 * 512
    # Parameters and two moments; ZeRO-3 has master weights beside its parameters.
    parts = 3 if parallel["strategy"] == "fsdp" else 4
    assert kept == pytest.approx([parts / 2, parts / 4, parts / 8], rel=0.03)


def test_zero_1_and_2_divide_what_the_paper_says() -> None:
    """ZeRO-1 that cuts gradients, ZeRO-2 that does not, or parameters that either cuts."""
    for stage in (1, 2):
        made = plan_of(4, 3, 8, strategy="deepspeed", zero_stage=stage)
        size, held = 4 * made.num_params, made.peak.categories
        assert held[PARAMETERS] == pytest.approx(size, rel=0.01)
        # Master weights and two moments.
        assert held[OPTIMIZER] == pytest.approx(3 * size / 4, rel=0.01)
        if stage == 1:
            assert held[GRADIENTS] > 0.95 * size
        else:
            assert held[GRADIENTS] < 0.75 * size


def test_tensor_parallelism_halves_the_layers() -> None:
    """Layers left whole, or parts that both ranks hold."""
    whole, half = plan_of(1, strategy="ddp"), plan_of(2, strategy="tp", tp=2)
    norms = 7 * 512 * 4
    for category, copies in ((PARAMETERS, 1), (OPTIMIZER, 2)):
        before = whole.peak.categories[category] - copies * norms
        after = half.peak.categories[category] - copies * norms
        assert after == pytest.approx(before / 2, rel=0.01), category
    both = plan_of(4, strategy="fsdp", tp=2).peak.categories
    assert both[PARAMETERS] == pytest.approx(half.peak.categories[PARAMETERS] / 2, rel=0.02)


def test_hsdp_shards_within_its_replica_only() -> None:
    """Shards over all ranks, which hsdp is there to avoid."""
    hybrid = plan_of(8, strategy="hsdp").peak.categories
    alone = plan_of(4, strategy="fsdp").peak.categories
    for category in (PARAMETERS, OPTIMIZER):
        assert hybrid[category] == alone[category]
    sent = plan_of(8, strategy="hsdp").costs.messages["backward"]
    across = [one for one in sent if one.kind == "all_reduce"]
    assert across and {one.ranks for one in across} == {2}
    assert {one.ranks for one in sent if one.kind == "reduce_scatter"} == {4}


def test_reducing_each_micro_batch_keeps_no_whole_gradients() -> None:
    """The option that the plan does not see; then it would propose what helps nobody."""
    step = plan_of(8, 3, 8, strategy="fsdp")
    each = plan_of(8, 3, 8, strategy="fsdp", reduce_each="micro_batch")
    size = 4 * step.num_params
    assert step.peak.categories[GRADIENTS] > 0.9 * size
    assert each.peak.categories[GRADIENTS] < 0.6 * size
    assert each.peak.total < step.peak.total - 0.3 * size
    # Communication is what it costs.
    sums = [
        sum(one.bytes for phase, sent in made.costs.messages.items() for one in sent
            if one.kind == "reduce_scatter" and "earlier" in phase)
        for made in (step, each)
    ]  # fmt: skip
    assert sums[0] == 0 and sums[1] == pytest.approx(size, rel=0.05)


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    """Optimizer state counted on the GPU, or nowhere."""
    kept = plan_of(4, device=H100, strategy="deepspeed")
    moved = plan_of(4, device=H100, strategy="deepspeed", offload_optimizer=True)
    assert kept.host_bytes == 0
    assert moved.peak.categories[OPTIMIZER] == 0
    assert moved.host_bytes > kept.peak.categories[OPTIMIZER]
    # Overlapping on a GPU takes two buckets of 2 GB.
    assert kept.peak.categories[BUFFERS] >= 4_000_000_000


def test_tensor_parallel_messages_are_waited_for() -> None:
    """Messages inside of layers hidden behind the layers that wait for them."""
    made = plan_of(2, device=H100, strategy="tp", tp=2)
    messages = [one for sent in made.costs.messages.values() for one in sent]
    waited = sum(message_seconds(one, H100) for one in messages if one.waited_for)
    assert waited > 0
    time = step_time(made, H100)
    assert time.seconds >= 0.999 * (time.compute_s + waited)
    fsdp = plan_of(2, device=H100, strategy="fsdp")
    assert not any(one.waited_for for sent in fsdp.costs.messages.values() for one in sent)
    # Replicas average after the last backward, with nothing left to hide behind.
    replicas = plan_of(8, device=H100, strategy="tp", tp=2)
    sent = replicas.costs.messages["averaging gradients"]
    # torch gives the gradient of a row-split embedding whole: the other rank's rows travel too.
    other_rows = 4 * SCHEMA["vocab_size"] // 2 * MODEL.hidden_size
    held = replicas.peak.categories[PARAMETERS]  # each tensor rounded up to 512 bytes
    assert held + other_rows - 512 * 30 <= sum(one.bytes for one in sent) <= held + other_rows
    assert isinstance(sent[0], Message) and {one.ranks for one in sent} == {4}


@pytest.mark.parametrize(
    "parallel",
    [
        {"strategy": "ddp"},
        {"strategy": "fsdp"},
        {"strategy": "hsdp"},
        {"strategy": "tp", "tp": 4},
        {"strategy": "fsdp", "tp": 4},
        *({"strategy": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)),
    ],
    ids=lambda one: str(ParallelConfig(**one)),
)
def test_thousands_of_ranks_are_planned(parallel: dict[str, Any]) -> None:
    """Work that grows with the ranks, or an index that only fits small worlds."""
    many = plan_of(4096, **parallel)
    assert many.padded_rows == 0 and many.tokens_per_step == many.layout.dp_size * 64
    assert many.layout.dp_size * many.layout.tp == 4096


def test_what_would_fit_reaches_other_strategies(capsys: pytest.CaptureFixture[str]) -> None:
    """A run that accumulates is told to buy GPUs where reducing each micro-batch would do."""
    words = [
        *("pretrain", "--device", "h100", "--vocab_size", "300", "--seq_len", "64"),
        *("--ranks", "8", "--precision", "fp32", "--global_batch", "64", "--micro_batch", "1"),
        *("--activation_checkpointing", "full", "--model.hidden_size", "512", "--json"),
    ]
    each = [*words, "--parallel.reduce_each", "micro_batch"]
    plan_recipe.main(each)
    needed = json.loads(capsys.readouterr().out)["needed_gib"]
    assert plan_recipe.main([*words, "--memory-gib", str(needed + 0.001)]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["would_fit"][0]["change"] == "--parallel.reduce_each micro_batch"
    assert any("--parallel.tp 4" in case["change"] for case in record["would_fit"][1:])
    zero = ["--parallel.strategy", "deepspeed", "--parallel.offload_optimizer", "true"]
    plan_recipe.main([*words, *zero, "--parallel.zero_stage", "3"])
    needed = json.loads(capsys.readouterr().out)["needed_gib"]
    assert plan_recipe.main([*words, *zero[:2], "--memory-gib", str(needed + 0.001)]) == 1
    record = json.loads(capsys.readouterr().out)
    assert "--parallel.offload_optimizer true" in record["would_fit"][-1]["change"]
