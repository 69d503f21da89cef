"""Published architectures behind our packed root compute what they compute by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dist.attention import register_packed_attention
from dist.batch import documents_of, make_batches
from dist.dataset import Dataset
from dist.errors import ConfigError, DataRefused
from recipes.causal_lm import (
    MODEL_TYPES,
    BaseConfig,
    PackedDecoder,
    build,
    check_data,
    find_base,
    hf_config,
    open_base,
    resolve_base,
)
from tests.finetune_runs import write_base
from tests.make_dataset import write_dataset


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_packed_documents_cost_what_each_costs_alone(kind: str, tmp_path: Path) -> None:
    """A model of MODEL_TYPES whose decoder ignores the packed documents or its positions, scales
    its logits, or keeps its output matrix elsewhere: a wrong loss without an error."""
    from transformers import AutoModelForCausalLM

    changes = {"sliding_window": None} if kind in ("mistral", "phi3") else {}
    folder = write_base(tmp_path / kind, kind, **changes)
    register_packed_attention()
    ours = PackedDecoder(
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="leyden_packed")
    ).eval()
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 300, (2, 17)).astype(np.uint16)
    documents = documents_of(np.array([7, 10, 5, 9], np.int32), np.array([0, 2, 4]), 17, 2)
    (batch,) = make_batches(tokens, np.arange(2), documents)
    with torch.no_grad():
        found = ours(batch)
        expected = torch.zeros(())
        for row, lens in zip(tokens.astype(np.int64), ([7, 10], [5, 9]), strict=True):
            start = 0
            for length in lens:
                ids = torch.from_numpy(row[start : start + length])[None]
                logits = theirs(input_ids=ids[:, :-1]).logits
                loss = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum")
                expected, start = expected + loss, start + length
    assert found.item() == pytest.approx(expected.item(), rel=2e-5)


def test_a_base_is_known_by_its_bytes(tmp_path: Path) -> None:
    """A digest over names or sizes would take other weights for the same base; one over the
    whole config.json would change with the version of transformers that wrote it."""
    one = open_base(write_base(tmp_path / "one"), "one")
    assert open_base(write_base(tmp_path / "again"), "x").digest == one.digest
    assert open_base(write_base(tmp_path / "other", seed=1), "x").digest != one.digest
    record = json.loads((tmp_path / "again" / "config.json").read_text())
    (tmp_path / "again" / "config.json").write_text(
        json.dumps({**record, "transformers_version": "4.0", "use_cache": False})
    )
    assert open_base(tmp_path / "again", "x").digest == one.digest
    (tmp_path / "again" / "config.json").write_text(json.dumps({**record, "rms_norm_eps": 1e-3}))
    assert open_base(tmp_path / "again", "x").digest != one.digest


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("gpt2", {}, "'gpt2'"),
        ("gemma2", {"head_dim": 8}, "'gemma2'"),
        ("mistral", {"sliding_window": 16}, "windows"),
        ("llama", {"eos_token_id": None}, "eos_token_id"),
    ],
)
def test_refuses_what_it_would_train_wrongly(
    kind: str, changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    """Soft-capped logits, sliding windows: the loss would be another model's."""
    write_base(tmp_path, kind, **changes)
    with pytest.raises(ConfigError, match=said):
        hf_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [("", "empty"), ("nowhere", "no folder"), ("/nowhere/at/all", "no folder"), (".", "no config")],
)
def test_refuses_a_base_that_is_not_there(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download of a mistyped folder's name, or a traceback of the hub's client."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        resolve_base(name)


def test_refuses_damaged_weights(tmp_path: Path) -> None:
    """A missing part must be known before training, by name."""
    folder = write_base(tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"weight_map": {"lm_head.weight": "part.safetensors", "x": "gone.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"gone\.safetensors"):
        open_base(folder, "base")


def test_refuses_shards_of_another_tokenizer(tmp_path: Path) -> None:
    """Ids of one vocabulary trained into the embeddings of another."""
    dataset: Dataset = write_dataset(tmp_path / "data")
    folder = write_base(tmp_path / "base")
    base = find_base(BaseConfig(path=str(folder)))
    check_data(base, dataset)
    record = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**record, "truncation": None}, indent=1))
    check_data(base, dataset)  # what decides ids is the same
    record["model"]["merges"] = record["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(record))
    with pytest.raises(DataRefused, match="model"):
        check_data(base, dataset)
    small = find_base(BaseConfig(path=str(write_base(tmp_path / "small", vocab_size=200))))
    with pytest.raises(DataRefused, match="300"):
        check_data(small, dataset)


def test_building_takes_no_memory(tmp_path: Path) -> None:
    """Eight billion parameters are made on the meta device or not at all."""
    net = build(hf_config(write_base(tmp_path)))
    assert all(parameter.is_meta for parameter in net.parameters())
