"""The versions that each source of a run was on: the first, whose order it keeps, and the newest.

A source may be replaced by a version that `leyden prep quarantine` derived from its newest one. The
run's order goes on with the first version's rows and numbers; the stages in its state say which
rows are left out, and from which position of the source's own stream on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist.dataset import Dataset, MixedDataset, mix, open_dataset
from dist.errors import ConfigError, DataRefused
from dist.examples import ExampleDataset, as_rows
from dist.run_dir import RunDir
from dist.run_history import read_config
from dist.stages import first_numbers, open_as_begun

MIXTURE = "mixture.jsonl"
Entry = dict[str, Any]
"""Of a source in run.json or mixture.jsonl: {name, data, data_digest}, and `first`, a reference,
where `data` is another version than the run's first."""


def known_sources(run: RunDir, identity: dict[str, Any]) -> list[Entry]:
    """The sources of a run in the order of their numbers."""
    lines = run.read_lines(MIXTURE)
    return list((lines[-1] if lines else identity)["sources"])


def first_reference(entry: Entry) -> str:
    """`URL@digest` of the version with which a source entered its run."""
    return str(entry.get("first", entry["data"]))


def first_digest(entry: Entry) -> str:
    """Its digest."""
    return first_reference(entry).rpartition("@")[2]


def listed_sources(dataset: MixedDataset, known: Sequence[Entry] = ()) -> list[Entry]:
    """For run.json and mixture.jsonl; known: the run's before."""
    before = {one["name"]: one for one in known}
    found = []
    for name, part in zip(dataset.names, dataset.parts, strict=True):
        entry = {"name": name, "data": part.reference, "data_digest": part.data_digest}
        if name in before and first_digest(before[name]) != part.data_digest:
            entry["first"] = first_reference(before[name])
        found.append(entry)
    return found


def open_run_sources(run: RunDir, identity: dict[str, Any], data: str = "") -> MixedDataset:
    """The first versions of the sources that a run trained on, where they were or where its config
    says they are now: row numbers of a run are theirs.

    data: refused, as it cannot say where each source is. Raises DataRefused for other versions.
    """
    known = known_sources(run, identity)
    if data:
        raise ConfigError(
            f"--data {data}: the run {run.path} trains on {len(known)} sources; put their new "
            "places into data.sources and start the run once, or into its config.yaml"
        )
    return mix([one["name"] for one in known], [_open_first(run, one) for one in known])


def _open_first(run: RunDir, entry: Entry, near: str = "") -> Dataset:
    """A source's first version: where it was, beside its newest one, or where the config says."""
    reference, digest = first_reference(entry), first_digest(entry)
    listed = (read_config(run).get("data") or {}).get("sources") or []
    moved = {one["name"]: str(one["url"]).partition("@")[0] for one in listed}
    places = [near, moved.get(entry["name"], ""), entry["data"].partition("@")[0]]
    for url in (reference, *(f"{place}@{digest}" for place in places if place)):
        try:
            return open_dataset(url)
        except (ConfigError, DataRefused) as error:
            said = error
    raise DataRefused(
        f"the source {entry['name']} of the run {run.path} began with {reference}, which cannot be "
        f"opened: {said}; bring that version back, or put its place into data.sources"
    )


def parse_switch(text: str) -> dict[str, str]:
    """{source: reference} of `NAME=URL@DIGEST`, several of them with commas between."""
    found = {}
    for word in re.split(r",\s*", text) if text else ():
        name, is_there, reference = word.partition("=")
        if not (is_there and name and reference) or set(name) & set("/:@ "):
            raise ConfigError(
                f"switch_data {text}: with data.sources it must say which source goes on with "
                f"which version, as NAME=URL@DIGEST (several with commas between), not {word!r}"
            )
        found[name] = reference
    return found


def open_source(
    run: RunDir, identity: dict[str, Any], entry: Entry, url: str, cache: Any, *, switch: bool
) -> Dataset:
    """The version that a known source goes on with: the run's own, or one derived from it.

    url: any version that the source was on, or the derived one. switch: switch_data asked for it.
    Raises DataRefused for every other one.
    """
    name, current = entry["name"], entry["data_digest"]
    given = open_dataset(url, cache) if switch else open_as_begun(url, current, cache)
    if given.data_digest == current:
        return given
    record = given.read_provenance() or {}
    if record.get("parent") == current and "removed" in record:
        return given
    lines = [identity, *run.read_lines(MIXTURE)]
    was = {one["data_digest"] for line in lines for one in line["sources"] if one["name"] == name}
    if given.data_digest in was and not switch:
        return open_dataset(entry["data"], cache)
    what = (
        f"switch_data names {given.reference} for it"
        if switch
        else f"{url} is now version {given.data_digest[:12]}"
    )
    raise DataRefused(
        f"the run {run.path} trains on {entry['data']} as {name}, but {what}, which `leyden prep "
        f"quarantine` did not derive from that; give the source the url {entry['data']}, or add "
        "the other version under another name"
    )


def rows_removed(
    run: RunDir, identity: dict[str, Any] | None, dataset: MixedDataset
) -> dict[int, list[int]]:
    """By source, the rows of its first version that the version in `dataset` lacks."""
    if identity is None:
        return {}
    lines = run.read_lines(MIXTURE)
    gone = removed_of(lines[-1]["stages"] if lines else [])
    for number, (entry, part) in enumerate(
        zip(known_sources(run, identity), dataset.parts, strict=False)
    ):
        if part.data_digest != entry["data_digest"]:
            before = gone.get(number, [])
            more = (part.read_provenance() or {})["removed"]["rows"]
            gone[number] = sorted(before + first_numbers(more, before))
    return gone


def removals_of(stages: Sequence[Mapping[str, Any]]) -> dict[int, list[tuple[int, list[int]]]]:
    """By source, [(position of its own stream, rows left out from there on)] of all stages."""
    found: dict[int, list[tuple[int, list[int]]]] = {}
    for stage in stages:
        for source, position, rows in stage.get("removed", ()):
            found.setdefault(int(source), []).append((int(position), list(rows)))
    return found


def removed_of(stages: Sequence[Mapping[str, Any]]) -> dict[int, list[int]]:
    """By source, all rows that the stages leave out, ascending."""
    return {
        source: sorted(row for _, rows in removals for row in rows)
        for source, removals in removals_of(stages).items()
    }


def first_tables(
    run: RunDir, identity: dict[str, Any] | None, dataset: MixedDataset
) -> list[NDArray[np.int64]]:
    """row_start of the first version of each source; dataset: what the run trains on now."""
    tables = [part.split("train").row_start for part in dataset.parts]
    known = known_sources(run, identity) if identity is not None else []
    for number, (entry, part) in enumerate(zip(known, dataset.parts, strict=False)):
        if first_digest(entry) != part.data_digest:
            first = _open_first(run, entry, part.storage.url)
            if isinstance(part, ExampleDataset):
                first = as_rows(first, part.packing, part.seq_len)
            tables[number] = first.split("train").row_start
    return tables
