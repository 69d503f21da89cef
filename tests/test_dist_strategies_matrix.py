"""The same twenty steps under every strategy: one process's losses, weights and moments.

Each strategy is crossed pairwise with activation checkpointing and accumulation, some with
torch.compile. `pytest` runs one cell of each strategy, LEYDEN_ALL_CELLS=1 all of them;
LEYDEN_CELLS=REGEX only cells of these names; LEYDEN_WRITE_MATRIX=1 writes the table into
docs/strategies.md.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dist.compile import toolchain_problem
from dist.dataset import Dataset
from dist.errors import ConfigError
from dist.guard import GuardConfig
from tests.make_dataset import write_dataset
from tests.run_ranks import run_ranks
from tests.strategy_runs import Job, at_step, config, losses, play, tensors

ALL = bool(os.environ.get("LEYDEN_ALL_CELLS"))
DOC = Path(__file__).parent.parent / "docs" / "strategies.md"
ZERO = {f"ZeRO-{n}": {"strategy": "deepspeed", "zero_stage": n} for n in (1, 2, 3)}
# Name -> (ranks, data-parallel size, config).
STRATEGIES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one process": (1, 1, {"strategy": "ddp"}),
    "ddp": (2, 2, {"strategy": "ddp"}),
    "fsdp": (2, 2, {"strategy": "fsdp"}),
    "hsdp 2x2": (4, 4, {"strategy": "hsdp", "replicas": 2}),
    "tp 2": (2, 1, {"strategy": "tp"}),
    "tp 2, 2 replicas": (4, 2, {"strategy": "tp", "tp": 2}),
    "fsdp x tp 2x2": (4, 2, {"strategy": "fsdp", "tp": 2}),
    **{name: (2, 2, config) for name, config in ZERO.items()},
    "ZeRO-2, offload": (2, 2, {**ZERO["ZeRO-2"], "offload_optimizer": True}),
}
# Compiled by the same passes without code of its own (aot_eager), or as runs do (inductor).
COMPILED = {"compile": "blocks", "backend": "aot_eager"}
INDUCTOR = {"compile": "blocks"}
COMPILE: dict[str, dict[str, Any]] = {
    "ddp, compiled": COMPILED,
    "fsdp, compiled": COMPILED,
    **({} if not ALL or toolchain_problem(torch.device("cpu")) else {
        "ddp, compiled by inductor": INDUCTOR, "fsdp, compiled by inductor": INDUCTOR,
        "hsdp 2x2, compiled by inductor": INDUCTOR,
        "ddp, compiled by inductor as a whole": {"compile": "model"},
    }),
}  # fmt: skip
STRATEGIES |= {name: STRATEGIES[name.partition(", comp")[0]] for name in COMPILE}
# (activation checkpointing, micro-batches a step) -> whether only LEYDEN_ALL_CELLS runs it.
PAIRS = (("full", 2), ("none", 1), ("none", 2), ("full", 1))
REFERENCE = ("one process", "none", 1)
CELLS = [
    (name, *pair)
    for name in STRATEGIES
    for number, pair in enumerate(PAIRS)
    if (number == 0 or (ALL and number < 3)) and name != "ZeRO-2, offload"
]
CELLS += [("ZeRO-2, offload", "none", 2)]
if ALL:
    # One pair is enough for the slow ones.
    CELLS = [cell for cell in CELLS if "inductor" not in cell[0] or cell[1:] == PAIRS[0]]
CELLS = [cell for cell in CELLS if re.search(os.environ.get("LEYDEN_CELLS", ""), cell[0])]
# What a config refuses, and a part of the reason.
REFUSED = {
    ("tp 2, compiled", "none", 1): "under tensor parallelism",
    ("fsdp x tp 2x2, compiled", "none", 1): "torch 2.13 computes wrong gradients",
    ("fsdp, compiled as a whole", "none", 1): "its hooks cut the graph at every block",
    ("ZeRO-2, skipping bad steps", "none", 1): "its engine applies the update itself",
}
# What sums in another order cost in 20 steps of fp32, relative; ten times what was measured.
FIRST_LOSSES, ALL_LOSSES, WEIGHTS, MOMENTS = 1e-5, 1e-5, 1e-4, 1e-4
measured: dict[Any, tuple[float, ...]] = {}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(
        tmp_path_factory.mktemp("data"), documents=40, num_train_shards=2, with_tokenizer=False
    )


def folder_of(root: Path, cell: tuple[str, str, int]) -> Path:
    return root / re.sub(r"\W+", "-", "-".join(map(str, cell)))


@pytest.fixture(scope="module")
def runs(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cells, trained: one world for each number of ranks."""
    root = tmp_path_factory.mktemp("cells")
    worlds: dict[int, list[Job]] = {1: [], 2: [], 4: []}
    for cell in [REFERENCE, *CELLS]:
        name, checkpointing, accumulation = cell
        ranks, dp, parallel = STRATEGIES[name]
        changes = {
            "parallel": parallel, "activation_checkpointing": checkpointing,
            "micro_batch": 8 // (dp * accumulation), **COMPILE.get(name, {}),
        }  # fmt: skip
        worlds[ranks].append(("train", str(folder_of(root, cell)), "", changes))
    for ranks, parallel in ((1, {"strategy": "ddp"}), (2, {"strategy": "tp"})):
        dropout = {"parallel": parallel, "model": {"residual_dropout": 0.2}}
        worlds[ranks].append(("train", str(root / f"dropout-{ranks}"), "", dropout))
    for ranks, jobs in worlds.items():
        codes = run_ranks(play, ranks, 880 if ALL else 280, dataset.storage.url, jobs)
        assert codes == [[0] * len(jobs)] * ranks
    return root


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    """Distance over length."""
    return float((one - other).norm() / other.norm().clamp(min=1e-12))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "cell", CELLS, ids=lambda cell: re.sub(r"\W+", "-", "-".join(map(str, cell)))
)
def test_like_one_process(dataset: Dataset, runs: Path, cell: tuple[str, str, int]) -> None:
    """Ranks of a tensor-parallel group that count their targets twice or read other rows, a mean
    over the wrong ranks, a norm of one rank's part, a micro-batch too many or too few."""
    alone, folder = folder_of(runs, REFERENCE), folder_of(runs, cell)
    expected, found = losses(alone), losses(folder)
    assert len(found) == 20
    loss = [abs(a - b) / b for a, b in zip(found, expected, strict=True)]
    one, other = tensors(at_step(folder, 20)), tensors(at_step(alone, 20))
    assert one.keys() == other.keys()
    apart = {name: far(one[name], other[name]) for name in one}
    weights = max(value for name, value in apart.items() if name.startswith("model."))
    moments = max(value for name, value in apart.items() if name.startswith("optimizer."))
    measured[cell] = (max(loss[:10]), max(loss), weights, moments)
    assert max(loss[:10]) < FIRST_LOSSES and max(loss) < ALL_LOSSES
    assert weights < WEIGHTS and moments < MOMENTS


