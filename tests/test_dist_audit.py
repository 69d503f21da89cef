"""dist/audit.py: what it says of a run is what the model of that run received."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist.audit import open_run_data, replay, sightings_of, who_saw
from dist.dataset import Dataset
from dist.errors import ConfigError, DataRefused
from dist.lineage import lineage_hits, rows_of_key
from dist.order import Order, num_micro_batches, rank_span
from dist.run_dir import RunDir
from dist.run_history import History, Segment, find_run, kept_segments, read_history
from dist.shard_file import PackedShard
from dist.tokenizer import TextTokenizer
from tests.make_dataset import write_dataset
from tests.run_ranks import run_ranks

ROOT = Path(__file__).parent.parent


def trained(url: str, folder: str, changes: dict[str, Any]) -> list[tuple[int, int, list[int]]]:
    """Run the recipe on this rank; (step, micro-batch, rows) as its model received them."""
    from recipes import pretrain
    from tests.test_dist_lightning_plugins import pretrain as pretrain_small

    # What resuming forbids today and the audit must survive: another global batch.
    pretrain.MAY_CHANGE = (*pretrain.MAY_CHANGE, "global_batch")
    received = []
    step = pretrain.Pretrain.training_step

    def recorded(self: Any, batch: Any, batch_idx: int) -> Any:
        received.append((batch.step, batch.micro, batch.rows.tolist()))
        return step(self, batch, batch_idx)

    pretrain.Pretrain.training_step = recorded  # type: ignore[method-assign]
    assert pretrain_small(url, folder, **changes) == 0
    return received


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), documents=12)


# {(step, rank, micro-batch): rows}, padding left out.
Received = dict[tuple[int, int, int], list[int]]


@pytest.fixture(scope="module")
def run_and_rows(
    dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, Received]:
    """An epoch in steps of 16 rows on 1 rank, another of 7 rows on 2 ranks; both end short."""
    folder = str(tmp_path_factory.mktemp("runs") / "run")
    url, received = dataset.storage.url, {}
    first = {"micro_batch": 6, "max_epochs": 1, "global_batch": 16, "strategy": "ddp"}
    second = {"micro_batch": 2, "max_epochs": 2, "global_batch": 7, "strategy": "ddp"}
    for world_size, changes in ((1, first), (2, second)):
        for rank, batches in enumerate(run_ranks(trained, world_size, 240, url, folder, changes)):
            for step, micro, rows in batches:
                received[step, rank, micro] = [row for row in rows if row >= 0]
    return RunDir(folder), received


def steps_of(dataset: Dataset) -> tuple[int, int]:
    """Steps of the first attempt, and of both."""
    num_rows = dataset.split("train").num_rows
    assert num_rows % 16 and num_rows % 7, "the last step of each epoch must be short"
    return -(-num_rows // 16), -(-num_rows // 16) + -(-num_rows // 7)


def test_replay_is_what_the_model_received(
    dataset: Dataset, run_and_rows: tuple[RunDir, Received]
) -> None:
    """A rank, a micro-batch or a sample off by one, before or after the batch changed."""
    run, received = run_and_rows
    first, both = steps_of(dataset)
    history = read_history(run, dataset.split("train").num_rows)
    assert history.next_step == history.planned_steps == both
    replayed: Received = {}
    for step in range(both):
        found = replay(run, step, text=False)
        assert found.attempt == int(step >= first) and found.consumed
        for row in found.rows:
            rows = replayed.setdefault((step, row.rank, row.micro), [])
            assert row.index == len(rows)
            rows.append(row.row)
    assert replayed == {key: rows for key, rows in received.items() if rows}
    alone = replay(run, first, rank=1, text=False)
    assert [row.row for row in alone.rows] == received[first, 1, 0] + received[first, 1, 1]
    with pytest.raises(ConfigError, match=rf"steps 0 to {both - 1} \({both} done\)"):
        replay(run, both)
    with pytest.raises(ConfigError, match="ran on 1 data-parallel ranks"):
        replay(run, 0, rank=1)


def test_every_row_of_the_split_is_seen_where_it_was(
    dataset: Dataset, run_and_rows: tuple[RunDir, Received]
) -> None:
    """A row that was trained on and is not found, or found where it was not."""
    run, received = run_and_rows
    places = {(row, *key) for key, rows in received.items() for row in rows}
    num_rows = dataset.split("train").num_rows
    seen = set()
    for row in range(num_rows):
        answer = who_saw(run, f"train:{row}", progress=False)
        assert answer.epochs == 2
        seen |= {(row, s.step, s.rank, s.micro) for s in answer.sightings if s.consumed}
        assert [s.consumed for s in answer.sightings] == [True, True]
    assert seen == places


def test_a_source_is_found_in_every_row_that_holds_it(
    dataset: Dataset, run_and_rows: tuple[RunDir, Received]
) -> None:
    """A scan that stops at a record batch, a shard or a split; compared with a plain loop."""
    run, _ = run_and_rows
    for number in range(5):
        plain = set()
        for split in dataset.manifest.splits():
            table = dataset.split(split)
            for index, entry in enumerate(table.shards):
                shard = PackedShard(dataset.shard_path(entry))
                for i in range(shard.num_rows):
                    if any(piece[0] == number for piece in shard.lineage(i)):
                        plain.add((split, int(table.row_start[index]) + i))
        answer = who_saw(run, f"input-{number}", progress=False)
        assert {(ref.split, ref.row) for ref in answer.rows} == plain
        assert len(answer.rows) == len(plain) > 3
        train = {row for split, row in plain if split == "train"}
        assert {s.row for s in answer.sightings} == train
        # Every document of input k starts at 100 * k.
        at = who_saw(run, f"input-{number}@{100 * number}", progress=False)
        assert at.rows == answer.rows
    with pytest.raises(ConfigError, match=r"no document of that input starts at 7.* 100"):
        who_saw(run, "input-1@7", progress=False)


def test_replayed_text_is_the_rows_tokens(
    dataset: Dataset, run_and_rows: tuple[RunDir, Received]
) -> None:
    """Text of another row, or padding decoded as if it were text."""
    run, _ = run_and_rows
    tokenizer = TextTokenizer(dataset.read_tokenizer())
    for row in replay(run, 1).rows:
        entry = next(shard for shard in dataset.manifest.shards if shard.name == row.shard)
        shard = PackedShard(dataset.shard_path(entry))
        tokens, start = shard.tokens(row.row_in_shard, row.row_in_shard + 1)[0], 0
        assert [(p.input, p.offset, p.tokens) for p in row.pieces] == shard.lineage(
            row.row_in_shard
        )
        for piece in row.pieces:
            assert piece.path == f"input-{piece.input}"
            assert piece.text == tokenizer.decode(tokens[start : start + piece.tokens])
            start += piece.tokens


def test_the_same_row_by_its_shard(dataset: Dataset, run_and_rows: tuple[RunDir, Received]) -> None:
    """A row number counted from the dataset's start instead of the split's or the shard's."""
    run, _ = run_and_rows
    table = dataset.split("train")
    row = int(table.row_start[1]) + 2
    by_split = who_saw(run, f"train:{row}", progress=False)
    by_shard = who_saw(run, f"{table.shards[1].name[:12]}:2", progress=False)
    assert by_shard.rows == by_split.rows and by_shard.sightings == by_split.sightings
    held_out = who_saw(run, "validation:3", progress=False)
    assert held_out.sightings == [] and held_out.rows[0].split == "validation"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("train:100000", "the split train has rows 0 to"),
        ("input-7", "did you mean 'input-"),
        ("tain:3", "names nothing in"),
        ("abcdef:3", "no shards of"),
    ],
)
def test_keys_that_name_nothing(dataset: Dataset, key: str, said: str) -> None:
    """A typing mistake answered by `never trained on`."""
    with pytest.raises(ConfigError, match=said):
        rows_of_key(dataset, key, progress=False)


