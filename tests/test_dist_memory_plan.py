"""The memory plan against real runs, and its counts against arithmetic."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import all_gather_single

from benchmarks import plan_memory
from benchmarks.plan_memory import measure
from dist.dataset import open_dataset
from dist.deepspeed_zero import REDUCE_BUCKET
from dist.devices import DEVICES, Device, find_device
from dist.errors import ConfigError
from dist.memory_plan import Plan, Request, plan
from dist.memory_trace import (
    BUFFERS,
    GRADIENTS,
    LOSS,
    OPTIMIZER,
    PARAMETERS,
    TEMPORARY,
    MemoryTrace,
)
from dist.op_cost import Message, Op
from dist.sharding import ParallelConfig, StrategyName
from dist.start import DataConfig
from dist.step_time import message_seconds, op_seconds, step_time
from recipes import plan as plan_recipe
from recipes.llama import ModelConfig
from recipes.pretrain import Config, module_to_plan
from tests.make_dataset import write_dataset
from tests.run_ranks import run_ranks

CPU = Device(
    name="cpu", kind="cpu", memory_gib=8, bf16_flops=1e11, fp32_flops=1e11,
    memory_bytes_per_s=1e10, node_bytes_per_s=1e9, network_bytes_per_s=1e9,
)  # fmt: skip
SCHEMA = {"vocab_size": 300, "seq_len": 64, "bos_id": None, "eos_id": 1}
_keep: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def data_url() -> str:
    _keep.append(tempfile.TemporaryDirectory(prefix="leyden-plan-"))
    return write_dataset(Path(_keep[0].name) / "data", seq_len=128, longest=200).storage.url


def config(strategy: StrategyName = "fsdp", checkpointing: str = "none", **more: Any) -> Config:
    model = ModelConfig(
        hidden_size=192, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=400,
        tie_embeddings=False, max_position_embeddings=512,
    )  # fmt: skip
    known = {"model": model, "precision": "fp32", "global_batch": 8, "micro_batch": 4} | more
    return Config(
        parallel=ParallelConfig(strategy=strategy), activation_checkpointing=checkpointing, **known
    )


def planned(
    config: Config, num_ranks: int = 1, device: Device = CPU, schema: dict[str, Any] = SCHEMA
) -> Plan:
    return plan(
        Request(
            make_module=module_to_plan, config=config, schema=schema, num_ranks=num_ranks,
            device=device,
        )
    )  # fmt: skip


ZERO_3: dict[str, Any] = {"strategy": "deepspeed", "zero_stage": 3}


@pytest.mark.parametrize(
    ("num_ranks", "parallel", "checkpointing", "global_batch"),
    [
        (1, {"strategy": "ddp"}, "none", 4),
        pytest.param(2, {"strategy": "ddp"}, "full", 16, marks=pytest.mark.all_cells),
        (2, {"strategy": "fsdp"}, "none", 8),
        (2, {"strategy": "fsdp"}, "full", 16),
        (2, {"strategy": "fsdp", "reduce_each": "micro_batch"}, "full", 16),
        (2, {"strategy": "tp"}, "none", 8),
        pytest.param(
            2, {"strategy": "deepspeed", "zero_stage": 1}, "none", 16, marks=pytest.mark.all_cells
        ),
        (2, {"strategy": "deepspeed", "zero_stage": 2}, "none", 16),
        (2, ZERO_3, "none", 8),
        pytest.param(2, ZERO_3, "full", 16, marks=pytest.mark.all_cells),
    ],
)
def test_the_plan_is_what_a_run_allocates(
    num_ranks: int,
    parallel: dict[str, Any],
    checkpointing: str,
    global_batch: int,
    tmp_path: Path,
) -> None:
    """Anything forgotten: a second copy of gradients, buckets, gathered parameters, the loss."""
    data = DataConfig(url=data_url())
    asked = config("fsdp", checkpointing, global_batch=global_batch, data=data)
    asked = replace(asked, parallel=ParallelConfig(**parallel))
    zero = parallel["strategy"] == "deepspeed"
    if parallel == ZERO_3:
        # Wide enough that ZeRO-3 cuts its matrices: smaller ones stay whole.
        model = replace(asked.model, hidden_size=384, intermediate_size=800)
        asked = replace(asked, model=model)
    real = run_ranks(measure, num_ranks, 240, replace(asked, run=str(tmp_path / "run")))
    made = planned(asked, num_ranks, schema=open_dataset(data_url()).manifest.schema)
    held = made.peak.categories
    # DeepSpeed's bucket, 2 GB whatever the model, would hide all else.
    bucket = 4 * REDUCE_BUCKET if zero else 0
    for one in real:
        assert made.peak.total - bucket == pytest.approx(one.peak - bucket, rel=0.10)
        if not zero:  # its optimizer holds one group at a time
            assert held[PARAMETERS] == pytest.approx(one.parameters, rel=0.01)
            assert held[OPTIMIZER] == pytest.approx(one.optimizer, rel=0.01)


def looked_at() -> list[bool]:
    whole = torch.ones(8)
    gathered = all_gather_single(whole, 0, torch.distributed.group.WORLD)  # not waited for
    with FakeTensorMode():
        cycle: list[Any] = [torch.empty(8)]
    cycle.append(cycle)  # stays until it is collected
    kept = plan_memory.storages()
    found = [one.untyped_storage().data_ptr() in kept for one in (whole, gathered.elem)]
    gathered.wait()
    return found


def test_the_measurement_looks_at_memory_only() -> None:
    """A tensor without memory, such as a collective's result under tp, that ends a measurement."""
    assert run_ranks(looked_at, 1, 240) == [[True, True]]