@pytest.mark.timeout(900)
def test_dropout_is_the_same_within_a_tensor_parallel_group(runs: Path) -> None:
    """Seeds by rank, or dropout before the sum over ranks: what ranks believe to be one tensor
    would be two."""
    assert losses(runs / "dropout-2") == pytest.approx(losses(runs / "dropout-1"), rel=ALL_LOSSES)
    assert losses(runs / "dropout-1") != losses(folder_of(runs, REFERENCE))


@pytest.mark.parametrize("cell", REFUSED, ids=str)
def test_what_cannot_work_is_refused(cell: tuple[str, str, int]) -> None:
    """Refused in the table and trained all the same, or an error of torch's in the first step."""
    name, checkpointing, _ = cell
    changes = {
        "tp 2, compiled": {"parallel": {"strategy": "tp"}, "compile": "blocks"},
        "fsdp x tp 2x2, compiled": {"parallel": {"strategy": "fsdp", "tp": 2}, "compile": "blocks"},
        "fsdp, compiled as a whole": {"parallel": {"strategy": "fsdp"}, "compile": "model"},
        "ZeRO-2, skipping bad steps": {
            "parallel": ZERO["ZeRO-2"], "guard": GuardConfig(policy="skip"),
        },
    }[name]  # fmt: skip
    with pytest.raises(ConfigError, match=REFUSED[cell]):
        config("data", "run", {**changes, "activation_checkpointing": checkpointing})


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Shows what was measured; docs/strategies.md holds the table of one full run."""
    if not measured:
        pytest.skip("no cell was measured")
    rows = [
        "| strategy | ranks | activation checkpointing | micro-batches | losses 1-10 | losses 1-20 "
        "| weights | moments |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, checkpointing, accumulation), values in measured.items():
        apart = " | ".join(f"{value:.0e}" for value in values)
        rows.append(
            f"| {name} | {STRATEGIES[name][0]} | {checkpointing} | {accumulation} | {apart} |"
        )
    for (name, checkpointing, accumulation), reason in REFUSED.items():
        ranks = 4 if "2x2" in name else 2
        told = f"refused: {reason} | | | |"
        rows.append(f"| {name} | {ranks} | {checkpointing} | {accumulation} | {told}")
    with capsys.disabled():
        print("\n" + "\n".join(rows))
    if os.environ.get("LEYDEN_WRITE_MATRIX"):
        marks = ("<!-- matrix -->\n", "<!-- end of matrix -->")
        before, _, rest = DOC.read_text().partition(marks[0])
        DOC.write_text(
            before + marks[0] + "\n".join(rows) + "\n" + marks[1] + rest.partition(marks[1])[2]
        )