def test_neither_torch_nor_the_loader_is_needed(run_and_rows: tuple[RunDir, Received]) -> None:
    """An audit on a machine that has only the data and the run's folder."""
    run, received = run_and_rows
    code = (
        "import sys, json\n"
        "for name in ('torch', 'pytorch_lightning', 'dist.loader'): sys.modules[name] = None\n"
        "from dist.audit import replay\n"
        "from dist.run_dir import RunDir\n"
        "found = replay(RunDir(sys.argv[1]), 0)\n"
        "print(json.dumps([row.row for row in found.rows]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [row for m in range(3) for row in received[0, 0, m]]


def test_runs_without_order_lines_are_answered_too(
    run_and_rows: tuple[RunDir, Received], tmp_path: Path
) -> None:
    """Runs made before order.jsonl: the segments follow from what each attempt consumed."""
    run, _ = run_and_rows
    old = copy_run(run, tmp_path / "old")
    (old.path / "order.jsonl").unlink()
    # run_ranks sets no WORLD_SIZE; torchrun does.
    env = old.attempt_dir(1) / "env.json"
    record = json.loads(env.read_text())
    record["environment"]["WORLD_SIZE"] = "2"
    env.write_text(json.dumps(record))
    assert read_history(old).segments == read_history(run).segments


def test_edited_logs_are_refused(run_and_rows: tuple[RunDir, Received], tmp_path: Path) -> None:
    """Two logs that contradict each other, one of them believed."""
    run, _ = run_and_rows
    edited = copy_run(run, tmp_path / "run")
    lines = edited.read_lines("consumed.jsonl")
    lines[5]["t0"] += 1
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (edited.path / "consumed.jsonl").write_text(text)
    with pytest.raises(DataRefused, match="step 5 consumed samples"):
        read_history(edited)


def test_other_data_and_moved_data(
    dataset: Dataset, run_and_rows: tuple[RunDir, Received], tmp_path: Path
) -> None:
    """Rows of another dataset shown as those that the run saw."""
    run, _ = run_and_rows
    other = write_dataset(tmp_path / "other", seed=5, documents=12)
    with pytest.raises(DataRefused, match="cannot be opened"):
        open_run_data(run, other.storage.url)
    moved = copy_run(run, tmp_path / "run")
    identity = json.loads((moved.path / "run.json").read_text())
    identity["data"] = f"/no/such/folder@{dataset.data_digest}"
    (moved.path / "run.json").write_text(json.dumps(identity))
    assert open_run_data(moved).data_digest == dataset.data_digest, "config.yaml has the new place"


def copy_run(run: RunDir, folder: Path) -> RunDir:
    import shutil

    shutil.copytree(run.path, folder, ignore=shutil.ignore_patterns("checkpoints"))
    return RunDir(folder)


def test_find_run_lists_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`no such file` for a run whose name was mistyped."""
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert find_run("mine").path == find_run("runs/mine").path == Path("runs/mine")
    with pytest.raises(ConfigError, match=r"no run at runs/mime .*\(runs in runs/: mine\)"):
        find_run("mime")


def segment(attempt: int, step0: int, t0: int, batch: int, world_size: int, micro: int) -> Segment:
    return Segment(
        step0=step0, t0=t0, batch=batch, world_size=world_size, micro_batch=micro,
        attempt=attempt, seed=3, data_digest="d",
    )  # fmt: skip


def test_rewound_steps_belong_to_the_attempt_that_did_them_again(tmp_path: Path) -> None:
    """Steps of a killed attempt after its last checkpoint, taken for part of the training."""
    run = RunDir.open(tmp_path / "run")
    facts = {"batch": 4, "world_size": 1, "seed": 0, "data_digest": "d", "micro_batch": 4}
    (run.path / "run.json").write_text(json.dumps({"data_digest": "d", "config": {"seed": 0}}))
    for attempt, first, last in ((0, 0, 9), (1, 6, 8)):
        start = {"step0": first, "t0": 4 * first, "accumulation": 1, "attempt": attempt}
        run.append("order.jsonl", {**facts, **start})
        for step in range(first, last):
            span = {"step": step, "t0": 4 * step, "t1": 4 * step + 4}
            run.append("consumed.jsonl", {**span, "batch": 4, "targets": 9, "attempt": attempt})
    history = read_history(run)
    # Attempt 0 had done 9 steps; 6 to 8 were lost, and attempt 1 stands before 8.
    assert history.next_step == 8
    assert history.places(np.arange(36)).attempt.tolist() == [0] * 24 + [1] * 12


def test_segments_that_were_rewound_as_a_whole_are_gone() -> None:
    """An attempt that started at the same step again, or before the last one's start."""
    zero, one = segment(0, 0, 0, 8, 2, 4), segment(1, 5, 40, 8, 2, 4)
    again, earlier = segment(2, 5, 40, 8, 4, 2), segment(3, 3, 24, 8, 1, 8)
    assert kept_segments([zero, one, again]) == (zero, again)
    assert kept_segments([zero, one, again, earlier]) == (zero, earlier)


def test_samples_that_jump_are_refused() -> None:
    """A resumed run that skipped samples must not look whole."""
    first = segment(0, 0, 0, 8, 2, 4)
    assert len(kept_segments([first, segment(1, 5, 40, 6, 3, 2)])) == 2
    assert len(kept_segments([first, segment(1, 5, 38, 6, 3, 2)])) == 2, "a short last step"
    for t0 in (32, 41):
        with pytest.raises(DataRefused, match="samples were skipped or repeated"):
            kept_segments([first, segment(1, 5, t0, 6, 3, 2)])


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Up to 4 attempts with any batch, ranks and micro-batch, some after a short last step."""
    kept: list[Segment] = []
    for attempt in range(draw(st.integers(1, 4))):
        step0 = t0 = 0
        if kept:
            last = kept[-1]
            step0 = last.step0 + draw(st.integers(1, 6))
            t0 = last.t_of(step0) - draw(st.integers(0, last.batch - 1))
        sizes = [draw(st.integers(1, 12)) for _ in range(3)]
        kept.append(segment(attempt, step0, t0, *sizes))
    steps = kept[-1].step0 + draw(st.integers(1, 6))
    return History(segments=kept_segments(kept), next_step=steps, planned_steps=steps)


@given(histories())
@settings(max_examples=200, deadline=None)
def test_places_are_those_of_the_loader(history: History) -> None:
    """The closed form against the loader's own loop: rank_span, then cuts of a micro-batch."""
    for step in range(history.known_steps):
        one = history.segment_of(step)
        t0, t1 = history.samples_of(step)
        size = min(one.micro_batch, -(-(t1 - t0) // one.world_size))
        expected = []
        for rank in range(one.world_size):
            lo, hi = rank_span(t1 - t0, rank, one.world_size)
            for i in range(hi - lo):
                expected.append((step, one.attempt, one.world_size, rank, *divmod(i, size)))
        place = history.places(np.arange(t0, t1))
        columns = (place.step, place.attempt, place.world_size, place.rank, place.micro)
        found = [*zip(*(c.tolist() for c in (*columns, place.index)), strict=True)]
        assert found == expected
        assert max(p[4] for p in found) < num_micro_batches(
            t1 - t0, one.world_size, one.micro_batch
        )


@given(histories(), st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_sightings_are_the_inverse_of_the_order(history: History, num_rows: int) -> None:
    """Every sample of the run is one sighting of its row, and every sighting one sample."""
    epochs = max(1, -(-history.end_t // num_rows))
    found = sightings_of(history, num_rows, np.arange(num_rows), epochs)
    epoch, row = Order(num_rows, 3).rows(0, epochs * num_rows)
    assert [(s.epoch, s.row) for s in found] == [*zip(epoch.tolist(), row.tolist(), strict=True)]
    assert [s.t for s in found] == list(range(epochs * num_rows))
    consumed = Counter(s.step for s in found if s.consumed)
    sizes = {step: np.diff(history.samples_of(step))[0] for step in range(history.next_step)}
    assert consumed == sizes
    one = found[len(found) // 2]
    assert one.t == Order(num_rows, 3).when(one.row, one.epoch)


def test_lineage_scan_counts_rows_across_record_batches(dataset: Dataset) -> None:
    """Row numbers that begin again in each record batch (of 4 rows here)."""
    shard = dataset.shard_path(dataset.manifest.shards[0])
    rows, offsets = lineage_hits(shard, 2)
    assert rows.max() > 4 and (np.diff(rows) >= 0).all() and set(offsets.tolist()) == {200}
