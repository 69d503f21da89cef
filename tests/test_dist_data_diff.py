"""diff and pin: what two versions share, and files that name one."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist.commit import commit_dataset
from dist.data_diff import diff_datasets
from dist.data_import import ImportPlan, import_tokens
from dist.data_pin import pin_record, pin_url, read_pin, write_pin
from dist.dataset import Dataset, open_dataset
from dist.errors import ConfigError, DataRefused
from dist.megatron_format import MegatronWriter
from tests.make_dataset import tokenizer_json, write_dataset
from tests.make_examples import write_examples
from tests.test_dist_token_formats import batch


def test_equal_versions_are_equal_wherever_they_lie(tmp_path: Path) -> None:
    """A difference that is only the folder's name."""
    a, b = write_dataset(tmp_path / "a"), write_dataset(tmp_path / "b")
    found = diff_datasets(a, b, progress=False)
    assert found.equal and found.shared == 4 and not found.added and not found.config


def imported(folder: Path, files: dict[str, list[list[int]]], **options: object) -> Dataset:
    """A dataset imported from Megatron files of these documents."""
    (folder / "source").mkdir(parents=True)
    for name, documents in files.items():
        writer = MegatronWriter(folder / "source" / name, 290)
        writer.add(batch(documents))
        writer.close()
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    plan = ImportPlan(
        format="megatron", source=folder / "source", output=str(folder / "out"),
        tokenizer=str(folder), **{"seq_len": 3, **options},  # type: ignore[arg-type]
    )  # fmt: skip
    import_tokens(plan, progress=False)
    return open_dataset(str(folder / "out"))


def test_documents_inputs_and_config_are_told_apart(tmp_path: Path) -> None:
    """Shards counted as different data though every document is the same, or the reverse."""
    one, two, three = [[20, 1]] * 6, [[30, 31, 1]] * 4, [[40, 1]] * 5
    a = imported(tmp_path / "a", {"one": one, "two": two})
    b = imported(tmp_path / "b", {"one": one, "three": three})
    found = diff_datasets(a, b, progress=False)
    assert not found.equal
    assert found.inputs == {"added": ["three.bin"], "gone": ["two.bin"]}
    assert found.documents["only_a"] == 4 and found.documents["only_b"] == 5
    assert found.documents["listed_a"] == [f"train two.bin@{3 * i}" for i in range(4)]
    assert found.totals["train"]["documents"] == (10, 11)
    assert "seq_len" not in found.config and not found.identity
    # Other rows of the same documents.
    c = imported(tmp_path / "c", {"one": one, "two": two}, seq_len=7)
    found = diff_datasets(a, c, progress=False)
    assert (found.documents["only_a"], found.documents["only_b"]) == (0, 0)
    assert found.config["seq_len"] == (3, 7) and found.identity["schema.seq_len"] == (3, 7)
    assert not found.inputs and found.shared == 0


def test_shared_shards_of_other_inputs_are_other_documents(tmp_path: Path) -> None:
    """Shards that both have, left out though their numbers mean other files; and an input of the
    same name and size whose bytes changed."""
    first = write_dataset(tmp_path / "data")
    inputs = [{"path": f"input-{i}", "size": 10, "stamp": f"xxh3_128:{i}"} for i in range(5)]
    totals = {name: dict(counts) for name, counts in first.manifest.totals.items()}
    totals["train"]["rows"] -= first.manifest.shards[0].rows

    def version(number: int, listed: list[dict[str, Any]]) -> Dataset:
        changes: dict[str, Any] = {"schema": {**first.manifest.schema, "bos_id": 0}}
        if number:
            changes = {"shards": first.manifest.shards[1:], "totals": totals}
        manifest = replace(first.manifest, **changes)
        made = commit_dataset(first.storage, manifest, {"inputs": listed}, f"{number:064x}")
        return open_dataset(f"{first.storage.url}@{made}")

    one = version(0, inputs)
    same = diff_datasets(one, version(1, inputs), progress=False)
    assert same.shared == 3 and not same.inputs
    assert (same.documents["only_a"], same.documents["only_b"]) == (0, 0)
    other = [{**inputs[0], "stamp": "xxh3_128:9"}, {**inputs[1], "path": "renamed"}, *inputs[2:]]
    (tmp_path / "data" / "provenance").rename(tmp_path / "kept")
    one, two = version(0, inputs), version(1, other)
    found = diff_datasets(one, two, progress=False)
    assert found.inputs == {"added": ["renamed"], "gone": ["input-1"], "changed": ["input-0"]}
    # One offset an input, in each of the two splits.
    assert found.documents["listed_a"] == ["train input-1@100", "validation input-1@100"]
    assert found.documents["listed_b"] == ["train renamed@100", "validation renamed@100"]


