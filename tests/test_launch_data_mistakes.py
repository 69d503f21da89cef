"""`leyden data` given what it cannot mean, or damage: a message and its exit code, no traceback."""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dist.data_export import ORIGIN, export_dataset
from dist.dataset import Dataset, mix
from launch import cli
from tests.make_dataset import flip_byte, tokenizer_json, write_dataset
from tests.make_examples import write_examples

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
Capture = pytest.CaptureFixture[str]


def leyden(capsys: Capture, *words: object) -> tuple[int, str]:
    """Exit code and what was said as an error, its last line."""
    code = cli.main(["data", *map(str, words)])
    said = capsys.readouterr().err.strip().splitlines()
    return code, said[-1] if said else ""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data") / "corpus", vocab_size=290)


def test_a_mixture_is_verified_and_nothing_else(
    dataset: Dataset, tmp_path: Path, capsys: Capture
) -> None:
    """Sound shards told as missing, since they were looked for in the first dataset's folder; a
    pin that names no version; an origin and documents of no dataset."""
    other = write_dataset(tmp_path / "other", vocab_size=290, seed=1)
    mixed = mix(["a", "b"], [dataset, other]).reference
    assert leyden(capsys, "verify", mixed)[0] == 0
    assert leyden(capsys, "verify", mixed, "--presence")[0] == 0
    for words in (["inspect", mixed], ["pin", mixed], ["diff", mixed, dataset.reference],
                  ["export", mixed, "--to", "hf", tmp_path / "out"]):  # fmt: skip
        code, said = leyden(capsys, *words)
        assert code == 2 and f"a: {dataset.reference}, b: {other.reference}" in said, said
    assert leyden(capsys, "gc", mixed)[0] == 2
    path = other.shard_path(other.manifest.shards[0])
    flip_byte(path, 700)
    code, said = leyden(capsys, "verify", mixed)
    assert code == 3
    for broken in ("mix:[]@00", "mix:x@00", 'mix:[["a"]]@00'):
        code, said = leyden(capsys, "inspect", broken)
        assert code == 2 and "is not the reference of a mixture" in said


def test_what_is_in_the_way_is_named(dataset: Dataset, tmp_path: Path, capsys: Capture) -> None:
    """A temporary name that the person never gave; or a store's name made a folder of this disk."""
    here = tmp_path / "folder"
    (here / "x").mkdir(parents=True)
    url = dataset.storage.url
    (here / "file").write_text("mine")
    (tmp_path / "d.pin").mkdir()
    for words, wanted, names in (
        (["pin", url, "-o", tmp_path / "d.pin"], 4, f"in the way ({tmp_path / 'd.pin'})"),
        (["inspect", url, "--html", here], 4, f"in the way ({here})"),
        (["export", url, "--to", "hf", here / "file" / "out"], 2, f"{here / 'file'} is no folder"),
        (["export", url, "--to", "hf", "s3://bucket/out"], 2, "is a folder on a disk"),
        (["gc", tmp_path / "d.pin"], 2, "pass the one that"),
        (["gc", f"{url}@123456"], 2, "without the @ and digest"),
        (["inspect", f"{url}@123"], 2, "6 to 64 hex digits"),
        (["inspect", f"{url}@123456"], 2, "no version of"),
        (["inspect", url, "--samples", "-1"], 2, "--samples -1 must be 0 or more"),
        (["inspect", url, "--scan_rows", "0"], 2, "--scan_rows 0 at least 1"),
    ):
        code, said = leyden(capsys, *words)
        assert (code, names in said) == (wanted, True), said
    assert [one.name for one in sorted(here.iterdir())] == ["file", "x"]
    assert not list(Path.cwd().glob("s3*"))


def test_a_damaged_provenance_is_not_an_unknown_origin(tmp_path: Path, capsys: Capture) -> None:
    """An origin that reads as if nobody had kept it; what was removed of a derived version lost,
    and with it the run's order; a traceback for a byte in a file of another version."""
    dataset = write_dataset(tmp_path / "data")
    path = next((tmp_path / "data" / "provenance").iterdir())
    whole = path.read_text()
    for damaged in (whole[:-20], whole.replace("input-1", "input-7"), "[]", ""):
        path.write_text(damaged)
        code, said = leyden(capsys, "inspect", dataset.reference)
        assert code == 3 and f"provenance/{path.name} is damaged" in said, said
    path.write_text(whole)
    (path.parent / f"{'0' * 64}.json").write_text("{}")  # of a version that nobody asks for
    assert leyden(capsys, "inspect", dataset.reference)[0] == 0


