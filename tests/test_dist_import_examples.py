"""Hugging Face rows with labels into examples: what is trained stays what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist.data_export import export_dataset
from dist.data_import import ImportPlan, import_tokens
from dist.dataset import Dataset, open_dataset
from dist.errors import ConfigError, DataRefused
from dist.example_file import ExampleShard
from dist.verify import verify_full
from launch import cli
from tests.make_dataset import tokenizer_json
from tests.make_examples import write_examples

Row = tuple[list[int], list[list[int]]]


def examples_of(dataset: Dataset, split: str) -> list[Row]:
    """(tokens, spans) of each example."""
    found = []
    for entry in dataset.manifest.shards_of(split):
        shard = ExampleShard(dataset.shard_path(entry))
        rows = [shard.read(row) for row in range(shard.num_rows)]
        found += [(one.tokens.tolist(), one.spans.tolist()) for one in rows]
        assert all(one.segments.tolist() == [len(one.tokens)] for one in rows)
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(tokenizer_json())
    return path


def write_table(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = {
        name: pa.array(rows, pa.list_(pa.int64()) if isinstance(rows[0], list) else pa.int64())
        for name, rows in columns.items()
    }
    pq.write_table(pa.table(lists), path, row_group_size=3)
    return path


def imported(source: Path, out: Path, tokenizer: Path, **changes: Any) -> Dataset:
    plan = ImportPlan(
        format="hf", source=source, output=str(out), tokenizer=str(tokenizer), **changes
    )
    digest, _ = import_tokens(plan, progress=False)
    return open_dataset(f"{out}@{digest}")


def test_examples_that_were_exported_come_back(tmp_path: Path) -> None:
    """Labels that are dropped: the prompts of every chat are trained, and nobody is told."""
    dataset = write_examples(tmp_path / "data", vocab_size=280)
    export_dataset(dataset, "hf", tmp_path / "out", progress=False)
    back = imported(tmp_path / "out", tmp_path / "back", tmp_path / "out", shard_size_mib=0.002)
    assert back.manifest.kind == "examples" and back.manifest.lengths_digest is not None
    assert verify_full(back, progress=False).shards > 2
    lengths: list[int] = []
    for split in ("train", "validation"):
        entries = dataset.manifest.shards_of(split)
        shards = [ExampleShard(dataset.shard_path(entry)) for entry in entries]
        whole = [shard.read(row) for shard in shards for row in range(shard.num_rows)]
        assert examples_of(back, split) == [(o.tokens.tolist(), o.spans.tolist()) for o in whole]
        assert back.manifest.totals[split] == dataset.manifest.totals[split]
        lengths += [len(one.tokens) for one in whole]
    assert back.manifest.schema["max_length"] == max(lengths)
    path = back.storage.local_path(f"lengths/{back.manifest.lengths_digest}.arrow")
    assert pa.ipc.open_file(str(path)).read_all()["tokens"].to_pylist() == lengths


@st.composite
def labelled_rows(draw: st.DrawFn) -> list[tuple[list[int], list[bool], int, int]]:
    """(tokens, which are trained, padding before, padding after) of some rows."""
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        trained = draw(st.lists(st.booleans(), max_size=7))
        tokens = draw(st.lists(st.integers(0, 200), min_size=len(trained), max_size=len(trained)))
        rows.append((tokens, trained, draw(st.integers(0, 2)), draw(st.integers(0, 2))))
    return rows


def expected_of(tokens: Sequence[int], trained: Sequence[bool]) -> Row:
    spans: list[list[int]] = []
    for place in range(1, len(tokens)):
        if trained[place] and spans and spans[-1][1] == place:
            spans[-1][1] = place + 1
        elif trained[place]:
            spans.append([place, place + 1])
    return list(tokens), spans


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=labelled_rows())
def test_spans_are_those_of_a_loop_over_labels(
    rows: list[tuple[list[int], list[bool], int, int]], tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """A span that slips by a token, or goes on into the next example; padding that is trained on;
    an example lost, or one that trains nothing kept and counted."""
    folder = tmp_path_factory.mktemp("rows")
    pad = 250
    ids = [[pad] * a + tokens + [pad] * b for tokens, _, a, b in rows]
    labels = [
        [-100] * a + [t if on else -100 for t, on in zip(tokens, trained, strict=True)] + [-100] * b
        for tokens, trained, a, b in rows
    ]
    mask = [[0] * a + [1] * len(tokens) + [0] * b for tokens, _, a, b in rows]
    write_table(folder / "train.parquet", input_ids=ids, labels=labels, attention_mask=mask)
    made = [expected_of(tokens, trained) for tokens, trained, _, _ in rows]
    expected = [one for one in made if one[1]]
    if not expected:
        with pytest.raises(DataRefused, match="no example with a trained token"):
            imported(folder, folder.with_name(f"{folder.name}-out"), tokenizer)
        return
    found = imported(folder, folder.with_name(f"{folder.name}-out"), tokenizer)
    assert examples_of(found, "train") == expected
    record = found.read_provenance()
    assert record is not None and record["counters"]["filtered"] == len(made) - len(expected)
    shard = ExampleShard(found.shard_path(found.manifest.shards[0]))
    origins = [shard.origin(row) for row in range(shard.num_rows)]
    assert origins == [(0, number) for number, one in enumerate(made) if one[1]]


def test_what_datasets_saved_is_read(tmp_path: Path, tokenizer: Path) -> None:
    """Another layout than a Parquet file's: an Arrow stream, splits by folder."""
    datasets = pytest.importorskip("datasets")
    splits = {
        name: datasets.Dataset.from_dict(
            {"input_ids": [[5, 6, 7], [8, 9]], "labels": [[-100, 6, 7], [-100, last]]}
        )
        for name, last in (("train", 9), ("validation", -100), ("test", 9))
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    found = imported(tmp_path / "saved", tmp_path / "out", tokenizer)
    whole, second = ([5, 6, 7], [[1, 3]]), ([8, 9], [[1, 2]])
    assert examples_of(found, "train") == examples_of(found, "test") == [whole, second]
    assert examples_of(found, "validation") == [whole]


def test_what_a_mask_leaves_out_of_packed_rows_is_left_out(tmp_path: Path, tokenizer: Path) -> None:
    """Padding of a tokenizer's batches that becomes text to learn."""
    write_table(
        tmp_path / "in" / "train.parquet",
        input_ids=[[5, 6, 250, 250], [250, 7, 8, 9]], attention_mask=[[1, 1, 0, 0], [0, 1, 1, 1]],
    )  # fmt: skip
    found = imported(tmp_path / "in", tmp_path / "out", tokenizer, seq_len=4)
    assert found.manifest.kind == "packed_tokens"
    assert found.manifest.totals["train"]["tokens"] == 5
    table = pa.ipc.open_file(found.shard_path(found.manifest.shards[0])).read_all()
    assert table["tokens"].to_pylist() == [[5, 6, 7, 8, 9]]
    assert table["doc_lens"].to_pylist() == [[2, 3]]


BAD = {
    "a shifted label": (
        {"input_ids": [[5, 6], [5, 6, 7]], "labels": [[5, 6], [6, 7, -100]]}, {},
        "row 1, token 0: its label is neither the token nor -100",
    ),
    "a label too many": (
        {"input_ids": [[5, 6], [5, 6, 7]], "labels": [[5, 6], [5, 6, 7, -100]]}, {},
        "row 1 has 3 tokens and 4 of labels",
    ),
    "a trained token that is masked": (
        {"input_ids": [[5, 6]], "labels": [[-100, 6]], "attention_mask": [[1, 0]]}, {},
        "row 0, token 1: it is trained, but its attention_mask leaves it out",
    ),
    "a hole in the mask": (
        {"input_ids": [[1, 2], [5, 6, 7]], "attention_mask": [[1, 1], [1, 0, 1]]}, {},
        "row 1, token 2: its attention_mask has left out tokens before it",
    ),
    "rows that were packed": (
        {"input_ids": [[5, 6]], "labels": [[-100, 6]], "position_ids": [[0, 0]]}, {},
        "labels and position_ids: its rows may be several examples",
    ),
    "labels for packed rows": (
        {"input_ids": [[5, 6], [7, 8, 9]], "labels": [[-100, 6], [7, -100, 9]]},
        {"kind": "packed_tokens"}, "the labels of document 1 leave tokens out",
    ),
    "an example too long": (
        {"input_ids": [[5, 6], [7, 8, 9]], "labels": [[-100, 6], [7, -100, 9]]},
        {"max_length": 2}, "record 1 has 3 tokens, max_length is 2",
    ),
    "examples without labels": (
        {"input_ids": [[5, 6]]}, {"kind": "examples"}, "has no labels",
    ),
    "labels and --eos": (
        {"input_ids": [[5, 6]], "labels": [[-100, 6]]}, {"eos": "x"}, "which --eos cannot cut",
    ),
    "null labels": (
        {"input_ids": [[5, 6], [5]], "labels": [[-100, 6], None]}, {}, "rows or labels that are",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_right_is_refused(case: str, tmp_path: Path, tokenizer: Path) -> None:
    """Wrong targets that train without an error."""
    columns, changes, said = BAD[case]
    write_table(tmp_path / "in" / "train.parquet", **columns)
    with pytest.raises((DataRefused, ConfigError), match=said):
        imported(tmp_path / "in", tmp_path / "out", tokenizer, **changes)
    assert not (tmp_path / "out" / "manifests").exists()


def test_files_with_and_without_labels_do_not_mix(tmp_path: Path, tokenizer: Path) -> None:
    """Half of the data that trains its prompts."""
    write_table(tmp_path / "in" / "train-0.parquet", input_ids=[[5, 6]], labels=[[-100, 6]])
    write_table(tmp_path / "in" / "train-1.parquet", input_ids=[[5, 6]])
    with pytest.raises(ConfigError, match="1 files of .* have labels, 1 have none"):
        imported(tmp_path / "in", tmp_path / "out", tokenizer)


def test_labels_of_rows_and_of_every_token_make_packed_rows(
    tmp_path: Path, tokenizer: Path
) -> None:
    """A classifier's labels, or a language model's copy of its tokens, that refuse the import."""
    rows = [[5, 6], [7, 8, 9]]
    for name, columns, changes in (
        ("classes", {"input_ids": rows, "labels": [0, 1]}, {}),
        ("copies", {"input_ids": rows, "labels": rows}, {"kind": "packed_tokens"}),
    ):
        write_table(tmp_path / name / "train.parquet", **columns)
        found = imported(tmp_path / name, tmp_path / f"{name}-out", tokenizer, seq_len=4, **changes)
        assert found.manifest.totals["train"]["tokens"] == 5, name


def test_the_command_says_what_it_made(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A count of rows where a person counts examples; what was left out, unsaid."""
    labels = [[-100, 6, 7], [-100, -100]]
    write_table(tmp_path / "in" / "train.parquet", input_ids=[[5, 6, 7], [8, 9]], labels=labels)
    words = ["data", "import", "--from", "hf", str(tmp_path / "in"), str(tmp_path / "out")]
    assert cli.main([*words, "--tokenizer", str(tokenizer)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        "train: 1 examples, 3 tokens, 2 of them trained",
        "left out: 1 without a trained token",
    ]
