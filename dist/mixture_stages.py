"""The stages of a run on a mixture: behind it as they were, ahead as its config says.

A run's mixture.jsonl has a line for each attempt that changed something: the sources with their
versions, and the stages from the first one on. Stages that a run has passed never change.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist.dataset import MixedDataset
from dist.errors import DataRefused
from dist.mixed_order import MixedOrder
from dist.mixed_skips import RollbackRanges
from dist.mixture import integer_weights, with_stage
from dist.run_dir import RunDir
from dist.skips import Skips
from dist.source_versions import MIXTURE, known_sources, listed_sources, removals_of, removed_of
from dist.windowed import OrderMode, block_rows_of


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a run on a mixture goes on: from its start, or as a checkpoint's state says."""

    t: int = 0
    stages: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, record: dict[str, Any] | None) -> Standing:
        """record: a checkpoint's, None for a run without one."""
        if record is None:
            return cls()
        order = record["order"]
        return cls(t=order["t"], stages=order["stages"], skipped=order["skipped"])

    @property
    def position(self) -> int:
        """Of the mixed stream, one past the last consumed sample."""
        return int(Skips(self.skipped).to_stream(np.array([self.t - 1]))[0]) + 1 if self.t else 0


def plan_stages(
    names: Sequence[str], config: Any, mode: OrderMode, tables: Sequence[NDArray[np.int64]], *,
    at: Standing, removed: Mapping[int, list[int]], ranges: RollbackRanges,
    order_of: Callable[[list[dict[str, Any]]], MixedOrder],
) -> list[dict[str, Any]]:  # fmt: skip
    """The stages of a run: those behind it as they were, then the config's.

    tables: row_start of each source's first version; removed: by source, rows of it that the
    version of now lacks; order_of: of such stages. A stage begins at the first whole unit at or
    after its sample; rows that are new in `removed` are left out from the very next sample on.
    """
    start, weights, later = _wanted(names, config, at.t)
    lanes = max(mode.lanes, 1)
    begun = -(-at.position // lanes)
    gone = _removals(at, removed, order_of)

    def whole(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        stages = [_with_blocks(stage, tables, mode, at.stages) for stage in stages]
        return _attached(stages, begun, gone)

    stages = [stage for stage in at.stages if stage["unit"] < begun]
    if not stages:
        stages = with_stage(stages, begun, weights)
    stages = whole(stages)
    # One formula for the stage of now and those ahead, or a run that is interrupted just where a
    # stage begins would go on otherwise: what a rollback left out may lie before its first sample.
    for sample, after in [(start, weights), *later]:
        position = int(Skips(ranges.under(stages)).to_stream(np.array([sample]))[0])
        unit = max(begun, -(-position // lanes))
        before = [stage for stage in stages if stage["unit"] < unit]
        is_new = not before or before[-1]["weights"] != after
        stages = whole(with_stage(before, unit, after) if is_new else before)
    return stages


def _removals(
    at: Standing, removed: Mapping[int, list[int]],
    order_of: Callable[[list[dict[str, Any]]], MixedOrder],
) -> list[Any]:  # fmt: skip
    """[[source, position of its own stream, rows]]: those of the state, then new ones."""
    found = [list(one) for stage in at.stages for one in stage.get("removed", ())]
    had = removed_of(at.stages)
    order = order_of(at.stages) if at.stages else None
    for source in sorted({*had, *removed}):
        new = set(removed.get(source, ())) - set(had.get(source, ()))
        back = set(had.get(source, ())) - set(removed.get(source, ()))
        if back:
            raise DataRefused(
                f"the checkpoint leaves out rows {sorted(back)[:5]} of source {source}, which its "
                f"version of now has: {MIXTURE} of the run was edited"
            )
        if new:
            position = 0
            if order is not None and source < len(order.orders):
                position = order.own_position(source, order.own_counts(at.position)[source])
            found.append([source, position, sorted(new)])
    return found


def _attached(stages: list[Any], begun: int, gone: list[Any]) -> list[dict[str, Any]]:
    """Stages of which the one that holds unit `begun` says what is left out; positions decide from
    where on, not the stage."""
    stages = [{key: one for key, one in stage.items() if key != "removed"} for stage in stages]
    if gone:
        next(one for one in reversed(stages) if one["unit"] <= begun)["removed"] = gone
    return stages


def describe_stages(dataset: MixedDataset, stages: list[dict[str, Any]], mode: OrderMode) -> str:
    """The stages of a run, a line each."""
    lines = []
    for stage in stages:
        total = sum(stage["weights"])
        parts = [
            f"{name} {weight}/{total}"
            for name, weight in zip(dataset.names, stage["weights"], strict=False)
        ]
        start = stage["unit"] * max(mode.lanes, 1)
        lines.append(f"mixture from sample {start:,} of the stream on: {', '.join(parts)}")
    for source, removals in sorted(removals_of(stages).items()):
        lines += [
            f"mixture: {dataset.names[source]} without {len(rows):,} rows of its first version "
            f"from position {position:,} of its own order on"
            for position, rows in removals
        ]
    return "\n".join(lines)


def record_stages(
    run: RunDir, attempt: int, t: int, dataset: MixedDataset, stages: list[dict[str, Any]],
    mode: OrderMode,
) -> None:  # fmt: skip
    """Write and print the stages, if they are not those of the attempt before."""
    identity = run.read_run()
    known = known_sources(run, identity) if identity else []
    sources = listed_sources(dataset, known)
    for old, new in zip(known, sources, strict=False):
        if old["data_digest"] != new["data_digest"]:
            print(
                f"mixture: {new['name']} goes on with {new['data']}, derived from "
                f"{old['data_digest'][:12]}",
                file=sys.stderr,
            )
    record = {"sources": sources, "data": dataset.reference, "stages": stages}
    before = run.read_lines(MIXTURE)
    print(describe_stages(dataset, stages, mode), file=sys.stderr)
    if before and all(before[-1][key] == value for key, value in record.items()):
        return
    if before:
        print(f"mixture: changed at sample {t:,}; what lies before stays", file=sys.stderr)
    run.append(MIXTURE, {"attempt": attempt, "t": t, **record})


def _wanted(
    names: Sequence[str], config: Any, t: int
) -> tuple[int, list[int], list[tuple[int, list[int]]]]:
    """(sample since which they hold, weights at sample t, [(sample, weights)] after it), as
    integers in the order of `names`."""
    data, since = config.data, 0
    now = integer_weights({one.name: one.weight for one in _ordered(names, data.sources)})
    starts = [
        (stage.from_sample if stage.from_sample >= 0 else stage.from_step * config.global_batch,
         integer_weights({name: stage.weights.get(name, 0.0) for name in names}))
        for stage in data.stages
    ]  # fmt: skip
    starts.sort(key=lambda one: one[0])
    for sample, weights in starts:
        if sample <= t:
            since, now = sample, weights
    return since, now, [one for one in starts if one[0] > t]


def _ordered(names: Sequence[str], sources: Sequence[Any]) -> list[Any]:
    by_name = {one.name: one for one in sources}
    return [by_name[name] for name in names]


def _with_blocks(
    stage: dict[str, Any], tables: Sequence[NDArray[np.int64]], mode: OrderMode,
    frozen: Sequence[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """With R of each source of the windowed order, frozen where it was."""
    if mode.mode == "global":
        return stage
    blocks = list(frozen[-1]["blocks"]) if frozen else []
    blocks += [block_rows_of(one, mode.lanes, mode.window) for one in tables[len(blocks) :]]
    return {**stage, "blocks": blocks[: len(stage["weights"])]}
