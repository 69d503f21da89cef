"""`leyden data inspect` and `verify` on a real, small dataset, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist.dataset import Dataset
from launch import cli
from tests.make_dataset import write_dataset


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
