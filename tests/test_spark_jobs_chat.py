"""The chat job: shapes, policies, truncation and named failures; on real Spark one digest."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist.dataset import Dataset, open_dataset
from dist.example_file import Example, ExampleShard
from dist.verify import verify_full
from spark_jobs import chat as job
from spark_jobs.bookkeeping import check_messages, manifest_of
from spark_jobs.chat_records import Unrecognised, recognise
from spark_jobs.chat_tasks import read_and_encode
from spark_jobs.chat_template import TemplateText
from spark_jobs.chat_tokens import ChatRules, ChatTokens, Left, TrainedTurns
from spark_jobs.example_writer import (
    ExampleBucketWriter,
    ExamplePlan,
    lengths_of,
)
from spark_jobs.records import Rules, read_chunks
from spark_jobs.shard_writer import write_partition
from spark_jobs.sources import list_inputs, plan_tasks
from tests.chat_templates import CALLS, TAGGED, TOOLS, chat_tokenizer_json

ROOT = Path(__file__).parent.parent
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
LONG = {
    "messages": [
        {"role": "system", "content": "S"}, {"role": "user", "content": "U1"},
        {"role": "assistant", "content": "A1"}, {"role": "user", "content": "U2 is longer"},
        {"role": "assistant", "content": "A2 is much longer"},
    ]
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    return chat_tokenizer_json()


def chat(tokenizer: bytes, text: str = TAGGED["qwen"], **changes: Any) -> ChatTokens:
    settings: dict[str, Any] = {
        "template": TemplateText(text, TOKENS), "train": TrainedTurns(), "max_length": 4096,
        "truncation": "drop", "special_text": "refuse", "stop": "",
    }  # fmt: skip
    return ChatTokens(ChatRules(**{**settings, **changes}), tokenizer)


# -- shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, REPLY]},
        {"messages": json.dumps([USER, REPLY])},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, REPLY]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "response": "a", "id": 7},
        {"prompt": [USER], "completion": [REPLY]},
    ],
)
def test_shapes_are_recognised(row: dict[str, Any]) -> None:
    """A role or a field mapped wrongly trains the questions."""
    assert recognise(json.dumps(row)).messages == [USER, REPLY]


def test_what_stands_beside_the_messages() -> None:
    """System prompts, tools, Alpaca's input and history that are lost in silence."""
    shared = {
        "system": "s", "tools": json.dumps(TOOLS),
        "conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f"},
                          {"from": "observation", "value": "o"}, {"from": "gpt", "value": "a"}],
    }  # fmt: skip
    found = recognise(json.dumps(shared))
    assert [m["role"] for m in found.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert found.tools == TOOLS
    alpaca = {"instruction": "i", "input": "x", "output": "o", "history": [["q", "a"]]}
    said = [m["content"] for m in recognise(json.dumps(alpaca)).messages]
    assert said == ["q", "a", "i\n\nx", "o"]
    assert recognise(json.dumps({"messages": CALLS, "tools": TOOLS})).messages[1]["tool_calls"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, "none of messages"),
        ({"messages": "hello"}, "should hold JSON"),
        ({"messages": {"role": "user"}}, "a dict, not a list"),
        ({"messages": []}, "no message"),
        ({"messages": ["hi"]}, "a str, not an object"),
        ({"messages": [{"content": "x"}]}, "neither role nor from"),
        ({"messages": [{"role": 3, "content": "x"}]}, "role of a message is 3"),
        ({"messages": [{"role": "user"}]}, "neither content nor tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "from 'narrator'"),
        ({"instruction": 1, "output": "x"}, "not text"),
        ({"messages": [USER], "tools": 3}, "tools are a int"),
        ({"messages": [{"role": "user", "content": "\U000f0002"}]}, "private-use"),
    ],
)
def test_other_shapes_say_what_they_lack(row: dict[str, Any], said: str) -> None:
    """A row taken for a chat by guess; a reason that helps nobody."""
    with pytest.raises(Unrecognised, match=said):
        recognise(json.dumps(row))