def test_shards_of_all_ranks_make_the_model() -> None:
    """A plan of N ranks that holds N times its share, or forgets the padding."""
    whole = planned(config(global_batch=64, micro_batch=1), 1).peak.categories
    many = planned(config(global_batch=64, micro_batch=1), 16).peak.categories
    for category in (PARAMETERS, OPTIMIZER):
        assert whole[category] <= 16 * many[category] < 1.35 * whole[category], category


def test_accumulation_under_fsdp_holds_full_gradients() -> None:
    """Gradients of earlier micro-batches stay unsharded; a plan of one micro-batch misses them."""
    once = planned(config(global_batch=16, micro_batch=4), 4)
    twice = planned(config(global_batch=32, micro_batch=4), 4)
    more = planned(config(global_batch=64, micro_batch=4), 4)
    assert once.num_micro == 1 and twice.num_micro == 2 and more.num_micro == 4
    full = 4 * once.num_params
    assert twice.peak.total - once.peak.total > 0.5 * full
    assert twice.peak.categories[GRADIENTS] > 0.9 * full
    assert more.peak.total == twice.peak.total


def test_checkpointing_and_smaller_micro_batches_need_less() -> None:
    """A recipe's option that the plan does not see."""
    most = planned(config(global_batch=8, micro_batch=8)).peak.total
    assert planned(config(global_batch=8, micro_batch=2)).peak.total < most
    assert planned(config(checkpointing="full", global_batch=8, micro_batch=8)).peak.total < most


def test_flops_are_those_of_the_matrices() -> None:
    """Work counted twice, or the recomputation forgotten."""
    asked = config(global_batch=4, micro_batch=4)
    made = planned(asked)
    tokens, vocab, model = 4 * SCHEMA["seq_len"], SCHEMA["vocab_size"], asked.model
    in_matrices = made.num_params - vocab * model.hidden_size  # an embedding multiplies nothing
    pairs = SCHEMA["seq_len"] * tokens * model.hidden_size * model.num_layers
    # The CPU's masked attention computes all pairs: two matmuls forward, five backward.
    expected = 6 * in_matrices * tokens + (4 + 10) * pairs
    assert made.costs.flops() == pytest.approx(expected, rel=0.02)
    full = planned(config(checkpointing="full", global_batch=4, micro_batch=4))
    head = vocab * model.hidden_size  # outside the blocks: not computed again
    # torch stops recomputing before a block's last matmul, whose output nothing needs.
    last = model.hidden_size * model.intermediate_size * model.num_layers
    again = 2 * (in_matrices - head - last) * tokens + 4 * pairs
    assert full.costs.flops() - made.costs.flops() == pytest.approx(again, rel=0.02)


