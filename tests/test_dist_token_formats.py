"""Foreign formats against bytes that the real libraries wrote, and against the libraries.

tests/golden/megatron was written by megatron-core 0.16.1 (IndexedDatasetBuilder), tests/golden/mds
by mosaicml-streaming 0.13.0 (MDSWriter), both from DOCUMENTS.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist.documents import Documents
from dist.errors import ConfigError, DataRefused
from dist.mds_format import find_mds
from dist.megatron_format import MegatronWriter, find_megatron
from dist.table_format import ParquetTokensWriter, find_tables
from dist.tar_format import TarTokensWriter, find_tars
from dist.token_source import SourceFile

GOLDEN = Path(__file__).resolve().parent / "golden"
DOCUMENTS = [[17, 18, 19, 1], [20, 1], [299, 16, 1], [5] * 9 + [1]]
MDS_DOCUMENTS = [*DOCUMENTS, [7, 1], [8, 9, 1]]


def read(files: Iterable[SourceFile]) -> list[list[int]]:
    """All documents of files, in order."""
    found = []
    for file in files:
        for block in file.read():
            ends = np.cumsum(block.lengths).tolist()
            starts = [0, *ends[:-1]]
            found += [block.tokens[a:b].tolist() for a, b in zip(starts, ends, strict=True)]
    return found


def batch(documents: list[list[int]], dtype: str = "uint16") -> Documents:
    count = len(documents)
    return Documents(
        tokens=np.array(sum(documents, []), dtype),
        lengths=np.array([len(one) for one in documents], np.int64),
        inputs=np.zeros(count, np.int64),
        offsets=np.arange(count, dtype=np.int64),
    )


@pytest.mark.parametrize(("name", "vocab_size"), [("u16", 300), ("i32", 70_000)])
def test_our_megatron_files_are_theirs_byte_for_byte(
    name: str, vocab_size: int, tmp_path: Path
) -> None:
    """A layout that only our own reader reads."""
    writer = MegatronWriter(tmp_path / name, vocab_size)
    writer.add(batch(DOCUMENTS[:1], "uint32"))
    writer.add(batch(DOCUMENTS[1:], "uint32"))
    writer.close()
    for end in ("bin", "idx"):
        theirs = (GOLDEN / "megatron" / f"{name}.{end}").read_bytes()
        assert (tmp_path / f"{name}.{end}").read_bytes() == theirs


def test_their_megatron_files_are_read() -> None:
    """Sequences taken for documents: `two` holds a document of two sequences."""
    folder = GOLDEN / "megatron"
    assert read(find_megatron(folder / "u16")) == DOCUMENTS
    assert read(find_megatron(folder / "i32.bin")) == DOCUMENTS
    assert read(find_megatron(folder / "two.idx")) == [[17, 18, 19, 1, 20, 21], [22, 1]]


def test_megatron_reads_our_files(tmp_path: Path) -> None:
    """The real reader, where it is installed."""
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    writer = MegatronWriter(tmp_path / "train", 300)
    writer.add(batch(DOCUMENTS))
    writer.close()
    theirs = indexed.IndexedDataset(str(tmp_path / "train"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("magic", "does not begin with"),
        ("version", "version 2"),
        ("float", "dtype code 6"),
        ("short_idx", "121 bytes where 4 sequences and 5 document entries need 122"),
        ("short_bin", r"has 37 bytes where its index needs 38"),
        ("gap", "do not stand one after the other"),
        ("documents", "does not rise from 0 to 4"),
    ],
)
def test_damaged_megatron_files_are_refused(damage: str, said: str, tmp_path: Path) -> None:
    """Tokens read from wrong places and trained on."""
    for end in ("bin", "idx"):
        shutil.copy(GOLDEN / "megatron" / f"u16.{end}", tmp_path / f"train.{end}")
    idx, data = tmp_path / "train.idx", tmp_path / "train.bin"
    raw = bytearray(idx.read_bytes())
    if damage == "magic":
        raw[0] = 0
    elif damage == "version":
        raw[9] = 2
    elif damage == "float":
        raw[17] = 6
    elif damage == "short_idx":
        raw.pop()
    elif damage == "gap":
        raw[34 + 16 + 8] += 2
    elif damage == "documents":
        raw[-8] = 3
    else:
        data.write_bytes(data.read_bytes()[:-1])
    idx.write_bytes(bytes(raw))
    with pytest.raises(DataRefused, match=said):
        read(find_megatron(tmp_path))


def test_their_mds_shards_are_read() -> None:
    """A fixed shape, a dynamic one, plain bytes, compression, and a shard without samples."""
    folder = GOLDEN / "mds"
    assert read(find_mds(folder / "nd", "", "")) == MDS_DOCUMENTS
    assert read(find_mds(folder / "any", "", "")) == MDS_DOCUMENTS
    assert read(find_mds(folder / "fixed", "", "")) == [(one * 4)[:4] for one in MDS_DOCUMENTS]
    assert read(find_mds(folder / "bytes", "", "int64")) == MDS_DOCUMENTS
    with pytest.raises(ConfigError, match="--bytes_dtype"):
        read(find_mds(folder / "bytes", "", ""))
    with pytest.raises(DataRefused, match="leyden prep"):
        read(find_mds(folder / "text", "", ""))
    with pytest.raises(ConfigError, match="no column ids"):
        read(find_mds(folder / "nd", "ids", ""))


def test_damaged_mds_shards_are_refused(tmp_path: Path) -> None:
    """A flipped byte under a hash, a cut file, and a missing one."""
    shutil.copytree(GOLDEN / "mds" / "nd", tmp_path / "nd")
    path = tmp_path / "nd" / "shard.00003.mds"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(DataRefused, match=r"shard.00003.mds is damaged: its xxh3_64"):
        read(find_mds(tmp_path / "nd", "", ""))
    path.write_bytes(whole[:-3])
    with pytest.raises(DataRefused, match="cut off"):
        read(find_mds(tmp_path / "nd", "", ""))
    path.unlink()
    with pytest.raises(DataRefused, match="is missing"):
        read(find_mds(tmp_path / "nd", "", ""))
    index = tmp_path / "nd" / "index.json"
    index.write_text(index.read_text().replace("shard.00000.mds", "../shard.00000.mds"))
    with pytest.raises(DataRefused, match="outside"):
        read(find_mds(tmp_path / "nd", "", ""))


def test_tables_of_every_kind_are_read(tmp_path: Path) -> None:
    """Lists of another width or a chunked column, read as other tokens."""
    ids = pa.array(DOCUMENTS, pa.list_(pa.int64()))
    pq.write_table(pa.table({"input_ids": ids}), tmp_path / "train-0.parquet", row_group_size=2)
    wide = pa.array(DOCUMENTS, pa.large_list(pa.uint16()))
    with pa.ipc.new_file(
        str(tmp_path / "train-1.arrow"), pa.schema([("tokens", wide.type)])
    ) as out:
        out.write_batch(pa.record_batch([wide.slice(1)], names=["tokens"]))
    fixed = pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2))
    pq.write_table(pa.table({"mine": fixed}), tmp_path / "other.pq")
    files = find_tables(tmp_path / "train-0.parquet", "") + find_tables(
        tmp_path / "train-1.arrow", ""
    )
    assert read(files) == DOCUMENTS + DOCUMENTS[1:]
    assert read(find_tables(tmp_path / "other.pq", "mine")) == [[1, 2], [3, 4]]
    with pytest.raises(ConfigError, match=r"it has mine .*--column"):
        read(find_tables(tmp_path / "other.pq", ""))
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "other.pq").read_bytes()[:-9])
    with pytest.raises(DataRefused, match="damaged"):
        read(find_tables(tmp_path / "cut.parquet", ""))


def test_text_and_nulls_in_tables_are_refused(tmp_path: Path) -> None:
    """Text without a word on what turns it into tokens; a null read as a token 0."""
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "text.parquet")
    with pytest.raises(DataRefused, match="leyden prep tokenize-text"):
        read(find_tables(tmp_path / "text.parquet", ""))
    nulls = pa.array([[1, None]], pa.list_(pa.int32()))
    pq.write_table(pa.table({"tokens": nulls}), tmp_path / "null.parquet")
    with pytest.raises(DataRefused, match="null"):
        read(find_tables(tmp_path / "null.parquet", ""))
    pq.write_table(pa.table({"tokens": [[0.5]]}), tmp_path / "float.parquet")
    with pytest.raises(DataRefused, match="not a list of integers"):
        read(find_tables(tmp_path / "float.parquet", ""))


def test_hugging_face_reads_ours_and_we_read_theirs(tmp_path: Path) -> None:
    """A Parquet file, or a folder of save_to_disk, that only one side opens."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "ours" / "data").mkdir(parents=True)
    path = tmp_path / "ours" / "data" / "train-00000-of-00001.parquet"
    writer = ParquetTokensWriter(path, ["a.txt"])
    writer.add(batch(DOCUMENTS[:2]))
    writer.add(batch(DOCUMENTS[2:]))
    writer.close()
    cache = str(tmp_path / "cache")
    theirs = datasets.load_dataset(str(tmp_path / "ours"), split="train", cache_dir=cache)
    assert theirs["input_ids"][:] == DOCUMENTS
    assert set(theirs["source"]) == {"a.txt"}
    both = datasets.DatasetDict({"train": theirs, "validation": theirs.select([1])})
    both.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 2, "validation": 1})
    files = find_tables(tmp_path / "saved", "")
    assert [file.split for file in files] == ["train", "train", "validation"]
    assert read(files) == [*DOCUMENTS, DOCUMENTS[1]]


