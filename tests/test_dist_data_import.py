"""Export and import: the same documents, committed once, refused where they cannot be right."""

from __future__ import annotations

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
import pyarrow.parquet as pq
import pytest

from dist.commit import target_lease
from dist.data_export import export_dataset
from dist.data_import import ImportPlan, import_tokens
from dist.dataset import Dataset, open_dataset
from dist.documents import read_documents
from dist.errors import ConfigError, DataRefused, SetupError
from dist.example_file import ExampleShard
from dist.megatron_format import MegatronWriter
from dist.storage import Storage
from dist.token_source import Block, cut_after
from dist.verify import verify_full
from tests.make_dataset import flip_byte, tokenizer_json, write_dataset
from tests.make_examples import write_examples
from tests.test_dist_token_formats import GOLDEN, MDS_DOCUMENTS, batch


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    # As many ids as the tokenizer of tests has tokens.
    return write_dataset(tmp_path_factory.mktemp("data") / "corpus", longest=60, vocab_size=290)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer.json of 300 tokens."""
    import tokenizers

    made = tokenizers.Tokenizer.from_str(tokenizer_json().decode())
    made.add_special_tokens([f"<|extra_{i}|>" for i in range(300 - made.get_vocab_size())])
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


def documents_of(dataset: Dataset, split: str) -> list[list[int]]:
    found = []
    for part in read_documents(dataset, split):
        ends = np.cumsum(part.lengths).tolist()
        found += [part.tokens[a:b].tolist() for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    return found


@pytest.mark.parametrize("kind", ["megatron", "webdataset", "hf"])
def test_a_round_trip_gives_the_same_documents(kind: str, dataset: Dataset, tmp_path: Path) -> None:
    """A document lost, torn, glued to its neighbour or put into another split."""
    out = tmp_path / "out" / kind
    done = export_dataset(dataset, kind, out, progress=False)
    assert not done.already and export_dataset(dataset, kind, out, progress=False).already
    plan = ImportPlan(
        format=kind, source=out, output=str(tmp_path / "back"), seq_len=23,
        tokenizer=str(out), shard_size_mib=0.002,
    )  # fmt: skip
    digest, before = import_tokens(plan, progress=False)
    assert not before
    back = open_dataset(f"{tmp_path / 'back'}@{digest}")
    assert verify_full(back, progress=False).shards > len(back.manifest.splits())
    assert back.manifest.tokenizer_digest == dataset.manifest.tokenizer_digest
    for split in dataset.manifest.splits():
        assert documents_of(back, split) == documents_of(dataset, split)
        assert back.manifest.totals[split]["tokens"] == dataset.manifest.totals[split]["tokens"]
        assert len(documents_of(back, split)) == back.manifest.totals[split]["documents"]
    record = back.read_provenance()
    assert record is not None and all("xxh3_128:" in one["stamp"] for one in record["inputs"])
    counters = record["counters"]
    assert counters["documents_in"] == counters["documents_out"] == sum(done.documents.values())


def test_a_rerun_skips_and_a_changed_source_does_not(tmp_path: Path, tokenizer: Path) -> None:
    """Work done twice; or an edited source that passes for the imported one."""
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "mds" / "any", source)
    plan = ImportPlan(format="mds", source=source, output=str(tmp_path / "out"),
                      tokenizer=str(tokenizer), seq_len=4)  # fmt: skip
    first, _ = import_tokens(plan, progress=False)
    assert import_tokens(plan, progress=False) == (first, True)
    dataset = open_dataset(str(tmp_path / "out"))
    assert documents_of(dataset, "train") == MDS_DOCUMENTS
    assert (dataset.manifest.schema["eos_id"], dataset.manifest.schema["bos_id"]) == (1, None)
    # A token of the last sample: same size, same name, another source.
    flip_byte(source / "shard.00000.mds", -16)
    second, before = import_tokens(plan, progress=False)
    assert second != first and not before


def test_equal_sources_in_other_folders_give_an_equal_digest(
    tmp_path: Path, tokenizer: Path
) -> None:
    """A digest that holds the folder or the clock."""
    digests = set()
    for name in ("a", "b"):
        shutil.copytree(GOLDEN / "megatron", tmp_path / name / "source")
        source, out = tmp_path / name / "source" / "u16", tmp_path / name / "out"
        plan = ImportPlan(format="megatron", source=source, seq_len=4, output=str(out),
                          tokenizer=str(tokenizer))  # fmt: skip
        digests.add(import_tokens(plan, progress=False)[0])
    assert len(digests) == 1


@pytest.mark.parametrize("bad", [-1, 300, 70_000])
def test_ids_out_of_the_vocabulary_are_refused(bad: int, tmp_path: Path, tokenizer: Path) -> None:
    """An id that wraps round in uint16: 65,836 would be trained on as 300."""
    writer = MegatronWriter(tmp_path / "train", 1 << 20)
    writer.add(batch([[5, 1], [6, 7, 8], [9, bad, 1]], "int64"))
    writer.close()
    plan = ImportPlan(format="megatron", source=tmp_path / "train", output=str(tmp_path / "out"),
                      tokenizer=str(tokenizer), seq_len=4)  # fmt: skip
    with pytest.raises(
        DataRefused, match=f"document 2 holds the id {bad}, the tokenizer has ids 0"
    ):
        import_tokens(plan, progress=False)
    assert Storage(plan.output).list("manifests") == []
    assert Storage(plan.output).list("") == [], "the lease is left behind"


def test_a_wrong_id_is_placed_in_the_whole_file(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document's number counted from its block: the person looks at another document."""
    monkeypatch.setattr("dist.megatron_format.BLOCK_TOKENS", 4)
    writer = MegatronWriter(tmp_path / "train", 1 << 20)
    writer.add(batch([[5, 1], [6, 7, 8], [9, 1], [4, 4], [3, 999, 1]], "int64"))
    writer.close()
    plan = ImportPlan(format="megatron", source=tmp_path / "train", output=str(tmp_path / "out"),
                      tokenizer=str(tokenizer), seq_len=4)  # fmt: skip
    with pytest.raises(DataRefused, match="document 4 holds the id 999"):
        import_tokens(plan, progress=False)