KEYS = ["messages", "conversations", "prompt", "completion", "instruction", "output", "tools",
        "history", "system", "role", "content", "from", "value", "tool_calls"]  # fmt: skip
SCALARS: Any = (
    st.none() | st.integers(0, 1) | st.sampled_from(["", "user", "assistant", "gpt", "[]"])
)
OBJECTS: Any = st.dictionaries(st.sampled_from(KEYS), SCALARS | st.lists(SCALARS, max_size=2))
KNOWN = chat(chat_tokenizer_json())


@given(st.dictionaries(st.sampled_from(KEYS), SCALARS | OBJECTS | st.lists(OBJECTS, max_size=3)))
def test_no_row_raises_anything_else(row: dict[str, Any]) -> None:
    """One odd row among a million must not end the job."""
    assert isinstance(KNOWN.examples([json.dumps(row)])[0], (Example, Left))


# -- files -------------------------------------------------------------------------------------


def rows_of(path: Path, split_bytes: int = 1 << 20) -> list[tuple[int, Any]]:
    """(offset, row or reason) of every record."""
    files = job.find_arrays(list_inputs([str(path)]))
    found: list[tuple[int, Any]] = []
    for splits in plan_tasks(files, split_bytes):
        for chunk in read_chunks(files, splits, Rules("", 1 << 20)):
            found += zip(chunk.offsets, map(json.loads, chunk.texts), strict=True)
            found += [(one.offset, one.reason) for one in chunk.refused]
    return sorted(found, key=lambda pair: pair[0])


def test_arrays_and_parquet_are_read_whole(tmp_path: Path) -> None:
    """ShareGPT's files are one JSON array; Parquet gives every message the keys of all others."""
    chats = [{"messages": [USER, {**REPLY, "content": f"é{i}"}]} for i in range(5)]
    array = tmp_path / "a.json"
    text = json.dumps(chats, ensure_ascii=False, indent=1)
    array.write_text(text)
    found = rows_of(array)
    assert [row for _, row in found] == chats
    data = array.read_bytes()
    assert all(data[offset : offset + 1] == b"{" for offset, _ in found)
    assert rows_of(array, 16) == found, "an array is one split however it is cut"
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(data))
    assert rows_of(tmp_path / "a.json.gz") == found
    array.write_bytes(data[:-20] + b"\xff\xff")
    assert [row for _, row in rows_of(array)][:4] == chats[:4]
    assert rows_of(array)[-1][1] == "not_json"
    lines = tmp_path / "b.json"
    lines.write_text("".join(json.dumps(one) + "\n" for one in chats) + "[1]\n")
    assert [row for _, row in rows_of(lines)] == [*chats, "not_json"]
    calls = [{"messages": CALLS}, chats[0]]
    pq.write_table(pa.Table.from_pylist(calls), tmp_path / "c.parquet")
    found = rows_of(tmp_path / "c.parquet")
    assert [sorted(m) for m in found[0][1]["messages"]] == [
        ["content", "role"], ["role", "tool_calls"], *[["content", "role"]] * 3
    ]  # fmt: skip
    assert found[1][1] == chats[0]


def write_rows(folder: Path, rows: list[dict[str, Any]], tokenizer: bytes, template: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tokenizer.json").write_bytes(tokenizer)
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENS))
    (folder / "chat_template.jinja").write_text(template)
    return folder


# -- Spark -------------------------------------------------------------------------------------


def chats(number: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(number)
    rows = []
    for i in range(40):
        turns = []
        for _ in range(int(rng.integers(1, 4))):
            turns += [{"role": "user", "content": f"question {i} " * int(rng.integers(1, 5))}]
            turns += [{"role": "assistant", "content": f"answer {i} " * int(rng.integers(1, 6))}]
        rows.append({"messages": turns})
    return rows


BAD: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "only a question"}]},
    {"no": "chat"},
    {"messages": [{"role": "user", "content": "<|im_end|>"}, REPLY]},
    {"messages": [USER, {"role": "assistant", "content": "word " * 400}]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: bytes) -> Path:
    """A tokenizer with a template, and chats in every format."""
    root = write_rows(
        tmp_path_factory.mktemp("chats") / "x", chats(0) + BAD, tokenizer, TAGGED["qwen"]
    )
    (root / "data/array.json").write_text(json.dumps(chats(1)))
    pq.write_table(pa.Table.from_pylist(chats(2)), root / "data/d.parquet", row_group_size=9)
    return root


