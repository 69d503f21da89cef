"""The sources of a mixture: what the config says of them, and which version of each is opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dist.dataset import MixedDataset, mix, open_dataset
from dist.errors import ConfigError
from dist.mixture import integer_weights
from dist.run_dir import RunDir
from dist.source_versions import first_digest, known_sources, open_source, parse_switch


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


def open_sources(
    run: RunDir, identity: dict[str, Any] | None, data: Any, switch_data: str = ""
) -> MixedDataset:
    """The sources that a config asks for: those of the run in its order, then added ones.

    switch_data: `NAME=URL@DIGEST`, derived versions that sources of the run go on with; such a url
    in data.sources says the same. Raises ConfigError for a source that is missing, DataRefused for
    one that is a version of its own.
    """
    check_sources(data)
    urls, switch = {one.name: one.url for one in data.sources}, parse_switch(switch_data)
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
                f"the run {run.path} has the source {missing[0]}, and data.sources lacks it; to "
                "train without it give it weight 0"
            )
    for name in switch:
        if name not in known:
            have = ", ".join(known) or "none, as it has not begun"
            raise ConfigError(
                f"switch_data names the source {name}, which the run {run.path} does not train on "
                f"(sources: {have})"
            )
    parts = []
    for name, entry in known.items():
        assert identity is not None, "known are the sources of a run that there is"
        url, asked = switch.get(name, urls[name]), name in switch
        parts.append(open_source(run, identity, entry, url, data.cache(), switch=asked))
        switched = parts[-1].data_digest != first_digest(entry)
        if switched and parts[-1].manifest.kind == "examples" and data.packing == "packed":
            raise ConfigError(
                f"the source {name} holds examples that the run {run.path} packs into rows, and "
                f"without some of them {parts[-1].reference} would be packed into others: the run "
                "cannot go on in its order. Add that version under another name and give "
                f"{name} weight 0, or begin a run with it; with data.packing padded it can be "
                "switched"
            )
    added = [name for name in urls if name not in known]
    parts += [open_dataset(urls[name], data.cache()) for name in added]
    return mix([*known, *added], parts)
