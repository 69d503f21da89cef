"""`leyden data ACTION` on a real, small dataset, whole and damaged."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import tokenizers

from dist.commit import target_lease
from dist.dataset import Dataset, open_dataset
from dist.storage import Storage
from launch import cli
from tests.make_dataset import tokenizer_json, write_dataset

GOLDEN = Path(__file__).resolve().parent / "golden"


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return write_dataset(tmp_path / "corpus")


def test_inspect_shows_what_it_is(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers that are not the manifest's, or a sample that is not the data."""
    assert cli.main(["data", "inspect", str(tmp_path / "corpus")]) == 0
    out = capsys.readouterr().out
    assert dataset.data_digest in out
    for split in dataset.manifest.splits():
        rows = dataset.manifest.totals[split]["rows"]
        line = next(line for line in out.splitlines() if line.strip().startswith(split))
        assert f"{rows:,}" in line.split()
        assert f"sample     {split} row 0" in out
    assert "seq_len=16" in out and "packed_tokens" in out


def test_inspect_json_is_for_programs(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prose among the JSON."""
    reference = f"{tmp_path / 'corpus'}@{dataset.data_digest[:8]}"
    assert cli.main(["data", "inspect", reference, "--json", "--rows", "2"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["reference"].endswith(dataset.data_digest)
    assert facts["splits"]["train"]["rows"] == dataset.manifest.totals["train"]["rows"]
    assert len(facts["samples"]["train"]) == 2


def test_verify_reads_every_byte(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A verification that passes damaged data, or that does not name the shard."""
    root = str(tmp_path / "corpus")
    assert cli.main(["data", "verify", root]) == 0
    assert f"verified: {len(dataset.manifest.shards)} shards" in capsys.readouterr().out

    path = dataset.shard_path(dataset.manifest.shards[1])
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.write_bytes(bytes(damaged))
    assert cli.main(["data", "verify", root]) == 3
    assert path.name in capsys.readouterr().err
    # Names and sizes are right, and that is all that --presence looks at.
    assert cli.main(["data", "verify", root, "--presence"]) == 0

    path.write_bytes(whole[:-1])
    assert cli.main(["data", "verify", root, "--presence"]) == 3
    assert path.name in capsys.readouterr().err
    path.unlink()
    assert cli.main(["data", "verify", root]) == 3
    assert f"{path.name} is missing" in capsys.readouterr().err


def test_a_sample_cannot_steer_the_terminal(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Escape sequences in raw data would recolour, retitle or clear the user's terminal."""
    monkeypatch.setattr("dist.tokenizer.TextTokenizer.decode", lambda *_: "a\x1b[2Jb\rc\x07")
    assert cli.main(["data", "inspect", str(tmp_path / "corpus")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out
    assert "a\\x1b[2Jb" in out


def test_inspect_tells_counts_lengths_and_borders(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sample read as one text; figures of a part that pass for the whole; a page not written."""
    root, page = str(tmp_path / "corpus"), tmp_path / "page.html"
    assert cli.main(["data", "inspect", root, "--samples", "2", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "scanned    all" in out and "lengths    of 240 documents" in out
    assert "  +- input-" in out and "@ 100, " in out
    assert "<svg" in page.read_text()
    assert cli.main(["data", "inspect", root, "--scan_rows", "20", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert not facts["scan"]["complete"] and facts["scan"]["rows"] < facts["scan"]["of_rows"]


def test_verify_names_every_damaged_shard_and_reads_remote_ones(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first damaged shard alone, a run later the next; a remote dataset not looked at."""
    paths = [dataset.shard_path(shard) for shard in dataset.manifest.shards]
    remote = Storage("memory://verify/data")
    for path in sorted((tmp_path / "corpus").rglob("*")):
        if path.is_file():
            remote.write_atomic(str(path.relative_to(tmp_path / "corpus")), path.read_bytes())
    assert cli.main(["data", "verify", "memory://verify/data"]) == 0
    assert "GB/s" in capsys.readouterr().out
    for path in paths[::2]:
        data = bytearray(path.read_bytes())
        data[60] ^= 1
        path.write_bytes(bytes(data))
    assert cli.main(["data", "verify", str(tmp_path / "corpus")]) == 3
    said = capsys.readouterr().err
    assert [path.name in said for path in paths] == [i % 2 == 0 for i in range(len(paths))]
    name = f"shards/{paths[1].name}"
    remote.write_atomic(name, remote.read(name)[:-1] + b"x")
    assert cli.main(["data", "verify", "memory://verify/data"]) == 3
    assert name in capsys.readouterr().err


def test_diff_exits_like_diff(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script that goes on because the exit code says equal."""
    root, other = str(tmp_path / "corpus"), str(tmp_path / "other")
    assert cli.main(["data", "diff", root, root]) == 0
    assert "the same version" in capsys.readouterr().out
    write_dataset(Path(other), seed=1, vocab_size=290)
    assert cli.main(["data", "diff", root, other]) == 1
    out = capsys.readouterr().out
    assert "0 shared" in out and "schema.vocab_size: 300 -> 290" in out
    assert cli.main(["data", "diff", root, other, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["equal"] is False
    assert cli.main(["data", "diff", root, str(tmp_path / "none")]) == 2


def test_gc_lists_first_and_deletes_then(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dry run that deletes, or a summary that hides what is too young."""
    root = str(tmp_path / "corpus")
    garbage = tmp_path / "corpus" / "shards" / f"{5:032x}.arrow"
    garbage.write_bytes(b"12345")
    assert cli.main(["data", "gc", root]) == 0
    assert "0 files, 0.0 MB deleted" in capsys.readouterr().out and garbage.exists()
    assert cli.main(["data", "gc", root, "--dry-run", "--older-than", "0d"]) == 0
    out = capsys.readouterr().out
    assert f"5  shards/{garbage.name}" in out and "1 files" in out and garbage.exists()
    assert cli.main(["data", "gc", root, "--older-than", "0d"]) == 0
    assert not garbage.exists()
    assert cli.main(["data", "verify", root]) == 0
    with target_lease(dataset.storage):
        assert cli.main(["data", "gc", root, "--older-than", "0d"]) == 4
    assert "is in use by process" in capsys.readouterr().err
    assert cli.main(["data", "gc", f"{root}@{dataset.data_digest[:8]}"]) == 2
    assert cli.main(["data", "gc", str(tmp_path / "none")]) == 2


def test_a_pin_is_taken_wherever_a_dataset_is(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A pin that only one verb understands."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "pin", "corpus", "-o", "corpus.pin"]) == 0
    assert json.loads((tmp_path / "corpus.pin").read_text())["url"] == "corpus"
    for words in (["verify", "corpus.pin"], ["inspect", "corpus.pin"], ["pin", "corpus.pin"],
                  ["diff", "corpus.pin", "corpus"]):  # fmt: skip
        assert cli.main(["data", *words]) == 0, capsys.readouterr().err
    assert dataset.data_digest in capsys.readouterr().out


def test_export_and_import_by_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options that do not reach the work, or a text source without the way to prep."""
    write_dataset(tmp_path / "corpus", vocab_size=290)
    root, out, back = (str(tmp_path / name) for name in ("corpus", "out", "back"))
    assert cli.main(["data", "export", root, "--to", "megatron", out]) == 0
    assert "180 of train" in capsys.readouterr().out
    words = ["data", "import", "--from", "megatron", out, back, "--tokenizer", out]
    assert cli.main([*words, "--seq_len", "31"]) == 0
    assert "train: 180 documents" in capsys.readouterr().out
    assert cli.main([*words, "--seq_len", "31"]) == 0
    assert "already done" in capsys.readouterr().out
    assert cli.main([*words, "--seq_len", "15"]) == 0
    assert open_dataset(back).manifest.schema["seq_len"] == 15
    text = tmp_path / "text"
    text.mkdir()
    shutil.copy(__file__, text / "a.tar")
    assert (
        cli.main(["data", "import", "--from", "webdataset", str(text), back, "--tokenizer", out])
        == 3
    )
    assert (
        cli.main(["data", "import", "--from", "hf", str(tmp_path / "no"), back, "--tokenizer", out])
        == 2
    )
    words = [
        "data",
        "import",
        "--from",
        "mds",
        str(GOLDEN / "mds" / "text"),
        back,
        "--tokenizer",
        out,
    ]
    assert cli.main(words) == 3
    assert "leyden prep tokenize-text" in capsys.readouterr().err


def test_every_command_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/data_verbs.md shows an option that was renamed, or steps that do not fit together."""
    monkeypatch.chdir(tmp_path)
    first = write_dataset("data/corpus", vocab_size=290, seed=1)
    write_dataset("data/corpus", vocab_size=290)
    shutil.copytree(GOLDEN / "mds" / "nd", "out/mds")
    made = tokenizers.Tokenizer.from_str(tokenizer_json().decode())
    made.add_special_tokens([f"<|extra_{i}|>" for i in range(300 - made.get_vocab_size())])
    made.save("out/tokenizer.json")
    page = (Path(__file__).resolve().parent.parent / "docs" / "data_verbs.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) > 12 and all(line.startswith("leyden ") for line in lines)
    for line in lines:
        words = shlex.split(line.replace("3f9a12c4", first.data_digest[:8]))[1:]
        code = cli.main([*words, "--dry-run"] if words[0] == "train" else words)
        assert code == (1 if words[1] == "diff" else 0), f"{line}: {capsys.readouterr().err}"
    assert open_dataset("data/imported").manifest.schema["vocab_size"] == 300
