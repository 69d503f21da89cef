"""The sources of a mixture: what the config says of them, and what a run has frozen.

A run's mixture.jsonl has a line for each attempt that changed something: the sources with their
data_digest, and the stages from the first one on. Stages that a run has passed never change.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dist.dataset import MixedDataset, mix, open_dataset
from dist.errors import ConfigError, DataRefused
from dist.mixture import Mixture, integer_weights, with_stage
from dist.run_dir import RunDir
from dist.run_history import read_config
from dist.skips import Skips
from dist.stages import open_as_begun
from dist.windowed import OrderMode, block_rows_of

MIXTURE = "mixture.jsonl"


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One dataset of a mixture."""

    name: str
    """What logs and tools call it."""
    url: str
    """Dataset folder: URL (its newest version) or URL@hexprefix (that version)."""
    weight: float = 1.0
    """Its share of the samples, in proportion to the others'; 0: none."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Other weights from some sample on."""

    from_step: int = -1
    """First step with these weights."""
    from_sample: int = -1
    """First sample with these weights, instead of from_step."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each source by name; one that is left out has 0."""


def check_sources(data: Any) -> None:
    """ConfigError for data.sources or data.stages that name no mixture."""
    names = [one.name for one in data.sources]
    if data.url:
        raise ConfigError("both data.url and data.sources are given; give one of them")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"data.sources names {', '.join(twice)} twice; each name stands once")
    for name in names:
        if not name or set(name) & set("/:@ \t\n"):
            raise ConfigError(f"the source name {name!r} is empty or holds one of / : @ or a space")
    integer_weights({one.name: one.weight for one in data.sources})
    for number, stage in enumerate(data.stages):
        if (stage.from_step >= 0) == (stage.from_sample >= 0):
            raise ConfigError(
                f"data.stages[{number}] has from_step {stage.from_step} and from_sample "
                f"{stage.from_sample}; give one of them, at least 0"
            )
        unknown = sorted(set(stage.weights) - set(names))
        if unknown:
            raise ConfigError(
                f"data.stages[{number}] weighs {', '.join(unknown)}, which is no source; there are "
                f"{', '.join(names)}"
            )
        integer_weights({name: stage.weights.get(name, 0.0) for name in names})


def open_sources(run: RunDir, identity: dict[str, Any] | None, data: Any) -> MixedDataset:
    """The sources that a config asks for: those of the run in its order, then added ones.

    Raises ConfigError for a source that is missing, DataRefused for one that is another version
    than the run's.
    """
    check_sources(data)
    urls = {one.name: one.url for one in data.sources}
    known: dict[str, dict[str, Any]] = {}
    if identity is not None:
        if "sources" not in identity:
            raise ConfigError(
                f"the run {run.path} trains on one dataset, {identity['data']}; pass data.url, or "
                "start another run (another --run, or --fresh)"
            )
        known = {one["name"]: one for one in known_sources(run, identity)}
    missing = [name for name in known if name not in urls]
    if missing:
        raise ConfigError(
            f"the run {run.path} has the source {missing[0]}, and data.sources lacks it; to train "
            "without it give it weight 0"
        )
    names = [*known, *(name for name in urls if name not in known)]
    parts = [
        open_as_begun(urls[name], known[name]["data_digest"], data.cache())
        if name in known
        else open_dataset(urls[name], data.cache())
        for name in names
    ]
    for name, part in zip(names, parts, strict=True):
        if name in known and part.data_digest != known[name]["data_digest"]:
            raise DataRefused(
                f"the run {run.path} trains on {known[name]['data']} as {name}, but {urls[name]} "
                f"is now version {part.data_digest[:12]}; give that source the url "
                f"{known[name]['data']}, or add the new version under another name"
            )
    return mix(names, parts)


