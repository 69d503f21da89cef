"""dist/source_versions.py: which version of a source a run goes on with, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist.dataset import MixedDataset
from dist.errors import ConfigError, DataRefused
from dist.mixture_stages import record_stages
from dist.run_dir import RunDir
from dist.source_versions import (
    first_tables,
    listed_sources,
    open_run_sources,
    parse_switch,
    removed_of,
    rows_removed,
)
from dist.sources import SourceConfig, open_sources
from dist.start import DataConfig
from dist.windowed import OrderMode
from tests.derive import derive
from tests.make_dataset import write_dataset


class Begun:
    """A run that has begun on two sources, of which `code` has two later versions."""

    def __init__(self, root: Path) -> None:
        self.web = write_dataset(root / "web", documents=10, seed=1)
        self.code = write_dataset(root / "code", documents=10, seed=2)
        self.without = [1, 2, 30]
        self.second = derive(self.code, self.without, root / "one")
        # Rows 0 and 1 of the second version are rows 0 and 3 of the first.
        self.third = derive(self.second, [0, 1], root / "two")
        self.run = RunDir.open(root / "run")
        mixed = self.open()
        self.identity = {
            "data": mixed.reference, "data_digest": mixed.data_digest,
            "sources": listed_sources(mixed),
        }  # fmt: skip
        self.run.write_run(self.identity, "")
        self.go_on(mixed)

    def open(self, code: str = "", switch: str = "") -> MixedDataset:
        first = f"{self.code.storage.url}@{self.code.data_digest}"
        sources = [
            SourceConfig(name="web", url=self.web.storage.url),
            SourceConfig(name="code", url=code or first),
        ]
        identity = getattr(self, "identity", None)
        return open_sources(self.run, identity, DataConfig(sources=sources), switch)

    def removed(self, mixed: MixedDataset) -> dict[int, list[int]]:
        return rows_removed(self.run, self.identity, mixed)

    def go_on(self, mixed: MixedDataset) -> list[dict[str, Any]]:
        """Record an attempt on these versions, as the start of a run does."""
        stage: dict[str, Any] = {"unit": 0, "weights": [1, 1], "counts": [0, 0]}
        if gone := self.removed(mixed):
            stage["removed"] = [[source, 0, rows] for source, rows in gone.items()]
        record_stages(self.run, 0, 0, mixed, [stage], OrderMode())
        return [stage]


def digests(mixed: MixedDataset) -> list[str]:
    return [part.data_digest for part in mixed.parts]


def test_a_source_goes_through_two_versions(tmp_path: Path) -> None:
    """Rows of the third version numbered as in the second; an order over the table of the newest
    version; a start without the option that goes back."""
    run = Begun(tmp_path)
    folder = run.code.storage.url
    # Quarantine in place moves LATEST: that alone switches nothing.
    assert run.code.storage.read("LATEST").decode().strip() == run.third.data_digest
    assert digests(run.open(folder))[1] == run.code.data_digest
    for switch, url in ((f"code={run.second.reference}", folder), ("", run.third.reference)):
        mixed = run.open(url, switch)
        expected = run.second if switch else run.third
        assert digests(mixed) == [run.web.data_digest, expected.data_digest]
        gone = run.removed(mixed)
        assert gone == {1: run.without if switch else [0, 1, 2, 3, 30]}
        stages = run.go_on(mixed)
        assert removed_of(stages) == gone and run.removed(mixed) == gone
        # Nothing more to say from here on, by whatever version the config names.
        for again in ("", folder, run.second.reference, expected.reference):
            assert digests(run.open(again))[1] == expected.data_digest
        assert np.array_equal(
            first_tables(run.run, run.identity, mixed)[1], run.code.split("train").row_start
        )
        audited = open_run_sources(run.run, run.identity)
        assert digests(audited) == [run.web.data_digest, run.code.data_digest]


@pytest.mark.parametrize("on_second", [False, True])
def test_other_versions_are_refused(tmp_path: Path, on_second: bool) -> None:
    """A version that lacks rows which nobody listed, or has removed ones again: repeated and
    skipped rows, in silence."""
    run = Begun(tmp_path)
    other = write_dataset(tmp_path / "other", documents=9, seed=9)
    if on_second:
        run.go_on(run.open("", f"code={run.second.reference}"))
    wrong: list[tuple[str, str]] = [(f"code={other.reference}", ""), ("", other.reference)]
    wrong += [(f"code={run.code.reference}", "")] if on_second else [
        (f"code={run.third.reference}", ""), ("", run.third.reference)
    ]  # fmt: skip
    for switch, url in wrong:
        with pytest.raises(DataRefused, match="quarantine` did not derive from"):
            run.open(url, switch)
    with pytest.raises(ConfigError, match=r"the source books, .* \(sources: web, code\)"):
        run.open("", f"books={run.second.reference}")


def test_switch_data_names_its_sources() -> None:
    """A version that is taken for the wrong source."""
    assert parse_switch("") == {}
    found = parse_switch("web=/a/b@12,code=s3://x/y=z@34")
    assert found == {"web": "/a/b@12", "code": "s3://x/y=z@34"}
    for wrong in ("/a/b@12", "web=", "=x", "s3://a=b", "web=/a,b"):
        with pytest.raises(ConfigError, match="NAME=URL@DIGEST"):
            parse_switch(wrong)


def test_a_lost_first_version_is_named(tmp_path: Path) -> None:
    """An order over another table, or an error that names a version nobody asked for."""
    run = Begun(tmp_path)
    mixed = run.open("", f"code={run.second.reference}")
    run.go_on(mixed)
    run.code.storage.delete(f"manifests/{run.code.data_digest}.json")
    for wanted in (
        lambda: first_tables(run.run, run.identity, mixed),
        lambda: open_run_sources(run.run, run.identity),
    ):
        with pytest.raises(DataRefused, match=f"source code .* began with {run.code.reference}"):
            wanted()
