"""Import: which files are taken for source, what of them is refused, and what a kill leaves."""

from __future__ import annotations

import io
import json
import math
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist.commit import find_job
from dist.data_export import export_dataset
from dist.data_import import ImportPlan, import_tokens
from dist.dataset import Dataset, mix, open_dataset
from dist.errors import ConfigError, DataRefused
from dist.mds_format import find_mds
from dist.storage import Storage
from spark_jobs.job_record import already_done
from tests.make_dataset import tokenizer_json, write_dataset
from tests.test_dist_token_formats import GOLDEN


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer_json())
    return path


def plan_of(form: str, source: Path, tokenizer: Path, **more: Any) -> ImportPlan:
    output = str(more.pop("output", tokenizer.parent / "imported"))
    return ImportPlan(
        format=form, source=source, output=output, tokenizer=str(tokenizer), seq_len=8, **more
    )  # fmt: skip


def imported(plan: ImportPlan) -> Dataset:
    return open_dataset(f"{plan.output}@{import_tokens(plan, progress=False)[0]}")


def write_table(path: Path, documents: list[list[int]], **columns: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"input_ids": documents, **columns}), path)


def write_tar(path: Path, members: list[tuple[str, list[int]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, tokens in members:
            data = io.BytesIO()
            if name.endswith("json"):
                data.write(json.dumps({"tokens": tokens}).encode())
            else:
                np.save(data, np.array(tokens, np.int32))
            member = tarfile.TarInfo(name)
            member.size = data.tell()
            data.seek(0)
            tar.addfile(member, data)


def test_packed_rows_of_ours_are_no_documents(tmp_path: Path, tokenizer: Path) -> None:
    """Padding trained as tokens and validation as train: shards that lie in the source, as of an
    import into it, read as tables."""
    dataset = write_dataset(tmp_path / "many" / "own", vocab_size=290)
    with pytest.raises(ConfigError, match="is a dataset of Leyden.*export it first"):
        import_tokens(plan_of("hf", tmp_path / "many" / "own", tokenizer), progress=False)
    with pytest.raises(ConfigError, match="is a dataset of Leyden"):
        import_tokens(plan_of("hf", tmp_path / "many", tokenizer), progress=False)
    shard = dataset.shard_path(dataset.manifest.shards[0])
    with pytest.raises(DataRefused, match="is a shard of a Leyden dataset"):
        import_tokens(plan_of("hf", shard, tokenizer), progress=False)
    write_table(tmp_path / "src" / "train.parquet", [[1, 2, 3]])
    for output in (tmp_path / "src", tmp_path / "src" / "a" / "b"):
        with pytest.raises(ConfigError, match="lies in the source"):
            import_tokens(plan_of("hf", tmp_path / "src", tokenizer, output=output), progress=False)
    with pytest.raises(ConfigError, match="is no folder"):
        import_tokens(plan_of("hf", tmp_path / "src", tokenizer, output=tokenizer), progress=False)
    assert not (tmp_path / "imported" / "LATEST").exists()


def test_files_are_found_at_any_depth_and_hidden_ones_are_not(
    tmp_path: Path, tokenizer: Path
) -> None:
    """Data that is left out without a word; or an export that was killed, taken for source."""
    tars, tables, mds = (tmp_path / name for name in ("tars", "tables", "mds"))
    for number, where in enumerate(("a.tar", "x/b.tar", "x/y/z/c.tar")):
        write_tar(tars / where, [("k.npy", [number + 1])])
        write_table(tables / where.replace(".tar", ".parquet"), [[number + 1]])
        shutil.copytree(GOLDEN / "mds" / "nd", mds / where.replace(".tar", ""))
    for hidden in (".b.tar", ".tars.12.abc.tmp/train-000000.tar"):
        write_tar(tars / hidden, [("k.npy", [9])])
        write_table(tables / hidden.replace(".tar", ".parquet"), [[9]])
    for kind, source in (("webdataset", tars), ("hf", tables)):
        plan = plan_of(kind, source, tokenizer, output=tmp_path / kind)
        assert imported(plan).manifest.totals["train"]["tokens"] == 3
    shutil.copytree(GOLDEN / "mds" / "nd", mds / ".killed")
    assert len(find_mds(mds, "", "")) == 3 * len(find_mds(GOLDEN / "mds" / "nd", "", ""))
    none = tmp_path / "none" / "index.json"
    none.parent.mkdir()
    none.write_text(json.dumps({"version": 2, "shards": []}))
    with pytest.raises(DataRefused, match="holds no tokens of the split train"):
        import_tokens(plan_of("mds", none.parent, tokenizer), progress=False)


def test_links_are_followed_and_dead_ones_named(tmp_path: Path, tokenizer: Path) -> None:
    """A split that lies on another disk, left out without a word; or a file of a cache that was
    copied without what its links name."""
    src, far = tmp_path / "src", tmp_path / "far"
    src.mkdir()
    write_tar(far / "a.tar", [("k.npy", [1, 2])])
    write_table(far / "b.parquet", [[3]])
    (src / "train").symlink_to(far)
    (src / "round").symlink_to(src)
    write_tar(src / "val.tar", [("k.npy", [5])])
    for form, wanted in (("webdataset", {"train": 2, "validation": 1}), ("hf", {"train": 1})):
        totals = imported(plan_of(form, src, tokenizer, output=tmp_path / form)).manifest.totals
        assert {name: one["tokens"] for name, one in totals.items()} == wanted
    (src / "train-1.parquet").symlink_to(tmp_path / "gone")
    with pytest.raises(DataRefused, match=r"train-1\.parquet is missing"):
        import_tokens(plan_of("hf", src, tokenizer), progress=False)


def test_tables_beside_those_of_save_to_disk_are_read(tmp_path: Path, tokenizer: Path) -> None:
    """A split that vanishes as another one was written by save_to_disk."""
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    made.save_to_disk(str(tmp_path / "src" / "train"))
    write_table(tmp_path / "src" / "validation" / "x.parquet", [[4, 5, 6]])
    (tmp_path / "src" / "train" / "stale.arrow").write_bytes(b"")  # not of that dataset
    totals = imported(plan_of("hf", tmp_path / "src", tokenizer)).manifest.totals
    assert {name: one["tokens"] for name, one in totals.items()} == {"train": 3, "validation": 3}


def test_two_members_of_one_name_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    """The first of them lost without a word."""
    for number, second in enumerate(("a.npy", "a.NPY")):
        source = tmp_path / str(number) / "a.tar"
        write_tar(source, [("a.npy", [1, 2]), (second, [4]), ("b.npy", [7])])
        with pytest.raises(DataRefused, match="sample 'a' has two members .npy"):
            import_tokens(plan_of("webdataset", source, tokenizer), progress=False)


def test_an_empty_list_is_an_empty_document(tmp_path: Path, tokenizer: Path) -> None:
    """One sample without tokens that ends an import, where other formats count it."""
    write_tar(tmp_path / "a.tar", [("a.json", []), ("b.json", [7, 8])])
    found = imported(plan_of("webdataset", tmp_path / "a.tar", tokenizer))
    counters = (found.read_provenance() or {})["counters"]
    assert (counters["documents_in"], counters["filtered"], counters["tokens"]) == (2, 1, 2)


@pytest.mark.parametrize("name", ["assistant_masks", "loss_mask", "position_ids", "seq_lengths"])
def test_columns_that_change_the_meaning_are_not_passed_over(
    name: str, tmp_path: Path, tokenizer: Path
) -> None:
    """Prompts trained, or joined documents taken for one, as the column was not known."""
    write_table(tmp_path / "a.parquet", [[1, 2, 3]], **{name: [[0, 1, 1]]})
    with pytest.raises(ConfigError, match=f"the column {name}.*--kind packed_tokens"):
        import_tokens(plan_of("hf", tmp_path / "a.parquet", tokenizer), progress=False)
    plan = plan_of("hf", tmp_path / "a.parquet", tokenizer, kind="packed_tokens")
    assert imported(plan).manifest.totals["train"]["tokens"] == 3


def test_an_import_keeps_the_ends_of_what_was_exported(tmp_path: Path) -> None:
    """A dataset that cannot be mixed with what it was exported from: one document without the end
    token, and no end is known. Another tokenizer's are not taken."""
    dataset = write_dataset(tmp_path / "data", vocab_size=290)
    assert dataset.schema["eos_id"] is not None
    out = tmp_path / "out"
    export_dataset(dataset, "hf", out, progress=False)
    plan = plan_of("hf", out, out / "tokenizer.json", output=tmp_path / "imported")
    seq_len = dataset.schema["seq_len"]
    back = imported(ImportPlan(**{**vars(plan), "seq_len": seq_len}))
    assert back.schema["eos_id"] == dataset.schema["eos_id"]
    changed = {"eos_id": dataset.schema["eos_id"], "bos_id": dataset.schema["bos_id"]}
    assert {key: back.schema[key] for key in changed} == changed
    if back.schema["vocab_size"] == dataset.schema["vocab_size"]:
        mix(("a", "b"), (dataset, back))
    # Where documents are cut after another token, that one ends them.
    cut = ImportPlan(**{**vars(plan), "output": str(tmp_path / "cut"), "eos": "a"})
    assert imported(cut).schema["eos_id"] != dataset.schema["eos_id"]
    origin = json.loads((out / "origin.json").read_text())
    (out / "origin.json").write_text(json.dumps({**origin, "tokenizer_digest": "0" * 64}))
    other = ImportPlan(**{**vars(plan), "output": str(tmp_path / "other"), "seq_len": seq_len})
    assert imported(other).schema["eos_id"] is None


def test_a_kill_just_before_latest_blocks_nothing(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that is whole and has no LATEST: the same command fails for ever, and every verb
    says that there is no dataset."""
    write_table(tmp_path / "a.parquet", [[1, 2, 3]])
    plan = plan_of("hf", tmp_path / "a.parquet", tokenizer)
    write = Storage.write_atomic

    def dies(self: Storage, name: str, data: bytes) -> None:
        if name == "LATEST":
            raise KeyboardInterrupt
        write(self, name, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Storage, "write_atomic", dies)
        import_tokens(plan, progress=False)
    with pytest.raises(ConfigError, match="there is no LATEST"):
        open_dataset(plan.output)
    digest, before = import_tokens(plan, progress=False)
    assert before and open_dataset(plan.output).data_digest == digest
    storage = Storage(plan.output)
    (job,) = (Path(name).stem for name in storage.list("jobs"))
    storage.delete("LATEST")  # the same of a Spark job
    assert find_job(storage, job) == already_done(storage, job) == digest
    assert open_dataset(plan.output).data_digest == digest


@pytest.mark.parametrize("size", [math.nan, math.inf, 0.0, -1.0])
def test_a_shard_size_is_a_number_above_zero(size: float, tmp_path: Path, tokenizer: Path) -> None:
    """A traceback for --shard_size_mib nan."""
    with pytest.raises(ConfigError, match="shard_size_mib"):
        plan_of("hf", tmp_path, tokenizer, shard_size_mib=size)


def test_what_cannot_be_meant_is_named(tmp_path: Path, tokenizer: Path) -> None:
    """An option without effect; a message that says something else than what happened."""
    write_table(tmp_path / "a.parquet", [[1, 2, 3]])
    with pytest.raises(ConfigError, match="--max_length bounds examples"):
        import_tokens(
            plan_of("hf", tmp_path / "a.parquet", tokenizer, max_length=7), progress=False
        )
    with pytest.raises(DataRefused, match="all documents of .* were drawn to validation"):
        import_tokens(
            plan_of("hf", tmp_path / "a.parquet", tokenizer, validation_fraction=1 - 1e-9),
            progress=False,
        )
    write_table(tmp_path / "b.parquet", [[1, 2, 3]], labels=[[1, 2, 3]])
    with pytest.raises(DataRefused, match=r"b\.parquet: record 0 has 3 tokens"):
        import_tokens(
            plan_of("hf", tmp_path / "b.parquet", tokenizer, max_length=2), progress=False
        )


def test_an_export_to_a_link_fills_its_folder(tmp_path: Path) -> None:
    """Hours of writing, and then a folder that cannot take the place of a link."""
    dataset = write_dataset(tmp_path / "data", documents=20)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    for name, folder in (("link", "disk"), ("dangling", "new")):
        done = export_dataset(dataset, "megatron", tmp_path / name, progress=False)
        assert done.folder == tmp_path / folder and (done.folder / "train.bin").exists()
        assert export_dataset(dataset, "megatron", tmp_path / name, progress=False).already