def without_spark(folder: Path, output: Path, split_bytes: int, batch: int) -> tuple[str, Any]:
    """(data_digest, counters) of both stages in this process, cut as told."""
    config = job.Config(
        input=[str(folder / "data")], tokenizer=str(folder), output=str(output), max_length=300,
        validation_fraction=0.2, shard_size_mib=0.004,
    )  # fmt: skip
    files = job.find_arrays(list_inputs(config.input))
    tokenizer = (folder / "tokenizer.json").read_bytes()
    encoder = chat(tokenizer, max_length=300)
    plan, schema = job.plan_transform(config, files, encoder.rules, tokenizer)
    rows: list[pa.RecordBatch] = []
    for splits in plan_tasks(files, split_bytes):
        rows += read_and_encode(splits, files, plan, encoder)
    order = [(name, "ascending") for name in ("bucket", "h", "key", "input")]
    table = pa.Table.from_batches(rows).sort_by(order).combine_chunks()
    writer = ExamplePlan(
        output=str(output), rows_per_batch=schema["rows_per_batch"], max_tokens=1000,
        num_buckets=plan.num_buckets,
    )  # fmt: skip
    paths, batches = [file.path for file in files], table.to_batches(max_chunksize=batch)
    made = write_partition(batches, writer, paths, ExampleBucketWriter)
    messages = [one for message in made for one in message.to_pylist()]
    counters, _, shards = check_messages(messages, plan)
    for one in shards:
        real = ExampleShard(output / "shards" / one["name"]).lengths()
        assert lengths_of(one).tolist() == real.tolist()
    schema["template_digest"] = None
    return manifest_of("examples", schema, "ab" * 32, shards, plan).data_digest, counters


def test_cutting_does_not_change_the_digest(folder: Path, tmp_path: Path) -> None:
    """A shard that is closed where an Arrow batch ends, a counter that a task keeps."""
    whole = without_spark(folder, tmp_path / "a", 1 << 20, 1000)
    assert without_spark(folder, tmp_path / "b", 700, 7) == whole
    assert whole[1]["documents_out"] == 120
    rows = [row for path in (folder / "data").iterdir() for _, row in rows_of(path)]
    bytes_of = sum(len(json.dumps(row, ensure_ascii=False).encode()) for row in rows)
    assert whole[1]["text_bytes"] == pytest.approx(bytes_of, rel=0.05)


def test_a_named_stop_is_the_datasets_end(folder: Path, tokenizer: bytes, tmp_path: Path) -> None:
    """Generation stops at the dataset's eos_id: with --stop it is that token."""
    words = {"input": [str(folder / "data")], "tokenizer": str(folder), "output": str(tmp_path)}
    files = job.find_arrays(list_inputs(words["input"]))
    for stop, expected in (("", "</s>"), ("<|im_end|>", "<|im_end|>")):
        encoder = chat(tokenizer, stop=stop)
        config = job.Config(**words, stop=stop)  # type: ignore[arg-type]
        _, schema = job.plan_transform(config, files, encoder.rules, tokenizer)
        assert schema["eos_id"] == encoder.tokenizer.special[expected]


