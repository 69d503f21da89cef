"""A step that is not logged waits for nothing on the device: counted on a CPU, traced on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist.dataset import Dataset
from tests.host_reads import HostReads
from tests.make_dataset import write_dataset
from tests.run_ranks import run_ranks

STEPS, EVERY = 9, 4
# Places that may read in any step: the guard's copy of the verdict on an earlier step.
ALLOWED = {"dist/guard.py:read"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), documents=60, with_tokenizer=False)


def reads(
    url: str, folder: str, strategy: str, kernel: str, spoil: bool
) -> tuple[list[int], list[tuple[int, str, str]], list[tuple[int, int]]]:
    """Train on this rank; (steps, host reads, (step of a verdict, step in which it was read))."""
    from contextlib import ExitStack

    import dist.guard
    import recipes.pretrain as recipe
    from dist.guard import GuardConfig
    from dist.ranks import Ranks
    from tests.strategy_runs import config

    counter = HostReads()
    verdicts: list[tuple[int, int]] = []
    callbacks, read, saw = recipe.run_callbacks, dist.guard._Report.read, recipe.Guard.saw

    def with_counter(*args: Any, **kwargs: Any) -> Any:
        kwargs["guard"]._lag = 1  # as beside a GPU
        recorder, made = callbacks(*args, **kwargs)
        return recorder, [counter, *made]

    def read_noted(self: Any) -> Any:
        verdicts.append((self._step, counter._step))
        return read(self)

    def saw_and_waits(self: Any, batch: Any, loss_sum: torch.Tensor) -> None:
        saw(self, batch, loss_sum)
        if spoil and batch.step == 1:
            loss_sum.item()
        if spoil and batch.step == 2:
            torch.ops.aten._local_scalar_dense(loss_sum.detach())
        if spoil and batch.step == 4:
            loss_sum.tolist()
        if spoil and batch.step == 5 and loss_sum > 1e9:
            raise AssertionError

    recipe.run_callbacks = with_counter  # type: ignore[assignment]
    dist.guard._Report.read = read_noted  # type: ignore[method-assign]
    recipe.Guard.saw = saw_and_waits  # type: ignore[method-assign]
    if kernel == "varlen":
        take_varlen()
    precision = "bf16-true" if strategy == "fsdp" else "fp32"  # its optimizer is our own
    changes = {
        "parallel": {"strategy": strategy}, "max_steps": STEPS, "log_every_steps": EVERY,
        "micro_batch": 2, "precision": precision,
        "guard": GuardConfig(policy="skip", spike_factor=9.0),
    }  # fmt: skip
    with ExitStack() as stack:
        assert recipe.run(config(url, folder, changes), Ranks.from_environment(), stack) == 0
    return counter.steps, counter.found, verdicts


def take_varlen() -> None:
    """The way that a GPU takes through dist.attention, with a kernel in plain torch."""
    import dist.attention
    from tests.test_dist_attention import varlen_213

    @torch.library.custom_op("leyden_tests::varlen_reads", mutates_args=())
    def op(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, longest: int
    ) -> torch.Tensor:
        kw: dict[str, Any] = {"window_size": (-1, 0), "enable_gqa": True}
        return varlen_213(q, k, v, cu, cu, longest, longest, **kw)

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v = ctx.saved_tensors
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None, None

    op.register_autograd(backward, setup_context=lambda ctx, inputs, output:
                         ctx.save_for_backward(*inputs[:3]))  # fmt: skip

    def kernel(
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, **_: Any
    ) -> Any:
        assert isinstance(max_q, int)
        return op(q, k, v, cu_q, max_q)

    dist.attention._varlen = lambda: kernel  # type: ignore[assignment]
    dist.attention.attention_kernel = lambda *_: "varlen"  # type: ignore[assignment]


def waiting(found: list[tuple[int, str, str]], steps: list[int]) -> list[tuple[int, str, str]]:
    """Reads in steps that do not log, where none is allowed."""
    logged = {step for step in steps if (step + 1) % EVERY == 0 or step == STEPS - 1}
    return [
        (step, name, place)
        for step, name, place in found
        if step not in logged and place not in ALLOWED
    ]


@pytest.mark.parametrize(
    ("strategy", "kernel"), [("ddp", "cpu"), ("fsdp", "varlen"), ("tp", "cpu")]
)
def test_no_host_read_in_a_step_that_does_not_log(
    dataset: Dataset, tmp_path: Path, strategy: str, kernel: str
) -> None:
    """`loss.item()` or `if norm > limit` in a step: the GPU's queue runs empty at every batch."""
    args = (dataset.storage.url, str(tmp_path / "run"), strategy, kernel, False)
    for steps, found, verdicts in run_ranks(reads, 2, 240, *args):
        assert steps == list(range(STEPS))
        assert waiting(found, steps) == []
        assert any(step in (EVERY - 1, STEPS - 1) for step, _, _ in found), "nothing was counted"
        # A verdict is read one step later; only the last save waits for its own.
        assert all(read > judged for judged, read in verdicts if judged < STEPS - 2)
        assert len(verdicts) == STEPS


def test_the_counter_sees_a_read(dataset: Dataset, tmp_path: Path) -> None:
    """A counter that sees nothing would let everything pass."""
    args = (dataset.storage.url, str(tmp_path / "run"), "ddp", "cpu", True)
    ((steps, found, _),) = run_ranks(reads, 1, 240, *args)
    assert {step for step, _, _ in waiting(found, steps)} == {1, 2, 4, 5}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: no CUDA device here")
def test_no_host_sync_on_a_gpu(dataset: Dataset, tmp_path: Path) -> None:
    """What the counter cannot see: copies to the host and waits inside of kernels' launchers."""
    from contextlib import ExitStack

    from dist.profiling import ProfileConfig
    from dist.ranks import Ranks
    from dist.trace_summary import host_waits, read_trace
    from recipes.pretrain import run
    from tests.strategy_runs import config

    changes = {
        "parallel": {"strategy": "ddp"}, "max_steps": 12, "log_every_steps": 10,
        "profile": ProfileConfig(steps=[4, 8]), "micro_batch": 2,
    }  # fmt: skip
    with ExitStack() as stack:
        made = config(dataset.storage.url, str(tmp_path / "run"), changes)
        assert run(made, Ranks.from_environment(), stack) == 0
    assert host_waits(read_trace(tmp_path / "run" / "profile" / "rank-0.json")) == {}


def test_waits_are_read_from_a_trace(tmp_path: Path) -> None:
    """Names that do not match what the profiler writes: the GPU check would pass with waits."""
    from dist.trace_summary import host_waits, read_trace

    events = [
        ("aten::item", "cpu_op"), ("aten::_local_scalar_dense", "cpu_op"),
        ("cudaStreamSynchronize", "cuda_runtime"), ("cudaDeviceSynchronize", "cuda_runtime"),
        ("Memcpy DtoH (Device -> Pageable)", "gpu_memcpy"),
        ("Memcpy DtoH (Device -> Pinned)", "gpu_memcpy"), ("aten::mm", "cpu_op"),
    ]  # fmt: skip
    written = [
        {"ph": "X", "name": name, "cat": cat, "ts": i, "dur": 2, "tid": 1, "pid": 1}
        for i, (name, cat) in enumerate(events)
    ]
    path = tmp_path / "rank-0.json"
    path.write_text(json.dumps({"traceEvents": written}))
    assert host_waits(read_trace(path)) == {
        "aten::item": 1, "aten::_local_scalar_dense": 1, "cudaStreamSynchronize": 1,
        "Memcpy DtoH (Device -> Pageable)": 1,
    }  # fmt: skip