def test_tars_are_read_and_written_as_webdataset_does(tmp_path: Path) -> None:
    """Members that the real library would not group or decode."""
    writer = TarTokensWriter(tmp_path / "train", ["a.txt"])
    writer.add(batch(DOCUMENTS))
    writer.close()
    path = tmp_path / "train-000000.tar"
    assert read(find_tars(tmp_path, "")) == DOCUMENTS
    with tarfile.open(path) as tar:
        assert tar.getnames()[:3] == [
            "000000000.tokens.npy",
            "000000000.json",
            "000000001.tokens.npy",
        ]
    webdataset = pytest.importorskip("webdataset", reason="the extra dev installs it")
    theirs = webdataset.WebDataset(str(path), shardshuffle=False).decode()
    assert [sample["tokens.npy"].tolist() for sample in theirs] == DOCUMENTS
    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as out:
        for number, one in enumerate(DOCUMENTS):
            out.write({"__key__": f"s{number}", "json": {"input_ids": one}})
    assert read(find_tars(tmp_path / "theirs.tar", "")) == DOCUMENTS


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_bad_tars_are_refused(tmp_path: Path) -> None:
    """A tar cut between members reads as a shorter one; an array of objects would be unpickled."""
    ids = json.dumps({"tokens": [1, 2]}).encode()
    write_tar(tmp_path / "a.tar", {f"{n}.json": ids for n in range(30)})
    assert read(find_tars(tmp_path / "a.tar", "")) == [[1, 2]] * 30
    whole = (tmp_path / "a.tar").read_bytes()
    for size in (1024 * 10, 1024 * 10 + 512, 1024 * 10 + 17):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        with pytest.raises(DataRefused, match="cut off"):
            read(find_tars(tmp_path / "a.tar", ""))
    objects = io.BytesIO()
    np.save(objects, np.array([{}], object), allow_pickle=True)
    for members, said in (
        ({"0.tokens.npy": objects.getvalue()}, "allow_pickle|Object arrays"),
        ({"0.txt": b"hello"}, "leyden prep"),
        ({"0.json": b'{"tokens": [[1], [2]]}'}, "no list of tokens"),
        ({"0.json": b'{"tokens": [0.5]}'}, "no list of tokens"),
    ):
        write_tar(tmp_path / "b.tar", members)
        with pytest.raises(DataRefused, match=said):
            read(find_tars(tmp_path / "b.tar", ""))
