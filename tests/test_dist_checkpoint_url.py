"""Checkpoints on object stores: the promises of a local folder, kept in memory and on a real S3."""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
import torch

from dist.checkpoint import SaveFailed, read_record, save_checkpoint
from dist.checkpoint_folder import (
    COMMIT,
    check_files,
    checkpoint_name,
    find_checkpoint,
    newer_than,
    remove_leftovers,
    retire,
    saved_steps,
)
from dist.checkpoint_url import UrlReader
from dist.dataset import Dataset
from dist.errors import ConfigError, LeydenError, SetupError
from dist.folder_files import files_of
from dist.run_dir import RunDir
from dist.start import check_place
from dist.storage import Storage
from dist.url_path import Place, UrlPath, place_of
from tests.make_dataset import write_dataset
from tests.run_ranks import run_ranks
from tests.s3_server import watched_puts
from tests.test_dist_checkpoint import load, train_and_save
from tests.test_dist_checkpoint_faults import check_contents, make, train
from tests.test_dist_lightning_plugins import lines, pretrain


@pytest.fixture(params=["memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[UrlPath]:
    """An empty folder of each store."""
    if request.param == "memory":
        yield UrlPath(f"memory://{tmp_path.name}/checkpoints")
        fsspec.filesystem("memory").store.clear()
    else:
        request.getfixturevalue("s3_server")
        yield UrlPath(f"s3://leyden/{tmp_path.name}/checkpoints")


def objects(folder: Place) -> tuple[Any, list[str]]:
    fs, path = fsspec.core.url_to_fs(str(folder))
    fs.invalidate_cache()
    return fs, sorted(fs.find(path))


def test_saves_retires_and_goes_on(root: UrlPath) -> None:
    """Saving over an object, retiring the wrong one, or losing a leftover: as on a disk."""
    assert find_checkpoint(root) == (None, [])
    assert train(root, 0, range(1, 6), lambda step: None) == []
    # The best (step 2), and the newest two.
    assert saved_steps(root) == [2, 4, 5]
    found, passed_over = find_checkpoint(root)
    assert found == root / "step-5-a0" and passed_over == []
    assert read_record(found) == {"step": 5}
    check_contents(found, 5)
    assert find_checkpoint(root, step=4)[0] == root / "step-4-a0"
    # A dead attempt's half-written save goes; this attempt's does not.
    for attempt in (0, 1):
        fsspec.open(f"{root}/step-6-a{attempt}/__0_0.distcp", "wb").open().close()
        fs, path = fsspec.core.url_to_fs(f"{root}/step-6-a{attempt}/__0_0.distcp")
        fs.pipe_file(path, b"half")
    assert remove_leftovers(root, 1) == ["step-6-a0"]
    assert newer_than(root, root / "step-5-a0", 2) == {"step-6-a1"}
    assert retire(root, 1) == ["step-4-a0", "step-2-a0"]
    assert find_checkpoint(root) == (
        root / "step-5-a0",
        ["step-6-a1: no COMMIT.json, so it was never finished"],
    )


def test_nothing_is_overwritten(root: UrlPath) -> None:
    """Object stores replace in silence what a file system would refuse."""
    model, optimizer = make(1)
    save_checkpoint(root / "step-1-a0", model, optimizer, {"step": 1})
    with pytest.raises(SaveFailed, match="File exists"):
        save_checkpoint(root / "step-1-a0", *make(2), {"step": 2})
    check_contents(root / "step-1-a0", 1)
    assert check_files(root / "step-1-a0") == ""
    files = files_of(root / "step-1-a0")
    commit = files.read(COMMIT)
    files.publish(COMMIT, commit)  # a repeated PUT of a lost answer
    with pytest.raises(FileExistsError):
        files.publish(COMMIT, commit[:-1])
    assert files.read(COMMIT) == commit


def test_every_damage_is_found(root: UrlPath) -> None:
    """Damage that goes unseen is trained on, and a damaged .metadata is a pickle."""
    train(root, 0, range(1, 3), lambda step: None)
    draw, trials = random.Random(0), 0
    fs, paths = objects(root / "step-2-a0")
    assert len(paths) == 4
    for path in paths:
        good = fs.cat_file(path)
        for damage in ["flip"] * 5 + ["truncate"] * 2 + ["delete"]:
            data = bytearray(good)
            if damage == "flip":
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            if damage == "delete":
                fs.rm_file(path)
            else:
                fs.pipe_file(path, bytes(data) if damage == "flip" else good[: draw.randrange(9)])
            found, passed_over = find_checkpoint(root)
            assert found == root / "step-1-a0", (damage, path)
            assert len(passed_over) == 1 and passed_over[0].startswith("step-2-a0: ")
            trials += 1
        fs.pipe_file(path, good)
    assert find_checkpoint(root) == (root / "step-2-a0", [])
    print(f"{trials} damages, all found")


def test_commit_is_the_last_of_the_puts(s3_server: str, tmp_path: Path) -> None:
    """A commit before its files, a rename by copy, a commit in parts: each is another request."""
    folder = UrlPath(f"s3://leyden/{tmp_path.name}/step-1-a0")
    with watched_puts(lambda number, path: False) as seen:
        save_checkpoint(folder, *make(1), {"step": 1})
    names = [path.rpartition("/")[2] for path in seen]
    assert sorted(names[:-1]) == [".metadata", "__0_0.distcp", "state.json"]
    assert names[-1] == COMMIT


@pytest.mark.parametrize("refused", [1, 2, 3, 4])
def test_any_refused_put_costs_that_save_only(
    s3_server: str,
    tmp_path: Path,
    refused: int,
) -> None:
    """An upload that fails in silence, or what is left of it taken for a checkpoint."""
    root = UrlPath(f"s3://leyden/{tmp_path.name}")
    save_checkpoint(root / "step-1-a0", *make(1), {"step": 1})
    with (
        watched_puts(lambda number, path: number == refused),
        pytest.raises(SaveFailed, match=r"step-2-a0 could not be saved: rank 0: "),
    ):
        save_checkpoint(root / "step-2-a0", *make(2), {"step": 2})
    assert find_checkpoint(root) == (root / "step-1-a0", [])
    assert objects(root / "step-2-a0")[1] == []
    save_checkpoint(root / "step-2-a1", *make(2), {"step": 2})
    assert find_checkpoint(root) == (root / "step-2-a1", [])


def test_a_large_file_goes_up_in_parts(s3_server: str, tmp_path: Path) -> None:
    """A file that fails in the middle must not appear at its end, as closing it would do."""
    storage_url = UrlPath(f"s3://leyden/{tmp_path.name}/step-1-a0")
    storage = Storage(storage_url.url)
    with pytest.raises(RuntimeError, match="stop"), storage.upload("a") as file:
        file.write(b"x" * (60 << 20))
        raise RuntimeError("stop")
    del file
    assert storage.sizes() == {}
    with storage.upload("b") as file:
        file.write(b"x" * (60 << 20))
    assert storage.sizes() == {"b": 60 << 20}
    digest = files_of(storage_url).sha256("b", 60 << 20)
    assert digest == hashlib.sha256(b"x" * (60 << 20)).hexdigest()


def test_a_store_that_is_away_is_no_damage(s3_server: str, tmp_path: Path) -> None:
    """A network fault that passes for damage would send the run back to an older checkpoint."""
    root = UrlPath(f"s3://leyden/{tmp_path.name}")
    save_checkpoint(root / "step-1-a0", *make(1), {"step": 1})
    with (
        mock.patch("s3fs.S3FileSystem._cat_file", side_effect=ConnectionResetError("gone")),
        pytest.raises(SetupError, match=r"cannot be reached: gone; check the network"),
    ):
        find_checkpoint(root)


def env_of(server: str) -> dict[str, str]:
    """A forkserver that started before the S3 server does not know of it."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def on_s3(env: dict[str, str], fn: Any, *args: Any) -> Any:
    os.environ.update(env)
    return fn(*args)


def counted_load(strategy: str, folder: Place) -> tuple[dict[str, torch.Tensor], int]:
    """Load, and count the bytes of tensors that were fetched."""
    fetched = [0]
    original = UrlReader._fetch_from

    def fetch(self: UrlReader, first: int) -> None:
        original(self, first)
        fetched[0] += sum(map(len, self._fetched.values()))

    with mock.patch.object(UrlReader, "_fetch_from", fetch):
        return load(strategy, folder), fetched[0]  # type: ignore[arg-type]


def test_reshards_and_reads_only_what_a_rank_needs(
    s3_server: str,
    tmp_path: Path,
) -> None:
    """A shard restored to the wrong place; or every rank reading all, W times the traffic."""
    env, folder = env_of(s3_server), UrlPath(f"s3://leyden/{tmp_path.name}") / checkpoint_name(2, 0)
    saved = run_ranks(on_s3, 2, 240, env, train_and_save, "fsdp", folder)[0]
    assert check_files(folder) == "" and read_record(folder) == {"step": 2}
    _, paths = objects(folder)
    assert [path.rpartition("/")[2] for path in paths] == [
        *(".metadata", COMMIT, "__0_0.distcp", "__1_0.distcp", "state.json")
    ]
    sizes = files_of(folder).sizes()
    total = sizes["__0_0.distcp"] + sizes["__1_0.distcp"]
    for strategy, ranks in (("ddp", 1), ("fsdp", 2)):
        for loaded, fetched in run_ranks(on_s3, ranks, 240, env, counted_load, strategy, folder):
            assert loaded.keys() == saved.keys()
            assert all(torch.equal(loaded[name], saved[name]) for name in saved)
            assert fetched <= total * (0.6 if ranks == 2 else 1.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), with_tokenizer=True)


def told(env: dict[str, str], url: str, folder: str, changes: dict[str, Any]) -> tuple[int, str]:
    """Train; the exit code and what was said on stderr."""
    os.environ.update(env)
    with redirect_stderr(io.StringIO()) as said:
        try:
            code = pretrain(url, folder, **changes)
        except LeydenError as error:
            code = error.exit_code
            print(error, file=said)
    return code, said.getvalue()


def test_a_run_on_s3_from_two_ranks_to_one(
    s3_server: str,
    dataset: Dataset,
    tmp_path: Path,
) -> None:
    """The whole recipe: a refused PUT is a warning, another number of ranks goes on, another
    place is refused, and the other verbs read the model from there."""
    env, url, folder = env_of(s3_server), dataset.storage.url, tmp_path / "run"
    place = f"s3://leyden/{tmp_path.name}"
    first = {"checkpoint_url": place, "save_every_steps": 2, "max_steps": 4}
    with watched_puts(lambda number, path: "step-2-a0/__1_0" in path) as seen:
        ends = run_ranks(told, 2, 240, env, url, str(folder), first)
    assert [code for code, _ in ends] == [0, 0] and any("step-2-a0/__1_0" in p for p in seen)
    assert "warning: step-2-a0 could not be saved: rank 1: " in ends[0][1]
    assert "(1 of at most 3 in a row)" in ends[0][1]
    assert not (folder / "checkpoints").exists()
    run = RunDir(folder)
    identity = run.read_run()
    assert identity is not None and run.checkpoints == UrlPath(f"{place}/{identity['run_id']}")
    assert saved_steps(run.checkpoints) == [4]

    more = {**first, "max_steps": 6, "strategy": "ddp"}
    elsewhere = {**more, "checkpoint_url": f"{place}-other"}
    ((code, said),) = run_ranks(told, 1, 240, env, url, str(folder), elsewhere)
    assert code == 2 and f"checkpoint_url was '{place}', is '{place}-other'" in said
    ((code, said),) = run_ranks(told, 1, 240, env, url, str(folder), more)
    assert code == 0 and "from step 4 (step-4-a0)" in said
    assert saved_steps(run.checkpoints) == [4, 6]
    assert [line["step"] for line in lines(folder, "consumed.jsonl")] == list(range(6))
    ((loss, logged),) = run_ranks(evaluated, 1, 240, env, str(folder))
    assert loss == pytest.approx(logged, rel=1e-5)
    from dist.report import write_report

    assert write_report(run)[0].stat().st_size > 1000


def evaluated(env: dict[str, str], folder: str) -> tuple[float, float]:
    """Loss by recipes.evaluate, from the checkpoint on S3, and the run's own; exports too."""
    os.environ.update(env)
    from recipes import evaluate, export, generate

    loss = evaluate.run(evaluate.Config(model=folder, split="validation"))["loss"]
    assert export.run(export.Config(model=folder)).name == "step-6"
    settings = generate.Config(model=folder, prompt="a", max_new_tokens=2, greedy=True)
    assert generate.open_generator(settings).batch(["a"])[0].tokens <= 2
    return loss, (RunDir(folder).read_outcome() or {})["validation_loss"]


def test_memory_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank would write into a store of its own, and the next start finds nothing."""
    check_place("memory://here")
    check_place("")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="memory is not shared"):
        check_place("memory://here")
    with pytest.raises(ConfigError, match="nosuch://"):
        check_place("nosuch://here")


@pytest.mark.parametrize("url", ["s3://bucket/run", "s3:/bucket/run", "memory://run"])
def test_a_run_at_a_url_is_refused(url: str) -> None:
    """Path() makes s3:/ of s3://, and mkdir a folder of that name in the working directory."""
    with pytest.raises(ConfigError, match=r"--checkpoint_url (s3|memory)://"):
        RunDir.open(Path(url))
    assert not Path("s3:").exists()


def test_places() -> None:
    """A relative folder in run.json would mean another one from another working directory."""
    assert place_of("ckpt") == Path.cwd() / "ckpt"
    assert place_of("file:///a/b") == Path("/a/b")
    assert place_of("s3://a/b/") == UrlPath("s3://a/b") and str(place_of("s3://a")) == "s3://a"
    assert (UrlPath("s3://a") / "b").parent == UrlPath("s3://a")