def test_messages_carry_every_parameter() -> None:
    """A collective that the estimate does not see, or of the wrong size or group."""
    made = planned(config(global_batch=16), 4)
    size = 4 * made.num_params
    by_kind: dict[str, int] = {}
    for message in (one for sent in made.costs.messages.values() for one in sent):
        assert message.ranks == 4
        by_kind[message.kind] = by_kind.get(message.kind, 0) + message.bytes
    assert by_kind["reduce_scatter"] == pytest.approx(size, rel=0.02)
    assert size < by_kind["all_gather"] < 2.05 * size
    ddp = planned(config("ddp", global_batch=16), 4).costs.messages["backward"]
    assert sum(one.bytes for one in ddp) == size


def test_a_planned_gpu_takes_the_kernels_of_a_gpu() -> None:
    """A plan for a GPU with the CPU's mask and loss chunks; and the choices must be put back."""
    import dist.attention
    import dist.loss

    before = dist.loss.chunk_tokens, dist.attention.attention_kernel, dist.loss._SummedLoss.forward
    gpu = planned(config(precision="auto"), device=find_device("h100"))
    after = dist.loss.chunk_tokens, dist.attention.attention_kernel, dist.loss._SummedLoss.forward
    assert after == before
    assert gpu.precision.name == "bf16-mixed"
    assert gpu.peak.total % 512 == 0
    assert not torch.distributed.is_initialized()


def test_a_model_of_billions_on_a_thousand_ranks_is_planned_without_memory() -> None:
    """A tensor that is really allocated would end this process."""
    shape = ModelConfig(
        hidden_size=8192, num_layers=2, num_heads=64, num_kv_heads=8, intermediate_size=28672,
        tie_embeddings=False,
    )  # fmt: skip
    schema = {**SCHEMA, "vocab_size": 128256, "seq_len": 8192}
    asked = config(
        checkpointing="full", model=shape, precision="auto", global_batch=1024, micro_batch=1
    )
    made = planned(asked, 1024, find_device("h100"), schema)
    assert made.num_params > 3.5e9
    held = made.peak.categories
    assert held[PARAMETERS] < 1.1 * 4 * made.num_params / 1024
    # The root gathers both vocabulary matrices, in bf16.
    assert held[BUFFERS] + held[LOSS] + held[TEMPORARY] > 2 * 128256 * 8192 * 2


def test_the_trace_sees_frees_and_resizes() -> None:
    """A sum that only grows, or one blind to how FSDP2 frees its gathered parameters."""
    trace = MemoryTrace()
    with trace:
        one = torch.zeros(1000)
        del one
        two = torch.zeros(500)
        two.untyped_storage().resize_(0)
        two.untyped_storage().resize_(3000)
        trace.in_phase("backward")
        three = torch.zeros(600)
    assert trace.peak().total == 5400
    assert trace.peak().phase == "backward"
    trace.enter([three], GRADIENTS)
    assert trace.peak().categories[GRADIENTS] == 2400


def test_message_times_by_hand() -> None:
    """Bytes per bit, one direction for two, or the network's rate within a node."""
    device = find_device("h100")
    alone = Message(kind="all_gather", bytes=1 << 30, ranks=1)
    assert message_seconds(alone, device) == 0.0
    node = Message(kind="all_gather", bytes=1 << 30, ranks=8)
    by_hand = (1 << 30) * 7 / 8 / (450e9 * 0.75) + 7 * 1.5e-6
    assert message_seconds(node, device) == pytest.approx(by_hand)
    twice = Message(kind="all_reduce", bytes=1 << 30, ranks=8)
    assert message_seconds(twice, device) == pytest.approx(2 * by_hand)
    # Eight adapters of 50 GB/s each are slower than NVLink's 450.
    nodes = Message(kind="all_gather", bytes=1 << 30, ranks=64)
    by_hand = (1 << 30) * 63 / 64 / (400e9 * 0.75) + 8 * 6e-6 + 55 * 1.5e-6
    assert message_seconds(nodes, device) == pytest.approx(by_hand)