def test_a_document_that_reaches_into_a_shared_shard_is_in_both(tmp_path: Path) -> None:
    """A document called new because its other half lies in a shard that both have."""
    a = imported(tmp_path / "a", {"one": [[20, 1], list(range(30, 41)), [9, 9, 9, 9]]},
                 shard_size_mib=2 * 2 * 4 / 2**20)  # fmt: skip
    assert len(a.manifest.shards) > 2
    shards = a.manifest.shards[:1]
    rows = sum(shard.rows for shard in shards)
    totals = {"train": {"rows": rows, "documents": 2, "tokens": 4 * rows, "targets": 5}}
    part = type(a.manifest)(
        kind=a.manifest.kind, schema=a.manifest.schema, shards=shards, totals=totals,
        tokenizer_digest=a.manifest.tokenizer_digest,
    )  # fmt: skip
    digest = commit_dataset(a.storage, part, dict(a.read_provenance() or {}), "5" * 64)
    b = open_dataset(f"{a.storage.url}@{digest}")
    found = diff_datasets(a, b, progress=False)
    assert found.shared == 1 and len(found.gone) == len(a.manifest.shards) - 1
    assert found.documents["listed_a"] == ["train one.bin@13"]
    assert found.documents["only_b"] == 0


def test_a_pin_binds_a_version(tmp_path: Path) -> None:
    """A pin that follows LATEST, or that Git shows as changed though nothing changed."""
    first = write_dataset(tmp_path / "data")
    path = tmp_path / "config" / "corpus.pin"
    write_pin(path, pin_record(first, first.storage.url))
    second = write_dataset(tmp_path / "data", seed=1)
    # PIN@DIGEST is what `data replay --data PIN` asks for: the run's own version.
    assert open_dataset(f"{path}@{first.data_digest[:9]}").data_digest == first.data_digest
    with pytest.raises(ConfigError, match="pins the version"):
        open_dataset(f"{path}@{second.data_digest}")
    pinned = open_dataset(str(path))
    assert pinned.data_digest == first.data_digest
    before = path.read_bytes()
    write_pin(path, pin_record(pinned, first.storage.url))
    assert path.read_bytes() == before
    record = json.loads(before)
    assert record["bytes"] == sum(shard.bytes for shard in first.manifest.shards)
    assert record["totals"] == first.manifest.totals


def test_a_relative_pin_moves_with_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository with data and pin that only works where it was made."""
    monkeypatch.chdir(tmp_path)
    dataset = write_dataset("repo/data")
    url = pin_url(dataset, "repo/data", Path("repo/pins"))
    assert url == "../data"
    write_pin(Path("repo/pins/corpus.pin"), pin_record(dataset, url))
    assert pin_url(dataset, str(tmp_path / "repo/data"), Path("repo")) == dataset.storage.url
    Path("repo").rename("moved")
    monkeypatch.chdir("/")
    found = open_dataset(str(tmp_path / "moved" / "pins" / "corpus.pin"))
    assert found.data_digest == dataset.data_digest


def test_pins_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    """Another file taken for a pin; data that moved, refused without a way out."""
    dataset = write_dataset(tmp_path / "data")
    path = tmp_path / "corpus.pin"
    with pytest.raises(ConfigError, match="there is no pin file"):
        open_dataset(str(path))
    record = pin_record(dataset, str(tmp_path / "data"))
    with pytest.raises(ConfigError, match=r"let it end in \.pin"):
        write_pin(tmp_path / "corpus.txt", record)
    for bad, said in (
        ("{", "is not JSON"),
        ("[]", "not a pin"),
        (json.dumps({**record, "leyden_pin": 2}), "version 2"),
        (json.dumps({**record, "more": 1}), "not a pin"),
        (json.dumps({**record, "data_digest": "ab"}), "data_digest"),
    ):
        path.write_text(bad)
        with pytest.raises(DataRefused, match=said):
            read_pin(path)
    write_pin(path, record)
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=f"--data.url PLACE@{dataset.data_digest[:12]}"):
        open_dataset(str(path))
    moved = f"{tmp_path / 'elsewhere'}@{dataset.data_digest[:12]}"
    assert open_dataset(moved).data_digest == dataset.data_digest
    # Another dataset in its place is not what was pinned.
    write_dataset(tmp_path / "data", seed=3)
    with pytest.raises(DataRefused, match="is missing"):
        open_dataset(str(path))


def test_git_tracks_a_pin(tmp_path: Path) -> None:
    """A pin whose diff of two versions does not show which data changed."""
    write_dataset(tmp_path / "data")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "init", "-q"], check=True)
    for seed in (0, 1):
        dataset = write_dataset(tmp_path / "data", seed=seed)
        write_pin(tmp_path / "corpus.pin", pin_record(dataset, "data"))
        subprocess.run([*git, "add", "corpus.pin"], check=True)
        subprocess.run([*git, "commit", "-qm", "pin"], check=True)
    shown = subprocess.run([*git, "diff", "HEAD~"], capture_output=True, text=True).stdout
    changed = [line for line in shown.splitlines() if line.startswith("+ ")]
    assert any('"data_digest"' in line for line in changed) and len(changed) < 12


def test_examples_are_compared_by_their_origin(tmp_path: Path) -> None:
    """Chats that were left out of a version, and a diff that says it cannot know."""
    first = write_examples(tmp_path / "a", num_examples=10)
    second = write_examples(tmp_path / "b", num_examples=9)
    found = diff_datasets(first, second, progress=False)
    # Three shards of ten and of nine: numbers 0 to 29 and 0 to 26, by their splits.
    documents = found.documents
    assert (documents["only_a"], documents["only_b"]) == (5, 2)
    assert documents["listed_b"] == [
        "validation input-0@1800", "validation input-1@1900",
    ]  # fmt: skip
    assert f"train input-{18 % 3}@1800" in documents["listed_a"]
