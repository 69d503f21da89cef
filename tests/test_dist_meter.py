"""dist/meter.py and dist/monitor.py: what is measured, what it is divided by, and the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist.dataset import Dataset
from dist.errors import ConfigError
from dist.local_device import matmul_flops
from dist.meter import (
    MeterConfig,
    Peak,
    Speed,
    device_peak,
    held_up_by,
    mfu,
    named_peak,
    token_flops,
    verdict,
)
from tests.make_dataset import write_dataset
from tests.rank_processes import World
from tests.same_run import lines


def llama_flops(tied: bool) -> Any:
    from recipes.llama import ModelConfig, build

    config = ModelConfig(
        hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=96,
        tie_embeddings=tied,
    )  # fmt: skip
    model = build(config, {"vocab_size": 300, "seq_len": 32, "bos_id": None, "eos_id": 1})
    return token_flops(
        model.named_parameters(), num_layers=3, width=64, seq_len=32, tied=tied
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_torch_counts(tied: bool) -> None:
    """A forgotten factor, the embedding counted as a matmul or the output matrix not counted make
    every published MFU wrong. torch's own counter sees each matmul of a forward."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            tie_word_embeddings=tied,
            attn_implementation="eager",
            use_cache=False,
        )  # fmt: skip
    )
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, 32, dtype=torch.long))
    counted = counter.get_total_flops() / 32
    flops = llama_flops(tied)
    assert flops.full / 3 == pytest.approx(counted, rel=1e-9)
    # Causal: the other half of attention is masked.
    assert flops.full - flops.causal == 6 * 3 * 64 * 32


def test_peaks_are_found_by_name_and_unknown_ones_are_said() -> None:
    """An H100 PCIe divided by the SXM's peak reads a quarter too low; a guess for an unknown
    device is a made-up number."""
    names = {
        "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4, "NVIDIA H100 PCIe": 756,
        "NVIDIA H100 NVL": 835.5, "NVIDIA GH200 480GB": 989.4, "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA A100-PCIE-40GB": 312, "NVIDIA A100-SXM4-40GB": 312, "NVIDIA B200": 2250,
        "NVIDIA L40S": 362.05, "NVIDIA L4": 121, "NVIDIA A10G": 70, "NVIDIA A10": 125,
        "AMD Instinct MI300X": 1307.4, "NVIDIA GeForce RTX 4090": 165.2,
    }  # fmt: skip
    for name, tflops in names.items():
        assert named_peak(name, torch.bfloat16).flops == pytest.approx(tflops * 1e12), name
    assert "h100" in named_peak("NVIDIA H100 80GB HBM3", torch.bfloat16).source
    assert named_peak("NVIDIA A100-SXM4-80GB", torch.float32).flops == 19.5e12
    # These have fp16 units and none for bf16, which runs at a fraction that no sheet gives.
    for name, tflops in {"Tesla V100-SXM2-32GB": 125, "Tesla T4": 65}.items():
        assert named_peak(name, torch.float16).flops == tflops * 1e12
        assert named_peak(name, torch.bfloat16).flops == 0
    unknown = named_peak("Some GPU", torch.bfloat16)
    assert unknown.flops == 0 and "meter.peak_tflops" in unknown.source
    assert mfu(1.0, 1.0, unknown, 1) is None
    given = device_peak(torch.device("cpu"), torch.float32, MeterConfig(peak_tflops=2.0))
    assert given == Peak(flops=2e12, source="meter.peak_tflops")
    assert mfu(100.0, 1e10, given, 2) == pytest.approx(0.25)
    with pytest.raises(ConfigError, match="meter"):
        MeterConfig(peak_tflops=-1)


def test_a_cpus_peak_is_measured() -> None:
    """Without one a CPU run has no MFU at all, and nothing to compare with."""
    assert 1e8 < matmul_flops(torch.float32, 768) < 1e14
    peak = device_peak(torch.device("cpu"), torch.float32, MeterConfig())
    assert peak.flops > 0 and "measured" in peak.source


def speed(**changes: Any) -> Speed:
    facts = {
        "tokens_per_s": 12345.6, "step_s": 0.41, "data_share": 0.01, "communication_share": 0.02,
        "outside_share": 0.01, "mfu": 0.5, "mfu_causal": 0.45, "peak_memory_gib": 3.25,
    }  # fmt: skip
    return Speed(**{**facts, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "compute-bound"),
        ({"data_share": 0.18}, "data-bound 18%: put the dataset"),
        ({"communication_share": 0.4}, "communication-bound 40%"),
        ({"outside_share": 0.3}, "interrupted 30%"),
        ({"data_share": 0.06, "outside_share": 0.5}, "interrupted 50%"),
        ({"communication_share": None}, "compute-bound"),
    ],
)
def test_the_verdict_names_what_costs_most(changes: dict[str, Any], said: str) -> None:
    """A verdict that names another bottleneck than the worst sends a person to the wrong knob."""
    assert held_up_by(speed(**changes)).startswith(said)


def test_the_verdict_is_one_line_with_every_number() -> None:
    """A number without what it divides by, or one not measured shown as 0."""
    line = verdict(speed(communication_share=None), Peak(flops=2e12, source="a test"))
    assert "\n" not in line
    for part in ("12,346 tokens/s", "0.41 s", "MFU 50.0% (45.0% causal) of 2 TFLOP/s", "[a test]",
                 "data wait 1%", "communication not measured", "3.25 GiB"):  # fmt: skip
        assert part in line
    assert "no MFU: unknown" in verdict(speed(mfu=None), Peak(flops=0.0, source="unknown"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), with_tokenizer=False)


def slow_data(rank: int, victim: int) -> None:
    """One rank's loader takes 0.2 s a row."""
    import time

    from dist import step_gather

    original = step_gather.gather_rows

    def gather_rows(shards: Any, which: Any, rows: Any, *args: Any) -> Any:
        if rank == victim:
            time.sleep(0.2 * len(rows))
        return original(shards, which, rows, *args)

    step_gather.gather_rows = gather_rows


def test_a_run_is_metered_and_a_slow_rank_is_seen_by_all(dataset: Dataset, tmp_path: Path) -> None:
    """Rank 0 waits in its collective, not for data: metered alone it would call the run
    compute-bound while rank 1's disk is the reason."""
    changes = {"strategy": "ddp", "max_steps": 6, "save_every_steps": 0}
    with World(dataset.storage.url, tmp_path / "run", 2, changes, slow_data, 1) as world:
        assert world.wait() == [0, 0], world.said(0)
        said = world.said(0)
        assert "meter: " not in world.said(1)
    (line,) = [line for line in said.splitlines() if line.startswith("meter: ")]
    assert "data-bound" in line and "tokens/s" in line and "MFU" in line
    measured = [one for one in lines(tmp_path / "run", "metrics.jsonl") if "step_s" in one]
    assert [one["step"] for one in measured] == [1, 2, 3, 4, 5, 6]
    assert all(one["data_wait_share"] > 0.3 for one in measured[1:])
    assert all(0 < one["mfu_causal"] < one["mfu"] < 1 for one in measured)
    assert any("communication_share" in one for one in measured)
    (event,) = [e for e in lines(tmp_path / "run", "ledger.jsonl") if e["event"] == "meter"]
    assert event["verdict"] in line
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["status"] == "completed"