def test_gc_of_a_folder_that_lost_its_manifests(tmp_path: Path, capsys: Capture) -> None:
    """Advice to name another folder, where this one's manifest has to be restored."""
    write_dataset(tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "manifests")
    for words in (["--dry-run"], []):
        code, said = leyden(capsys, "gc", tmp_path / "data", *words)
        assert code == 3 and "whose manifest is missing" in said
    (tmp_path / "data" / "lease.json").write_text("7")


def test_a_changed_export_is_not_imported(
    dataset: Dataset, tmp_path: Path, capsys: Capture
) -> None:
    """An export that was damaged on its way, of a format without digests: other tokens under a
    digest that vouches for them."""
    for to in ("megatron", "webdataset", "hf"):
        out = tmp_path / to
        export_dataset(dataset, to, out, progress=False)
        back = tmp_path / f"back-{to}"
        words = ["import", "--from", to, out, back, "--tokenizer", out]
        names = sorted(json.loads((out / ORIGIN).read_text())["files"])
        assert "tokenizer.json" in names
        for name in names:
            whole = (out / name).read_bytes()
            flip_byte(out / name, len(whole) // 2)
            code, said = leyden(capsys, *words)
            assert code == 3 and f"{out / name} has xxh3-128" in said, said
            assert not (back / "LATEST").exists()
            (out / name).write_bytes(whole)
        assert leyden(capsys, *words)[0] == 0


def tar_of(path: Path, member: bytes) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        info = tarfile.TarInfo("0.tokens.npy")
        info.size = len(member)
        tar.addfile(info, io.BytesIO(member))


def an_array() -> bytes:
    data = io.BytesIO()
    np.save(data, np.arange(20, 60))
    return data.getvalue()


def bad_parquet(root: Path) -> None:
    (root / "train.parquet").write_bytes(b"PAR1" + bytes(40) + b"\x10\0\0\0PAR1")


def bad_arrow(root: Path) -> None:
    table = pa.table({"tokens": [[20, 30], [40]]})
    with pa.ipc.new_stream(root / "train.arrow", table.schema) as out:
        out.write_table(table)
    data = bytearray((root / "train.arrow").read_bytes())
    data[8] ^= 0xFF
    (root / "train.arrow").write_bytes(data)


def bad_offsets(root: Path) -> None:
    """The second offset of a list points far out of its values: Arrow would abort."""
    table = pa.table({"tokens": [[20, 30], [40]]})
    with pa.ipc.new_file(root / "train.arrow", table.schema) as out:
        out.write_table(table)
    data = (root / "train.arrow").read_bytes()
    offsets = np.array([0, 2, 3], np.int32).tobytes()
    assert data.count(offsets) == 1
    data = data.replace(offsets, np.array([0, 8192, 3], np.int32).tobytes())
    (root / "train.arrow").write_bytes(data)


def bad_index(root: Path) -> None:
    shutil.copytree(GOLDEN / "mds" / "any", root, dirs_exist_ok=True)
    index = json.loads((root / "index.json").read_text())
    del index["shards"][0]["column_sizes"]
    (root / "index.json").write_text(json.dumps(index))


def cut_gzip(root: Path) -> None:
    tar_of(root / "train.tar.gz", an_array())
    data = bytearray((root / "train.tar.gz").read_bytes())
    data[-6] ^= 1  # its checksum
    (root / "train.tar.gz").write_bytes(data)


def bad_array(root: Path) -> None:
    tar_of(root / "train.tar", an_array().replace(b"(40,), }", b"(40, , }"))


def huge_array(root: Path) -> None:
    tar_of(root / "train.tar", an_array().replace(b"(40,), }          ", b"(4000000000000,), "))


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("hf", bad_parquet), ("hf", bad_arrow), ("hf", bad_offsets), ("mds", bad_index),
        ("webdataset", cut_gzip), ("webdataset", bad_array), ("webdataset", huge_array),
    ],
)  # fmt: skip
def test_damaged_sources_are_named(
    kind: str, make: Callable[[Path], None], tmp_path: Path, capsys: Capture
) -> None:
    """A library's own error, which names no file and looks like our bug."""
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    code, said = leyden(
        capsys, "import", "--from", kind, tmp_path / "in", tmp_path / "out", "--tokenizer",
        tmp_path,
    )  # fmt: skip
    assert code == 3 and str(tmp_path / "in") in said, said
    assert not (tmp_path / "out" / "LATEST").exists()


