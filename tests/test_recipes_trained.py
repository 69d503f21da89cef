"""recipes/trained.py: a model is found though its dataset moved, and damage is told, not hidden."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from dist.checkpoint_folder import COMMIT
from dist.dataset import Dataset
from dist.errors import ConfigError, DataRefused
from dist.model_folder import find_model
from recipes import evaluate, export
from recipes.trained import open_trained
from tests.make_dataset import flip_byte, write_dataset
from tests.run_ranks import run_ranks
from tests.test_dist_lightning_plugins import pretrain


def train(url: str, folder: str) -> int:
    return pretrain(url, folder, max_steps=3, save_every_steps=1, keep=3, val_rows=8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset]:
    """A run with checkpoints 1, 2 and 3, and its dataset."""
    root = tmp_path_factory.mktemp("made")
    dataset = write_dataset(root / "data", seed=1)
    assert run_ranks(train, 1, 240, dataset.storage.url, str(root / "run")) == [0]
    return root / "run", dataset


@pytest.fixture
def run(made: tuple[Path, Dataset], tmp_path: Path) -> Path:
    """A copy of the run, to damage."""
    return shutil.copytree(made[0], tmp_path / "run")


def test_what_is_passed_over_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An evaluation of an older model than the newest, without a word."""
    flip_byte(run / "checkpoints" / "step-3-a0" / "state.json", 30)
    commit = run / "checkpoints" / "step-2-a0" / COMMIT
    unsealed = json.loads(commit.read_bytes())
    del unsealed["sha256"]
    commit.write_text(json.dumps(unsealed))
    assert open_trained(find_model(str(run))).step == 1
    assert capsys.readouterr().err.splitlines() == [
        "passed over the checkpoint step-3-a0: another SHA-256: state.json",
        "passed over the checkpoint step-2-a0: COMMIT.json is of an older format, without a "
        "SHA-256 of its own content",
    ]
    with pytest.raises(DataRefused, match="no valid checkpoint: step-3-a0: another SHA-256"):
        open_trained(find_model(str(run)), step=3)
    with pytest.raises(ConfigError, match=r"no checkpoint of step 9; it has steps 1, 2, 3"):
        open_trained(find_model(str(run)), step=9)


def test_a_dataset_that_moved(run: Path, made: tuple[Path, Dataset], tmp_path: Path) -> None:
    """A model that cannot be used since its data was archived, or a message that names no cure."""
    tokenizer_json = made[1].read_tokenizer()
    home = Path(made[1].storage.url)
    away = home.rename(home.with_name("moved"))
    place = find_model(str(run))
    try:
        wanted = made[1].manifest.tokenizer_digest
        assert wanted is not None
        with pytest.raises((ConfigError, DataRefused)) as caught:
            open_trained(place)
        text = str(caught.value)
        assert "pass --data.url FOLDER" in text and f"the tokenizer {wanted[:12]}" in text
        there = open_trained(place, data_url=str(away))
        assert there.data == f"{away}@{made[1].data_digest}"
        # Another dataset of the same tokenizer lends it; rows there are longer.
        other = write_dataset(tmp_path / "other", seed=2, seq_len=24)
        lent = open_trained(place, data_url=other.storage.url)
        assert lent.seq_len == made[1].manifest.schema["seq_len"]
        assert lent.data_digest == made[1].data_digest
        assert lent.tokenizer_json == tokenizer_json
        data = evaluate.DataRef(url=other.storage.url)
        assert evaluate.run(evaluate.Config(model=str(run), data=data))["rows"] > 0
        folder = export.run(export.Config(model=str(run), data=data))
        assert (folder / "model.safetensors").exists()
        strange = write_dataset(tmp_path / "strange", vocab_size=290)
        with pytest.raises((ConfigError, DataRefused), match="cannot be opened"):
            open_trained(place, data_url=strange.storage.url)
    finally:
        away.rename(home)


def test_the_card_names_the_code_that_trained(run: Path) -> None:
    """A model card that says only which code exported it cannot be traced to the training."""
    env = json.loads((run / "attempts" / "0" / "env.json").read_bytes())
    assert env["code"].startswith("leyden") and env["libraries"]["torch"]
    card = (export.run(export.Config(model=str(run))) / "README.md").read_text()
    assert "trained by" in card and env["code"] in card


def test_leftovers_of_killed_exports_go(run: Path) -> None:
    """Each killed export of a large model leaves its size on the disk for ever."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = socket.gethostname()
    (run / "exported").mkdir()
    stays = []
    for owner, gone in (
        (f"{host}.{dead.pid}", True),
        (f"{host}.{os.getppid()}", False),
        (f"elsewhere.{dead.pid}", False),
    ):
        folder = run / "exported" / f".step-3.{owner}.0123abcd.tmp"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        if not gone:
            stays.append(folder.name)
    export.run(export.Config(model=str(run)))
    assert sorted(p.name for p in (run / "exported").iterdir()) == sorted([*stays, "step-3"])