def known_sources(run: RunDir, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """{name, data, data_digest} of each source of a run, in the order of their numbers."""
    lines = run.read_lines(MIXTURE)
    return list((lines[-1] if lines else identity)["sources"])


def open_run_sources(run: RunDir, identity: dict[str, Any], data: str = "") -> MixedDataset:
    """The sources that a run trained on, where they were or where its config says they are now.

    data: refused, as it cannot say where each source is. Raises DataRefused for other versions.
    """
    known = known_sources(run, identity)
    if data:
        raise ConfigError(
            f"--data {data}: the run {run.path} trains on {len(known)} sources; put their new "
            "places into data.sources and start the run once, or into its config.yaml"
        )
    listed = (read_config(run).get("data") or {}).get("sources") or []
    moved = {one["name"]: str(one["url"]).partition("@")[0] for one in listed}
    parts = []
    for one in known:
        try:
            parts.append(open_dataset(one["data"]))
        except (ConfigError, DataRefused):
            place = moved.get(one["name"], one["data"].partition("@")[0])
            parts.append(open_dataset(f"{place}@{one['data_digest']}"))
    return mix([one["name"] for one in known], parts)


def listed_sources(dataset: MixedDataset) -> list[dict[str, Any]]:
    """For run.json and mixture.jsonl."""
    return [
        {"name": name, "data": part.reference, "data_digest": part.data_digest}
        for name, part in zip(dataset.names, dataset.parts, strict=True)
    ]


def plan_stages(
    dataset: MixedDataset, config: Any, mode: OrderMode, *,
    frozen: Sequence[dict[str, Any]], t: int, skipped: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """The stages of a run that stands at sample t: those behind it as they were, then the config's.

    frozen: of the checkpoint's state, [] for a new run. A stage begins at the first whole unit at
    or after its sample.
    """
    weights, later = _wanted(dataset.names, config, t)
    lanes, skips = max(mode.lanes, 1), Skips(skipped)

    def unit_of(sample: int) -> int:
        return -(-int(skips.to_stream(np.array([sample]))[0]) // lanes) if sample else 0

    stages = [dict(stage) for stage in frozen if stage["unit"] < unit_of(t)]
    if not stages or stages[-1]["weights"] != weights:
        stages = with_stage(stages, unit_of(t), weights)
    for sample, after in later:
        stages = with_stage(stages, unit_of(sample), after)
    return [_with_blocks(stage, dataset, mode, frozen) for stage in stages]


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
    return "\n".join(lines)


def record_stages(
    run: RunDir, attempt: int, t: int, dataset: MixedDataset, stages: list[dict[str, Any]],
    mode: OrderMode,
) -> None:  # fmt: skip
    """Write and print the stages, if they are not those of the attempt before."""
    record = {"sources": listed_sources(dataset), "data": dataset.reference, "stages": stages}
    before = run.read_lines(MIXTURE)
    print(describe_stages(dataset, stages, mode), file=sys.stderr)
    if before and all(before[-1][key] == value for key, value in record.items()):
        return
    if before:
        print(f"mixture: changed at sample {t:,}; what lies before stays", file=sys.stderr)
    run.append(MIXTURE, {"attempt": attempt, "t": t, **record})


def counts_of(stages: list[dict[str, Any]], position: int, lanes: int) -> list[int]:
    """Samples of each source before a position of the stream, rounded down to units."""
    lanes = max(lanes, 1)
    return [count * lanes for count in Mixture(stages).counts_at(position // lanes)]


def _wanted(
    names: Sequence[str], config: Any, t: int
) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """(weights at sample t, [(sample, weights)] after it), as integers in the order of `names`."""
    data = config.data
    now = integer_weights({one.name: one.weight for one in _ordered(names, data.sources)})
    starts = [
        (stage.from_sample if stage.from_sample >= 0 else stage.from_step * config.global_batch,
         integer_weights({name: stage.weights.get(name, 0.0) for name in names}))
        for stage in data.stages
    ]  # fmt: skip
    starts.sort(key=lambda one: one[0])
    for sample, weights in starts:
        if sample <= t:
            now = weights
    return now, [one for one in starts if one[0] > t]


def _ordered(names: Sequence[str], sources: Sequence[SourceConfig]) -> list[SourceConfig]:
    by_name = {one.name: one for one in sources}
    return [by_name[name] for name in names]


def _with_blocks(
    stage: dict[str, Any], dataset: MixedDataset, mode: OrderMode, frozen: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """With R of each source of the windowed order, frozen where it was."""
    if mode.mode == "global":
        return stage
    blocks = list(frozen[-1]["blocks"]) if frozen else []
    for part in dataset.parts[len(blocks) :]:
        blocks.append(block_rows_of(part.split("train").row_start, mode.lanes, mode.window))
    return {**stage, "blocks": blocks[: len(stage["weights"])]}
