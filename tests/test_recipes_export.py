"""recipes/export.py on runs of the real recipe: what others load is the model that was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist.attention import packed_info
from dist.checkpoint import find_checkpoint, load_checkpoint, read_record
from dist.errors import ConfigError, DataRefused
from dist.export_hf import load_weights
from dist.initialise import materialise
from dist.model_folder import check_folder, find_model
from recipes import llama
from recipes.export import Config, run
from recipes.trained import load_run, open_trained
from tests.make_dataset import flip_byte, write_dataset
from tests.small_run import small_data, small_run


def trained_net(folder: Path) -> torch.nn.Module:
    """The model as the recipe restores it: not by the code of the export."""
    checkpoint, _ = find_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    record = read_record(checkpoint)
    schema = {"vocab_size": 300, "bos_id": None, "eos_id": 1}
    net = llama.build(llama.ModelConfig(**record["config"]["model"]), schema)
    materialise(net, torch.device("cpu"), 99, 0.02)
    load_checkpoint(checkpoint, net, torch.optim.AdamW(net.parameters(), lr=0.1))
    return net.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """An export of each strategy's run."""
    root = tmp_path_factory.mktemp("exports")
    yield {
        strategy: run(
            Config(
                model=str(small_run(strategy)),
                output=str(root / strategy),
                max_shard_size="40KB",
            )
        )
        for strategy in ("ddp", "fsdp")
    }


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_others_load_the_model_that_was_trained(folders: dict[str, Path], strategy: str) -> None:
    """A transposed, missing or stale shard, an untied output matrix, another rotary base: the
    logits would differ."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folders[strategy])
    net = trained_net(small_run(strategy))
    ids = torch.randint(0, 300, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # One document a row, with our own attention.
        packed = packed_info(torch.zeros(3, 32, dtype=torch.int32), None, 32, torch.float32)
        ours: Any = net.model(input_ids=ids, use_cache=False, packed=packed).logits  # type: ignore[operator]
        logits = theirs(input_ids=ids).logits
    assert theirs.config._attn_implementation == "sdpa" and theirs.config.use_cache
    assert theirs.config.tie_word_embeddings == (strategy == "ddp")
    assert float(ours.abs().max()) > 0.5
    assert float((logits - ours).abs().max()) <= 1e-5


def test_what_it_came_from_is_told(folders: dict[str, Path]) -> None:
    """A model whose data, code or config nobody can name a month later."""
    folder, run_folder = folders["fsdp"], small_run("fsdp")
    record = check_folder(folder).record
    identity = json.loads((run_folder / "run.json").read_text())
    outcome = json.loads((run_folder / "outcome.json").read_text())
    assert record["run_id"] == identity["run_id"] and record["step"] == 30
    assert record["data_digest"] == identity["data_digest"]
    assert record["config"] == identity["config"]
    assert record["metrics"]["validation_loss"] == outcome["validation_loss"]
    assert record["environment"]["torch"] == torch.__version__
    assert record["environment"]["ranks"] == 2
    card = (folder / "README.md").read_text()
    for told in (identity["run_id"], identity["data_digest"], "hidden_size: 32", record["code"]):
        assert told in card
    assert f"| validation_loss | {outcome['validation_loss']:.6g} |" in card


def test_bf16_is_the_rounded_model(tmp_path: Path) -> None:
    """A cast that is not written to config.json is undone, or doubled, by whoever loads it."""
    from transformers import AutoModelForCausalLM

    place = str(small_run("ddp"))
    folder = run(Config(model=place, output=str(tmp_path / "bf16"), dtype="bf16"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    whole = load_run(open_trained(find_model(place)))
    assert model.dtype == torch.bfloat16
    for (name, one), (_, other) in zip(
        model.named_parameters(), whole.named_parameters(), strict=True
    ):
        assert torch.equal(one, other.to(torch.bfloat16)), name


def copy_of_run(tmp_path: Path, strategy: str = "ddp") -> Path:
    """A run that may be damaged."""
    folder = tmp_path / "runs" / "mine"
    shutil.copytree(small_run(strategy), folder)
    return folder


def test_an_older_step_and_the_usual_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--step that is ignored exports another model than was asked for."""
    folder = copy_of_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run(Config(model="mine")) == Path("runs/mine/exported/step-30")
    assert run(Config(model="mine", step=15)) == Path("runs/mine/exported/step-15")
    assert "runs/mine/exported/step-15: mine at step 15, fp32" in capsys.readouterr().out
    weights = [
        (folder / "exported" / f"step-{step}" / "model.safetensors").read_bytes()
        for step in (15, 30)
    ]
    assert weights[0] != weights[1]
    with pytest.raises(ConfigError, match="step-30 exists; exports are not overwritten"):
        run(Config(model="mine"))
    with pytest.raises(ConfigError, match="has no checkpoint of step 20; it has steps 15, 30"):
        run(Config(model="mine", step=20))


def test_a_damaged_checkpoint_is_passed_over_or_refused(tmp_path: Path) -> None:
    """Exporting bytes that are not what was saved."""
    folder = copy_of_run(tmp_path)
    root = str(tmp_path / "runs")
    flip_byte(next((folder / "checkpoints").glob("step-30-*/*.distcp")), 5000)
    made = run(Config(model="mine", run_root=root))
    assert made.name == "step-15"
    with pytest.raises(DataRefused, match=r"step-30-a0: another SHA-256: __\d_0.distcp"):
        run(Config(model="mine", run_root=root, step=30, output=str(tmp_path / "x")))
    flip_byte(next((folder / "checkpoints").glob("step-15-*/*.distcp")), 5000)
    with pytest.raises(DataRefused, match="no valid checkpoint: step-30-a0: another"):
        run(Config(model="mine", run_root=root, output=str(tmp_path / "x")))
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        run(Config(model="mine", run_root=root, output=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


def test_a_moved_dataset_is_asked_for_and_another_is_no_answer(tmp_path: Path) -> None:
    """The tokenizer of another dataset, exported with this model, makes nonsense of its output."""
    trained = write_dataset(tmp_path / "gone", seq_len=32, seed=3, vocab_size=290)
    folder = copy_of_run(tmp_path)
    state = next((folder / "checkpoints").glob("step-30-*")) / "state.json"
    record = json.loads(state.read_text())
    moved = str(tmp_path / "nowhere") + "@" + record["data"].rpartition("@")[2]
    place = find_model(str(folder))
    from recipes import trained as module

    assert module._dataset_of(moved, small_data(), place).storage.url == small_data()
    for url in ("", trained.storage.url):
        with pytest.raises((ConfigError, DataRefused), match=r"pass --data\.url FOLDER"):
            module._dataset_of(moved, url, place)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    """Weights loaded into the wrong model: a part would keep what memory held."""
    trained = open_trained(find_model(str(small_run("ddp"))))
    assert trained.checkpoint is not None
    larger = {**trained.record["config"]["model"], "num_layers": 3}
    other = {**trained.record, "config": {"model": larger}}
    with pytest.raises(DataRefused, match="does not hold this model"):
        load_run(replace(trained, record=other))
    with pytest.raises(DataRefused, match="does not hold this model"):
        load_weights(trained.checkpoint, load_run(trained), prefix="other.")
    unknown = {**trained.record, "config": {"model": {"depth": 3}}}
    with pytest.raises(ConfigError, match=r"not a recipes\.llama\.ModelConfig"):
        load_run(replace(trained, record=unknown))