def test_refused_rows_are_kept_as_they_were(folder: Path, tokenizer: bytes) -> None:
    """Another row in the quarantine than the one that was refused."""
    config = job.Config(input=[str(folder / "data")], tokenizer=str(folder), output="x")
    files = job.find_arrays(list_inputs(config.input))
    encoder = chat(tokenizer, max_length=300)
    plan, _ = job.plan_transform(config, files, encoder.rules, tokenizer)
    raws = []
    for splits in plan_tasks(files, 1 << 20):
        for batch in read_and_encode(splits, files, plan, encoder):
            number, raw = (batch.column(i).to_pylist() for i in (5, 6))
            raws += [text for n, text in zip(number, raw, strict=True) if n < 0]
    assert [json.loads(raw) for raw in raws] == [BAD[1], BAD[2]]


def prep(folder: Path, output: Path, *more: str) -> str:
    words = ["--input", str(folder / "data"), "--tokenizer", str(folder), "--output", str(output)]
    words += ["--max_length", "300", "--validation_fraction", "0.2", "--shard_size_mib", "0.004"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "prep", "chat", *words, *more],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    output = tmp_path_factory.mktemp("out")
    out = prep(folder, output, "--master", "local[2]")
    assert "1 over_length, 1 nothing_trained" in out
    assert "refused: 1 unrecognised, 1 special_text" in out
    return open_dataset(str(output))


@pytest.mark.spark
def test_the_job_writes_what_the_definition_says(made: Dataset, folder: Path) -> None:
    """A row lost or twice, a mask of another row, books that do not balance."""
    verify_full(made, progress=False)
    record = made.read_provenance()
    assert record is not None
    counters = record["counters"]
    assert counters["documents_in"] == 124
    assert counters["documents_out"] == counters["documents_in"] - counters["filtered"] - 2 == 120
    totals = made.manifest.totals
    assert sum(split["targets"] for split in totals.values()) == counters["targets"]
    assert sum(split["rows"] for split in totals.values()) == 120 and len(totals) == 2
    encoder = chat(chat_tokenizer_json(), max_length=300)
    expected = {}
    for number, rows in ((0, chats(0)), (1, chats(1)), (2, chats(2))):
        for row, one in zip(rows, encoder.examples([json.dumps(row) for row in rows]), strict=True):
            assert isinstance(one, Example), row
            expected[number, one.tokens.tobytes()] = one
    names = {"rows.jsonl": 0, "array.json": 1, "d.parquet": 2}
    paths = [names[one["path"]] for one in record["inputs"]]
    found = 0
    for entry in made.manifest.shards:
        shard = ExampleShard(made.shard_path(entry))
        for row in range(shard.num_rows):
            one = shard.read(row)
            wanted = expected.pop((paths[one.input], one.tokens.tobytes()))
            assert one.spans.tolist() == wanted.spans.tolist()
            assert one.segments.tolist() == wanted.segments.tolist()
            found += 1
    table = made.read_lengths()
    assert table is not None and [len(one) for one in table["train"]] == [
        shard.rows for shard in made.manifest.shards_of("train")
    ]
    for name, of_shards in table.items():
        for entry, lengths in zip(made.manifest.shards_of(name), of_shards, strict=True):
            real = ExampleShard(made.shard_path(entry)).lengths()
            assert lengths.dtype == np.uint16 and lengths.tolist() == real.tolist()
    assert found == 120 and not expected and len(made.manifest.shards) > 3
    assert made.manifest.schema["eos_id"] == 1
    digest = made.manifest.schema["template_digest"]
    assert made.storage.read(f"templates/{digest}.jinja").decode() == TAGGED["qwen"]
    refused = pq.read_table(made.storage.local_path(record["quarantine"]["name"])).to_pylist()
    kept = {row["reason"]: json.loads(row["raw"]) for row in refused}
    assert kept == {"unrecognised": BAD[1], "special_text": BAD[2]}


@pytest.mark.spark
def test_executors_and_cutting_do_not_change_the_digest(
    made: Dataset, folder: Path, tmp_path: Path
) -> None:
    """Order or shard borders that follow Spark's tasks; code that is not shipped to executors."""
    prep(folder, tmp_path, "--master", "local-cluster[2,1,1024]", "--num_tasks", "7")
    assert open_dataset(str(tmp_path)).data_digest == made.data_digest
    assert "already done" in prep(folder, tmp_path)