def test_an_operation_is_bound_by_the_slower_of_work_and_memory() -> None:
    """A sum instead of a maximum, or the other dtype's peak."""
    device = find_device("h100")
    matmul = Op(flops=10**13, bytes=10**9, half=True)
    assert op_seconds(matmul, device) == pytest.approx(1e13 / (989.4e12 * 0.7))
    copy = Op(flops=0, bytes=10**10, half=True)
    assert op_seconds(copy, device) == pytest.approx(1e10 / (3.35e12 * 0.8))
    assert op_seconds(Op(flops=1, bytes=4, half=False), device) == 5e-6


def test_a_step_of_many_micro_batches_costs_them_all() -> None:
    """An estimate of the two that are traced."""
    two = step_time(planned(config(global_batch=8)), CPU)
    eight = step_time(planned(config(global_batch=32)), CPU)
    assert eight.flops == pytest.approx(4 * two.flops, rel=0.01)
    assert eight.seconds > 3 * two.seconds
    assert eight.tokens_per_s == pytest.approx(32 * 64 / eight.seconds)


def test_what_is_not_planned_is_refused() -> None:
    """A plan of a layout that no run would have."""
    odd = replace(config(), parallel=ParallelConfig(strategy="tp", tp=3))
    with pytest.raises(ConfigError, match="tp 3 does not divide 4 ranks"):
        planned(odd, 4)
    auto = replace(config(), micro_batch="auto")
    with pytest.raises(ConfigError, match="micro_batch auto"):
        planned(auto)
    with pytest.raises(ConfigError, match="1 to 4096"):
        planned(config(), 5000)
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        find_device("h10")
    assert set(DEVICES) >= {"h100", "h200", "a100-80", "a100-40", "b200", "l40s", "rtx4090"}


WORDS = (
    *("pretrain", "--device", "h100", "--vocab_size", "300", "--seq_len", "64", "--ranks", "2"),
    *("--precision", "fp32", "--parallel.strategy", "ddp", "--global_batch", "16"),
    *("--micro_batch", "8", "--json"),
)


def test_what_would_fit_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """A suggestion that was never tried, or an exit code that says the opposite."""
    assert plan_recipe.main(WORDS) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["fits"] and first["would_fit"] == []
    assert sum(first["categories_bytes"].values()) == first["peak_bytes"]
    held = first["categories_bytes"]
    kept = held[PARAMETERS] + held[OPTIMIZER] + held[GRADIENTS]
    # Less than ddp keeps for good, so that neither small micro-batches nor checkpointing serve.
    memory = 2.0 + 0.95 * kept / (1 << 30)
    assert plan_recipe.main([*WORDS, "--memory-gib", str(memory)]) == 1
    second = json.loads(capsys.readouterr().out)
    assert not second["fits"] and second["would_fit"]
    for case in second["would_fit"]:
        assert case["fits"] and case["needed_gib"] <= memory
        assert "fsdp" in case["change"]
    assert plan_recipe.main([*WORDS, "--memory-gib", str(first["needed_gib"] - 0.005)]) == 1
    third = json.loads(capsys.readouterr().out)
    assert "fsdp" not in third["would_fit"][0]["change"]


def test_sizes_come_from_the_dataset_or_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    """A plan of a vocabulary that nobody named."""
    with pytest.raises(ConfigError, match="pass --data.url"):
        plan_recipe.parse(["pretrain", "--ranks", "2"])
    with pytest.raises(ConfigError, match="--vocab_size 7, but"):
        plan_recipe.parse(["pretrain", "--data.url", data_url(), "--vocab_size", "7"])
    asked, _ = plan_recipe.parse(["pretrain", "--data.url", data_url()])
    assert asked.schema["seq_len"] == 128
    with pytest.raises(ConfigError, match="unknown key"):
        plan_recipe.parse(["pretrain", "--micro_bach", "4"])