def test_offsets_count_from_the_file_not_its_blocks(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two documents of one file at one offset: who-saw names the wrong one, export glues them."""
    monkeypatch.setattr("dist.megatron_format.BLOCK_TOKENS", 4)
    documents = [[5, 1], [6, 7, 8], [9, 1], [4, 4], [3, 2, 1]]
    writer = MegatronWriter(tmp_path / "train", 1 << 20)
    writer.add(batch(documents, "int64"))
    writer.close()
    plan = ImportPlan(format="megatron", source=tmp_path / "train", output=str(tmp_path / "out"),
                      tokenizer=str(tokenizer), seq_len=4)  # fmt: skip
    import_tokens(plan, progress=False)
    found = list(read_documents(open_dataset(plan.output), "train"))
    offsets = np.concatenate([one.offsets for one in found]).tolist()
    assert offsets == np.cumsum([0, *(len(one) for one in documents)])[:-1].tolist()


def test_a_rerun_makes_its_version_the_newest(tmp_path: Path, tokenizer: Path) -> None:
    """An import that says it is done, and leaves LATEST at another import's version."""
    plans = []
    for number in (0, 1):
        (tmp_path / f"in-{number}").mkdir()
        writer = MegatronWriter(tmp_path / f"in-{number}" / "train", 1 << 20)
        writer.add(batch([[5 + number, 1], [6, 7, 8]], "int64"))
        writer.close()
        plans.append(
            ImportPlan(format="megatron", source=tmp_path / f"in-{number}" / "train", seq_len=4,
                       output=str(tmp_path / "out"), tokenizer=str(tokenizer))
        )  # fmt: skip
    first, second = (import_tokens(plan, progress=False)[0] for plan in plans)
    assert open_dataset(plans[0].output).data_digest == second != first
    assert import_tokens(plans[0], progress=False) == (first, True)
    assert open_dataset(plans[0].output).data_digest == first


def test_damage_in_the_last_file_publishes_nothing(tmp_path: Path, tokenizer: Path) -> None:
    """The first file's shards, visible as if they were the whole dataset."""
    for name in ("train-0", "train-1"):
        for end in ("bin", "idx"):
            shutil.copy(GOLDEN / "megatron" / f"u16.{end}", tmp_path / f"{name}.{end}")
    data = tmp_path / "train-1.bin"
    data.write_bytes(data.read_bytes()[:-2])
    plan = ImportPlan(format="megatron", source=tmp_path, output=str(tmp_path / "out"),
                      tokenizer=str(tokenizer), seq_len=1, shard_size_mib=1e-5)  # fmt: skip
    with pytest.raises(DataRefused, match="was cut off"):
        import_tokens(plan, progress=False)
    storage = Storage(plan.output)
    assert storage.list("shards") and not storage.list("manifests") and not storage.exists("LATEST")


def test_one_writer_at_a_time(tmp_path: Path, tokenizer: Path) -> None:
    """Two imports, or an import and a prep job, that commit over each other."""
    plan = ImportPlan(format="megatron", source=GOLDEN / "megatron" / "u16", seq_len=4,
                      output=str(tmp_path / "out"), tokenizer=str(tokenizer))  # fmt: skip
    with (
        target_lease(Storage(plan.output)),
        pytest.raises(SetupError, match="is in use by process"),
    ):
        import_tokens(plan, progress=False)
    import_tokens(plan, progress=False)


def test_joined_documents_are_cut_at_their_end_token() -> None:
    """A cut one token early or late, or at the end of a sample that has no end token."""
    block = Block(tokens=np.array([5, 1, 6, 7, 1, 1, 8, 9, 1]), lengths=np.array([7, 2]))
    assert cut_after(block, 1).tolist() == [2, 3, 1, 1, 2]


def test_held_out_documents_do_not_depend_on_the_order_of_reading(
    tmp_path: Path, tokenizer: Path
) -> None:
    """A validation split that is the first or the last part, or empty."""
    writer = MegatronWriter(tmp_path / "all", 300)
    writer.add(batch([[20 + i % 200, 30 + i % 250, 1] for i in range(600)]))
    writer.close()
    plan = ImportPlan(format="megatron", source=tmp_path / "all", output=str(tmp_path / "out"),
                      tokenizer=str(tokenizer), seq_len=8, validation_fraction=0.2)  # fmt: skip
    import_tokens(plan, progress=False)
    dataset = open_dataset(str(tmp_path / "out"))
    held = dataset.manifest.totals["validation"]["documents"]
    assert 80 < held < 160 and dataset.manifest.totals["train"]["documents"] == 600 - held
    offsets = [part.offsets for part in read_documents(dataset, "validation")]
    gaps = np.diff(np.concatenate(offsets)) // 3
    assert gaps.max() > 1 and len(set(gaps.tolist())) > 3


def test_an_export_never_takes_the_place_of_something_else(
    dataset: Dataset, tmp_path: Path
) -> None:
    """A user's folder overwritten, or an older export taken for this version's."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("only copy")
    with pytest.raises(ConfigError, match="holds something else"):
        export_dataset(dataset, "megatron", tmp_path / "mine", progress=False)
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]
    export_dataset(dataset, "megatron", tmp_path / "out", progress=False)
    with pytest.raises(ConfigError, match="holds something else"):
        export_dataset(dataset, "hf", tmp_path / "out", progress=False)
    (tmp_path / "out" / "train.bin").write_bytes(b"cut")
    with pytest.raises(ConfigError, match="holds something else"):
        export_dataset(dataset, "megatron", tmp_path / "out", progress=False)
    assert sorted(os.listdir(tmp_path)) == ["mine", "out"], "scratch is left behind"


def test_an_export_of_damaged_shards_is_refused(tmp_path: Path) -> None:
    """An export with fewer documents than the dataset, which nobody counts again."""
    dataset = write_dataset(tmp_path / "data")
    first, second = (dataset.shard_path(shard) for shard in dataset.manifest.shards[:2])
    first.write_bytes(second.read_bytes())
    with pytest.raises(DataRefused, match="the manifest says"):
        export_dataset(dataset, "megatron", tmp_path / "out", progress=False)
    assert sorted(os.listdir(tmp_path)) == ["data"]


def test_a_full_disk_leaves_nothing_half_published(
    tmp_path: Path, tokenizer: Path, small_disk: Callable[[str], Path]
) -> None:
    """A manifest over cut shards, or half an export under its final name."""
    disk = small_disk("1m")
    big = write_dataset(tmp_path / "big", seq_len=512, documents=800, longest=2000)
    with pytest.raises(SetupError, match=r"the export takes about .* free"):
        export_dataset(big, "megatron", disk / "out", progress=False)
    export_dataset(big, "megatron", tmp_path / "out", progress=False)
    plan = ImportPlan(format="megatron", source=tmp_path / "out", output=str(disk / "in"),
                      tokenizer=str(tokenizer), seq_len=512, shard_size_mib=0.3)  # fmt: skip
    with pytest.raises(OSError, match="No space left"):
        import_tokens(plan, progress=False)
    storage = Storage(plan.output)
    assert not storage.list("manifests") and not storage.exists("LATEST")


def test_an_import_killed_at_any_moment_goes_on(tmp_path: Path, tokenizer: Path) -> None:
    """A killed import that leaves a version behind which is not whole, or a lease for ever."""
    writer = MegatronWriter(tmp_path / "train", 300)
    chance = np.random.default_rng(0)
    writer.add(batch([[*chance.integers(3, 300, 40).tolist(), 1] for _ in range(4000)]))
    writer.close()
    output = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path\n"
        "from dist.data_import import ImportPlan, import_tokens\n"
        "source, output, tokenizer = sys.argv[1:]\n"
        "plan = ImportPlan(format='megatron', source=Path(source), output=output, seq_len=31,\n"
        "                  tokenizer=tokenizer, shard_size_mib=0.005)\n"
        "print('go', flush=True)\n"
        "print(import_tokens(plan, progress=False)[0])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "train"), str(output), str(tokenizer)]
    root = Path(__file__).resolve().parent.parent
    for delay_s in (0.05, 0.15, 0.4):
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "go\n"
        time.sleep(delay_s)  # where it is killed; any place will do
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (output / "LATEST").exists():
            verify_full(open_dataset(str(output)), progress=False)
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(str(output))
    verify_full(dataset, progress=False)
    assert done.stdout.split()[-1] == dataset.data_digest
    assert dataset.manifest.totals["train"]["documents"] == 4000
    assert json.loads((output / "manifests" / f"{dataset.data_digest}.json").read_text())


def test_examples_keep_their_masks_in_an_export(tmp_path: Path) -> None:
    """Chats exported with every token trained, or a mask moved to a neighbour's tokens; or to a
    format that drops the masks in silence."""
    dataset = write_examples(tmp_path / "data", num_examples=21)
    done = export_dataset(dataset, "hf", tmp_path / "out", progress=False)
    assert done.documents == {"train": 42, "validation": 21}
    for split in dataset.manifest.splits():
        table = pq.read_table(tmp_path / "out" / "data" / f"{split}-00000-of-00001.parquet")
        rows = iter(table.to_pylist())
        for entry in dataset.manifest.shards_of(split):
            shard = ExampleShard(dataset.shard_path(entry))
            for number in range(shard.num_rows):
                one, row = shard.read(number), next(rows)
                labels = np.full(len(one.tokens), -100)
                for start, stop in one.spans.tolist():
                    labels[start:stop] = one.tokens[start:stop]
                assert row == {
                    "input_ids": one.tokens.tolist(), "labels": labels.tolist(),
                    "source": f"input-{one.input}", "offset": one.offset,
                }  # fmt: skip
        assert next(rows, None) is None
    for to in ("megatron", "webdataset"):
        with pytest.raises(ConfigError, match="no place for what of them is trained"):
            export_dataset(dataset, to, tmp_path / to, progress=False)
