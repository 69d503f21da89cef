"""A run that switches to derived versions, and goes on from checkpoints of before that."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dist.dataset import open_dataset
from dist.order import Order
from dist.run_dir import RunDir
from dist.skips import SkippingOrder, Skips
from dist.stages import DerivedOrder, Stages, begin_stage, first_numbers, read_stages
from tests.derive import derive
from tests.make_dataset import write_dataset

SEED = 3


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_checkpoint_goes_on_after_any_switches(data: st.DataObject) -> None:
    """A checkpoint from between two switches, or of before them all, that can never be resumed:
    rows which the newest version lacks come before the position from which they are left out."""
    with tempfile.TemporaryDirectory() as folder:
        version = write_dataset(Path(folder) / "data", documents=12)
        num_rows = version.split("train").num_rows
        identity = {"data_digest": version.data_digest, "data": version.reference}
        run = RunDir.open(Path(folder) / "run")
        order = Order(num_rows, SEED)
        for number in range(data.draw(st.integers(1, 3), label="starts") + 1):
            if number < 3 and data.draw(st.booleans(), label="derive"):
                rows = st.integers(0, version.split("train").num_rows - 1)
                gone = sorted(data.draw(st.sets(rows, min_size=1, max_size=3), label="gone"))
                version = derive(version, gone, Path(folder) / f"bundle-{number}")
            if version.data_digest == identity["data_digest"]:
                continue
            t = data.draw(st.integers(0, 2 * num_rows), label="checkpoint")
            before = stream_of(read_stages(run), order, num_rows)
            stages = begin_stage(run, identity, version.reference, t, before)
            after = stream_of(stages, order, num_rows)
            # What lies before the checkpoint stays, what comes has no row that is gone.
            old, new = SkippingOrder(order, Skips(before)), SkippingOrder(order, Skips(after))
            assert np.array_equal(old.rows(0, t)[1], new.rows(0, t)[1])
            derived = DerivedOrder(new, stages.removed)
            assert derived.num_rows == version.split("train").num_rows
            _, rest = derived.rows(t, t + derived.num_rows)
            whole = set(range(derived.num_rows))
            epoch = derived.rows(t, t + 3 * num_rows)[0]
            last = derived.rows(t, t + 3 * num_rows)[1][epoch == epoch[0] + 1]
            assert set(last.tolist()) == whole and set(rest.tolist()) <= whole


def stream_of(stages: Stages, order: Order, num_rows: int) -> list[list[int]]:
    return stages.skipped([], num_rows, SEED, stages.reach(6 * num_rows, num_rows, []), order)


@given(removed=st.sets(st.integers(0, 30)), rows=st.sets(st.integers(0, 30)))
def test_numbers_in_the_first_dataset(removed: set[int], rows: set[int]) -> None:
    """A row of a derived version taken for its neighbour."""
    kept = [row for row in range(80) if row not in removed]
    assert first_numbers(sorted(rows), sorted(removed)) == [kept[row] for row in sorted(rows)]


@given(
    num_rows=st.integers(2, 60), share=st.floats(0, 0.99), samples=st.integers(0, 400),
    position=st.integers(0, 50), gap=st.integers(0, 90),
)  # fmt: skip
def test_the_stream_reaches_as_far_as_a_run(
    num_rows: int, share: float, samples: int, position: int, gap: int
) -> None:
    """Of a dataset that lost most of its rows: positions run out, and the order holds rows that
    are gone."""
    gone = list(range(min(int(share * num_rows), num_rows - 1)))
    stages = Stages(lines=[{"removed": gone, "position": position, "data_digest": "x"}])
    ranges = [[position, position + gap]] if gap else []
    end = stages.reach(samples, num_rows, ranges)
    skips = Skips(stages.skipped(ranges, num_rows, SEED, end, Order(num_rows, SEED)))
    assert end - skips.left_out_before(end) >= samples


def test_open_versions_are_those_of_the_run(tmp_path: Path) -> None:
    """A second switch from a checkpoint of before the first one: the rows of both are left out from
    there on."""
    first = write_dataset(tmp_path / "data", documents=12)
    run = RunDir.open(tmp_path / "run")
    identity = {"data_digest": first.data_digest, "data": first.reference}
    second = derive(first, [1], tmp_path / "b1")
    begin_stage(run, identity, second.reference, 9, [])
    third = derive(open_dataset(second.reference), [4], tmp_path / "b2")
    stages = begin_stage(run, identity, third.reference, 5, [])
    assert [(line["position"], line["removed"]) for line in stages.lines] == [(9, [1]), (5, [1, 5])]
    assert stages.late(5) == [] and stages.late(4) == [1, 5]
