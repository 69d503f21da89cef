"""The tokens job on real Spark: one digest everywhere, kills, reruns, quarantine.

Each job is a process of its own, as a user starts it, with no JAVA_HOME and no java on PATH.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from dist.commit import target_lease
from dist.dataset import Dataset, open_dataset
from dist.shard_file import PackedShard
from dist.storage import Storage
from dist.tokenizer import TextTokenizer
from dist.verify import verify_full
from spark_jobs.java import java_home
from tests.make_dataset import tokenizer_json

pytestmark = pytest.mark.spark

ROOT = Path(__file__).resolve().parent.parent
SEQ_LEN, SEED, SHARD_MIB, VALIDATION = 32, 7, 0.02, 0.2
BAD = {"undecodable": 1, "not_json": 2, "field_missing": 1, "empty": 1, "over_long": 1}


def documents(number: int, count: int) -> list[str]:
    """Texts of one input file, of very different lengths."""
    rng = np.random.default_rng(number)
    words = ["spark", "jar", "return", "élan", "<|end_of_text|>", "def f(x):\n    return x"]
    return [
        f"{number}/{i} " + " ".join(rng.choice(words, int(rng.integers(1, 90))))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every format and every kind of bad record."""
    root = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": text}).encode() for text in documents(0, 150)]
    lines[10:10] = [b'{"text": "\xff"}', b"{", b"[]", b'{"t": 1}', b'{"text": " "}', b""]
    lines[100:100] = [b'{"text": "' + b"y" * 30_000 + b'"}']
    (root / "a.jsonl").write_bytes(b"\n".join(lines))
    (root / "sub").mkdir()
    packed = "".join(json.dumps({"text": text}) + "\n" for text in documents(1, 60))
    (root / "sub/b.jsonl.gz").write_bytes(gzip.compress(packed.encode()))
    (root / "sub/c.jsonl.zst").write_bytes(pa.compress(packed.encode(), "zstd", asbytes=True))
    table = pa.table({"text": documents(2, 90)})
    pq.write_table(table, root / "sub/d.parquet", row_group_size=20)
    for number in range(5):
        (root / f"sub/{number}.txt").write_text(documents(3 + number, 1)[0])
    (root / "tokenizer").mkdir()
    return root


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(tokenizer_json())
    return path


