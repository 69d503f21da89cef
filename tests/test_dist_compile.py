"""dist/compile.py: compiled blocks give the same numbers, compile once, and fall back in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import dist.attention
from dist.activation import checkpoint_blocks
from dist.batch import Batch
from dist.compile import check_compile, compile_blocks, decide_compile, toolchain_problem
from dist.errors import ConfigError
from dist.initialise import materialise
from dist.mesh import data_mesh
from dist.precision import Precision
from dist.sharding import shard_fsdp
from recipes import llama
from tests.run_ranks import run_ranks
from tests.test_dist_attention import CONFIG, SCHEMA, make_batch, varlen_213

CPU = torch.device("cpu")


def batches() -> list[Batch]:
    """Micro-batches of two rows with 2 to 7 documents of many lengths."""
    rng = np.random.default_rng(1)
    cuts = [[25], [7, 1, 9, 5], [12, 13], [3, 3, 19], [24, 1], [2, 2, 2, 2, 2]]
    rows = [[rng.integers(0, 50, n).astype(np.uint16) for n in lens] for lens in cuts]
    return [make_batch([rows[i], rows[(i + 1) % len(rows)]]) for i in range(len(rows))]


def make_model(checkpointing: str, backend: str, sharded: bool = False) -> llama.PackedDecoder:
    model = llama.build(CONFIG, SCHEMA)
    checkpoint_blocks(llama.blocks(model), checkpointing)
    if backend:
        compile_blocks(llama.blocks(model), backend)
        model.compiled = True
    if sharded:
        shard_fsdp(model, llama.blocks(model), data_mesh(CPU), Precision(name="fp32", reason=""))
    materialise(model, CPU, 0, 0.02)
    return model


def gradients(model: llama.PackedDecoder, batch: Batch) -> list[torch.Tensor]:
    model.zero_grad()
    model(batch).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("checkpointing", ["none", "full", "op-level"])
def test_many_documents_compile_once(checkpointing: str) -> None:
    """A compilation for every number or length of documents makes a run slower than eager."""
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = make_model(checkpointing, ""), make_model(checkpointing, "aot_eager")
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in compiled.named_parameters()]
    for batch in batches():
        for one, other in zip(gradients(plain, batch), gradients(compiled, batch), strict=True):
            assert torch.equal(one, other)
    assert counters["stats"]["unique_graphs"] == 1  # both blocks share it
    with torch.no_grad():  # validation
        for model in (plain, compiled):
            model.eval()
        for batch in batches()[:2]:
            assert torch.equal(plain(batch), compiled(batch))
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_varlen_borders_do_not_specialise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU path: cu_seqlens has another length in every micro-batch, and the longest document
    is a Python number, which a graph would hold as a constant."""
    torch._dynamo.reset()
    counters.clear()

    @torch.library.custom_op("leyden_tests::varlen", mutates_args=())
    def op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        return varlen_213(q, k, v, cu, cu, 1, 1, window_size=(-1, 0), enable_gqa=True)

    op.register_fake(lambda q, k, v, cu: torch.empty_like(q))

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, scale, enable_gqa=False):  # type: ignore[no-untyped-def]
        assert max_q == max_k == 24
        return op(q, k, v, cu_q)

    monkeypatch.setattr(dist.attention, "_varlen", lambda: kernel)
    monkeypatch.setattr(dist.attention, "attention_kernel", lambda device, dtype: "varlen")
    compiled = make_model("none", "aot_eager")
    plain = make_model("none", "")
    plain.compiled = True  # the same bound of the documents' lengths
    with torch.no_grad():
        for batch in batches():
            torch.testing.assert_close(compiled(batch), plain(batch))
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]


def sharded_difference() -> tuple[float, int]:
    plain, compiled = make_model("full", "", True), make_model("full", "aot_eager", True)
    worst = 0.0
    for batch in batches()[:2]:
        for one, other in zip(gradients(plain, batch), gradients(compiled, batch), strict=True):
            worst = max(worst, (one - other).to_local().abs().max().item())  # type: ignore[attr-defined]
    return worst, counters["stats"]["unique_graphs"]


def test_compiled_blocks_under_fsdp() -> None:
    """Hooks of FSDP inside a graph, or a graph that holds freed parameters, would show."""
    for worst, graphs in run_ranks(sharded_difference, 2, 240):
        assert worst == 0.0 and graphs == 1


@pytest.mark.skipif(bool(toolchain_problem(CPU)), reason=f"no compiler: {toolchain_problem(CPU)}")
def test_inductor_gives_nearly_the_same_numbers() -> None:
    """The backend that runs use: fused kernels must differ by rounding only."""
    torch._dynamo.reset()
    plain, compiled = make_model("full", ""), make_model("full", "inductor")
    batch = batches()[1]
    for one, other in zip(gradients(plain, batch), gradients(compiled, batch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_without_a_compiler_it_is_off_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Inductor fails at the first step, minutes after the start, with a page of traceback."""
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    found = decide_compile("blocks", CPU)
    assert found.name == "off" and "rank 0: no C++ compiler (/nonexistent/c++)" in found.reason
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler (g++)" in str(decide_compile("blocks", CPU))
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/false\n")
    broken.chmod(0o755)
    assert "does not run" in toolchain_problem(CPU)
    assert str(decide_compile("off", CPU)) == "off"


def one_rank_without() -> str:
    import os

    if torch.distributed.get_rank() == 1:
        os.environ["CXX"] = "/nonexistent/c++"
    return str(decide_compile("blocks", CPU))


@pytest.mark.skipif(bool(toolchain_problem(CPU)), reason=f"no compiler: {toolchain_problem(CPU)}")
def test_all_ranks_decide_alike() -> None:
    """Ranks that compile beside ranks that do not round differently: runs would not repeat."""
    zero, one = run_ranks(one_rank_without, 2, 240)
    assert zero == one and zero.startswith("off (blocks was asked for, but rank 1")


def test_model_under_fsdp_is_refused() -> None:
    """Its hooks break the graph at every block, and nobody would know why it is slow."""
    with pytest.raises(ConfigError, match="use compile blocks"):
        check_compile("model", "fsdp")
    check_compile("model", "ddp")
    check_compile("blocks", "fsdp")


@pytest.mark.parametrize(("strategy", "tp"), [("tp", 0), ("fsdp", 2)])
def test_split_layers_are_refused(strategy: str, tp: int) -> None:
    """A compiled fsdp x tp trains, with wrong gradients: losses 1 % off, and nobody is told."""
    with pytest.raises(ConfigError, match="compile blocks under tensor parallelism"):
        check_compile("blocks", strategy, tp)
    check_compile("off", strategy, tp)
    check_compile("blocks", "fsdp", 1)