def test_any_damage_has_a_message_in_every_verb(tmp_path: Path) -> None:
    """A traceback, an end by a signal, or exit 0 over a damaged shard."""
    for kind, write in (("p", write_dataset), ("e", write_examples)):
        write(tmp_path / kind)
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.test_launch_data_mistakes import damage_and_ask\n"
        "damage_and_ask(Path(sys.argv[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"


def damage_and_ask(root: Path) -> None:
    """Damage a file of a dataset, ask every verb; in a process of its own."""
    rng = random.Random(5)
    for number in range(60):
        data, out = root / "work", root / "out"
        shutil.rmtree(data, ignore_errors=True)
        shutil.copytree(root / "pe"[number % 2], data)
        files = [path for path in sorted(data.rglob("*")) if path.is_file()]
        # Every second time a shard.
        shards = [path for path in files if path.parent.name == "shards"]
        path = rng.choice(shards if number % 4 < 2 else files)
        content = bytearray(path.read_bytes())
        how = rng.choice(["flip", "flip", "cut", "delete", "garbage"])
        if how == "flip":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif how == "cut":
            del content[rng.randrange(len(content)) :]
        else:
            content = bytearray(rng.randbytes(300))
        path.write_bytes(content)
        if how == "delete":
            path.unlink()
        is_shard = path in shards
        for words in (
            ["inspect", data, "--samples", 3, "--html", root / "page.html"], ["verify", data],
            ["inspect", data, "--scan_rows", 9, "--json"], ["diff", data, root / "pe"[number % 2]],
            ["verify", data, "--presence"], ["pin", data], ["gc", data, "--dry-run"],
            ["gc", data, "--older-than", "0s"], ["export", data, "--to", "megatron", out],
        ):  # fmt: skip
            shutil.rmtree(out, ignore_errors=True)
            what = f"{how} {path.name}: {words[0]}"
            done = cli.main(["data", *map(str, words)])
            assert done in ((0, 1, 2, 3) if words[0] in ("diff", "export") else (0, 2, 3)), what
            assert done != 2 or how == "delete" or words[0] == "export", what
            if is_shard and words[0] == "verify" and len(words) == 2:
                assert done == 3, what
            if is_shard and words[0] == "export":
                assert done != 0 and not out.exists(), what


def test_a_full_disk_is_named(
    dataset: Dataset, tmp_path: Path, small_disk: Callable[[str], Path], capsys: Capture
) -> None:
    """`No space left on device` and no name, or the name of the disk that has room (an import
    copies from its scratch); sizes that are told as 0.00 GB; half an export left."""
    disk, url = small_disk("60k"), dataset.storage.url
    code, said = leyden(capsys, "export", url, "--to", "webdataset", disk / "tars")
    assert code == 4 and f"kB and {disk} has 6" in said and "kB free" in said, said
    code, said = leyden(capsys, "export", url, "--to", "hf", disk / "hf")  # a guess lets it begin
    assert code == 4 and f"the disk of {disk} was full" in said, said
    assert list(disk.iterdir()) == []
    export_dataset(dataset, "megatron", tmp_path / "out", progress=False)
    (disk / "fill").write_bytes(bytes(40_000))
    words = ["--from", "megatron", tmp_path / "out", disk / "in", "--tokenizer", tmp_path / "out"]
    code, said = leyden(capsys, "import", *words, "--seq_len", "4000")
    assert code == 4 and f"-> {disk / 'in'}" in said and "make room" in said, said
    shutil.rmtree(disk / "in")
    (disk / "fill").unlink()
    with pytest.raises(OSError, match="No space"):
        (disk / "fill").write_bytes(bytes(80_000))
    for words in (["pin", url, "-o", disk / "x.pin"], ["inspect", url, "--html", disk / "x.html"]):
        code, said = leyden(capsys, *words)
        assert code == 4 and f"No space left on device ({words[-1]}); make room" in said, said
    assert [path.name for path in disk.iterdir()] == ["fill"]