@pytest.fixture(scope="module")
def java_free(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment without Java, whose PATH holds what Spark's shell scripts call."""
    tools = tmp_path_factory.mktemp("bin")
    for name in ("bash", "sh", "env", "dirname", "cat", "ls", "mkdir", "rm", "chmod", "readlink"):
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(found)
    env = {**os.environ, "PATH": str(tools), "TMPDIR": str(tmp_path_factory.mktemp("tmp"))}
    env.pop("JAVA_HOME", None)
    # Speculation as eager as Spark allows.
    conf = tmp_path_factory.mktemp("conf")
    (conf / "spark-defaults.conf").write_text(
        "spark.speculation true\nspark.speculation.interval 10ms\n"
        "spark.speculation.multiplier 1.01\nspark.speculation.quantile 0.1\n"
    )
    return env | {"SPARK_CONF_DIR": str(conf)}


def arguments(corpus: Path, tokenizer: Path, output: Path, /, **changes: object) -> list[str]:
    settings: dict[str, object] = {
        "input": corpus,
        "tokenizer": tokenizer,
        "output": output,
        "seq_len": SEQ_LEN,
        "seed": SEED,
        "shard_size_mib": SHARD_MIB,
        "validation_fraction": VALIDATION,
        "max_document_mib": 0.02,
        "master": "local[2]",
        **changes,
    }
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def start(args: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "spark_jobs.tokenize_text", *args],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(args: list[str], env: dict[str, str], code: int = 0) -> tuple[str, str]:
    """Run the job to its end; (stdout, stderr)."""
    job = start(args, env)
    out, err = job.communicate(timeout=200)
    assert job.returncode == code, f"exit {job.returncode}\n{out}\n{err}"
    assert "Traceback" not in err and "WARN" not in err, err
    return out, err


@pytest.fixture(scope="module")
def baseline(
    corpus: Path,
    tokenizer: Path,
    java_free: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Dataset:
    """The dataset that every other way of running must give again."""
    output = tmp_path_factory.mktemp("baseline")
    out, err = finish(arguments(corpus, tokenizer, output), java_free)
    assert "refused: 1 undecodable, 2 not_json, 1 field_missing, 1 empty, 1 over_long" in out
    for line in err.splitlines():
        assert line.startswith(("tokenize: ", "warning: ")), f"noise on stderr: {line}"
    assert not list(Path(java_free["TMPDIR"]).iterdir()), "scratch files are left"
    return open_dataset(str(output))


def plain_python(corpus: Path, tokenizer: Path) -> dict[str, list[list[int]]]:
    """Rows of tokens per split by the definition, in one process, without our reader or packer."""
    texts: dict[tuple[str, int], str] = {}
    offset = 0
    for line in (corpus / "a.jsonl").read_bytes().split(b"\n"):
        try:
            text = json.loads(line.decode())["text"]
            if text.strip() and len(text) < 20_000:
                texts["a.jsonl", offset] = text
        except (ValueError, KeyError, TypeError):
            pass
        offset += len(line) + 1
    for name in ("sub/b.jsonl.gz", "sub/c.jsonl.zst"):
        offset = 0
        for text in documents(1, 60):
            texts[name, offset] = text
            offset += len(json.dumps({"text": text}).encode()) + 1
    texts |= {("sub/d.parquet", row): text for row, text in enumerate(documents(2, 90))}
    texts |= {(f"sub/{number}.txt", 0): documents(3 + number, 1)[0] for number in range(5)}
    files = [path for path in corpus.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    reference = TextTokenizer(tokenizer.read_bytes(), "hf")
    buckets: dict[tuple[str, int], list[tuple[int, bytes, list[int]]]] = {}
    for (name, offset), text in texts.items():
        key = xxhash.xxh3_128_digest(name.encode() + b"\0" + offset.to_bytes(8, "little"))
        h = xxhash.xxh3_64_intdigest(key, SEED)
        held_out = xxhash.xxh3_64_intdigest(b"validation" + key, SEED) < VALIDATION * 2**64
        split, share = ("validation", VALIDATION) if held_out else ("train", 1 - VALIDATION)
        count = max(1, -(-int(share * total) // int(SHARD_MIB * 2**20)))
        ids = [0, *reference.encode_batch([text])[0].tolist(), 1]
        buckets.setdefault((split, h * count >> 64), []).append((h, key, ids))
    rows: dict[str, list[list[int]]] = {"train": [], "validation": []}
    for (split, _), members in sorted(buckets.items()):
        flat = [one for _, _, ids in sorted(members) for one in ids]
        flat += [0] * (-len(flat) % (SEQ_LEN + 1))
        rows[split] += [flat[i : i + SEQ_LEN + 1] for i in range(0, len(flat), SEQ_LEN + 1)]
    return rows


def test_rows_are_those_of_the_definition(baseline: Dataset, corpus: Path, tokenizer: Path) -> None:
    """A document lost, twice, in the wrong bucket, order or split would show here."""
    expected = plain_python(corpus, tokenizer)
    assert verify_full(baseline, progress=False)
    for split, rows in expected.items():
        shards = [PackedShard(baseline.shard_path(one)) for one in baseline.split(split).shards]
        assert len(shards) > 1
        found = np.concatenate([shard.tokens(0, shard.num_rows) for shard in shards])
        assert found.tolist() == rows
        pieces = [
            p for shard in shards for row in range(shard.num_rows) for p in shard.lineage(row)
        ]
        assert sum(length for _, _, length in pieces) == baseline.manifest.totals[split]["tokens"]


def test_counters_and_quarantine(baseline: Dataset, corpus: Path) -> None:
    """in = out + filtered + quarantined, and every refused record can be looked at."""
    record = baseline.read_provenance()
    assert record is not None
    counters = record["counters"]
    assert {reason: counters[f"quarantined.{reason}"] for reason in BAD} == BAD
    assert counters["documents_in"] == counters["documents_out"] + sum(BAD.values())
    refused = pq.read_table(baseline.storage.local_path(record["quarantine"]["name"])).to_pylist()
    assert [row["source"] for row in refused] == ["a.jsonl"] * 6
    data = (corpus / "a.jsonl").read_bytes()
    for row in refused:
        line = data[row["offset"] :].split(b"\n")[0]
        # Of a document the text is kept, of other records the line.
        assert row["raw"] in line if row["reason"] != "empty" else row["raw"] == b" "
    assert [one["path"] for one in record["inputs"]][:2] == ["a.jsonl", "sub/0.txt"]


def test_a_rerun_is_done_at_once(
    baseline: Dataset, corpus: Path, tokenizer: Path, java_free: dict[str, str]
) -> None:
    """A finished job that starts Spark again costs minutes and may publish another version."""
    out, err = finish(arguments(corpus, tokenizer, Path(baseline.storage.url)), java_free)
    assert "already done" in out and "tokenize:" not in err


def test_executors_and_speculation(
    baseline: Dataset, corpus: Path, tokenizer: Path, java_free: dict[str, str], tmp_path: Path
) -> None:
    """A row order that depends on executors, or code that is not shipped to them."""
    args = arguments(corpus, tokenizer, tmp_path / "out", master="local-cluster[2,1,1024]")
    finish(args, java_free)
    assert open_dataset(str(tmp_path / "out")).data_digest == baseline.data_digest


def wait_for(condition: Callable[[], bool], job: subprocess.Popen[str], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < end, "timed out"
        time.sleep(0.002)


def stop_midway(number: int, args: list[str], output: Path, env: dict[str, str]) -> int:
    """Start the job, signal it after its first shard, wait for all its processes; exit code."""
    shutil.rmtree(output, ignore_errors=True)
    job = start(args, env)
    wait_for(lambda: any(output.glob("shards/*.arrow")), job, 120)
    children = psutil.Process(job.pid).children(recursive=True)
    job.send_signal(number)
    _, err = job.communicate(timeout=60)
    assert "Traceback" not in err, err
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, f"left behind: {alive}"
    assert not (output / "LATEST").exists() and not (output / "manifests").exists()
    return job.returncode


def test_stopped_and_killed_drivers(
    baseline: Dataset, corpus: Path, tokenizer: Path, java_free: dict[str, str], tmp_path: Path
) -> None:
    """A half-written version that is visible, an orphan JVM, a rerun that differs.

    The rerun has another folder, number of cores and number of partitions than the baseline: a
    row order that depends on one of them shows here as well.
    """
    elsewhere = Path(shutil.copytree(corpus, tmp_path / "elsewhere"))
    output, scratch = tmp_path / "out", Path(java_free["TMPDIR"])
    args = arguments(elsewhere, tokenizer, output, master="local[1]", num_tasks=7)
    assert stop_midway(signal.SIGTERM, args, output, java_free) == 130
    assert not list(scratch.iterdir()), "scratch files are left"
    assert not (output / "lease.json").exists()
    assert stop_midway(signal.SIGKILL, args, output, java_free) == -signal.SIGKILL
    finish(args, java_free)
    assert open_dataset(str(output)).data_digest == baseline.data_digest
    # The run after a killed one also removes its scratch folder.
    assert not list(scratch.iterdir())


def test_plain_spark_submit(
    baseline: Dataset, corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """Clusters start jobs this way: another working folder, no repository on sys.path."""
    output, config = tmp_path / "out", tmp_path / "job.yaml"
    words = arguments(corpus, tokenizer, output)
    settings = dict(zip([word[2:] for word in words[::2]], words[1::2], strict=True))
    del settings["master"]
    settings["input"] = f"[{corpus}]"
    config.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    submit = Path(sys.executable).parent / "spark-submit"
    command = [submit, "--master", "local[2]", ROOT / "spark_jobs/tokenize_text.py"]
    env = {**os.environ, "JAVA_HOME": str(java_home()), "PYSPARK_PYTHON": sys.executable}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        [*command, "--config", config], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert open_dataset(str(output)).data_digest == baseline.data_digest


def test_a_second_driver_is_refused(
    corpus: Path, tokenizer: Path, java_free: dict[str, str], tmp_path: Path
) -> None:
    """Two drivers on one target would race for LATEST."""
    with target_lease(Storage(str(tmp_path))):
        _, err = finish(arguments(corpus, tokenizer, tmp_path), java_free, code=4)
    assert f"in use by process {os.getpid()}" in err


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"input": "/nowhere/x.jsonl"}, 2, "/nowhere/x.jsonl does not exist"),
        ({"tokenizer": "/nowhere"}, 2, "no tokenizer at '/nowhere'"),
        ({"bos": "<s>"}, 2, "bos: the tokenizer has no token '<s>'"),
        ({"seq_leng": 5}, 2, "did you mean 'seq_len'"),
        ({"text_field": "body"}, 3, "in the field 'body'"),
    ],
)
def test_bad_requests(
    changes: dict[str, object],
    code: int,
    said: str,
    corpus: Path,
    tokenizer: Path,
    java_free: dict[str, str],
    tmp_path: Path,
) -> None:
    """Each ends before Spark starts, with its exit code and without a traceback."""
    if "text_field" in changes:
        changes = {**changes, "input": corpus / "sub/d.parquet"}
    _, err = finish(arguments(corpus, tokenizer, tmp_path, **changes), java_free, code=code)
    assert said in err
    assert not (tmp_path / "LATEST").exists()
