"""dist/hf_weights.py: a Hugging Face folder into a sharded model, each rank its part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from dist.errors import ConfigError
from dist.hf_weights import INDEX, HfWeights
from dist.initialise import materialise
from dist.mesh import Layout, data_axes, make_mesh
from dist.precision import Precision
from dist.sharding import shard_fsdp
from recipes import llama
from tests.run_ranks import run_ranks

CPU = torch.device("cpu")
SCHEMA: dict[str, Any] = {"seq_len": 16, "vocab_size": 102, "bos_id": None, "eos_id": 1}
SHAPE: dict[str, Any] = {
    "hidden_size": 40, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 54,
}  # fmt: skip


def write_folder(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A model saved by transformers in several parts."""
    torch.manual_seed(1)
    from transformers import LlamaForCausalLM

    model_config = llama.ModelConfig(**SHAPE, tie_embeddings=tied)
    hf = LlamaForCausalLM._from_config(
        llama.hf_config(model_config, SCHEMA), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.normal_()
    hf.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / INDEX).exists()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("hf"))


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for part in folder.glob("*.safetensors") for k, v in load_file(part).items()}


def load(folder: str, shards: int, tp: int, tied: bool) -> tuple[dict[str, torch.Tensor], int]:
    """All tensors after loading, gathered; and the bytes that this rank read."""
    config = llama.ModelConfig(**SHAPE, tie_embeddings=tied, init_from=folder)
    model = llama.build(config, SCHEMA)
    if shards * tp > 1:
        rank = torch.distributed.get_rank()
        mesh = make_mesh(CPU, Layout(rank=rank, shards=shards, tp=tp))
        if tp > 1:
            llama.split_layers(model, mesh["tp"])
        if shards > 1:
            precision = Precision(name="fp32", reason="")
            shard_fsdp(model, llama.blocks(model), data_axes(mesh), precision)
    fill = llama.first_weights(model, config)
    assert fill is not None
    materialise(model, CPU, 0, 0.02, fill)
    (weights,) = [c.cell_contents for c in fill.__closure__ or ()]  # type: ignore[attr-defined]
    whole = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.model.named_parameters()
    }
    return whole, weights.bytes_read


@pytest.mark.parametrize(("shards", "tp"), [(1, 1), (3, 1), (1, 2), (2, 2)])
def test_every_layout_reads_its_share(folder: Path, shards: int, tp: int) -> None:
    """Another rank's rows, or a whole tensor read to keep a part of it: with 8 ranks a node that
    is 8 times the file."""
    expected = saved(folder)
    total = sum(tensor.nbytes for tensor in expected.values())
    ranks = shards * tp
    results = run_ranks(load, ranks, 240, str(folder), shards, tp, False)
    for tensors, _ in results:
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    # Norms are 4 % here, and whole on each rank of a tensor-parallel group; shards are uneven.
    assert max(read for _, read in results) <= 1.2 * total / ranks
    assert sum(read for _, read in results) <= 1.05 * total * (1 if tp == 1 else 1.1)


def test_tied_and_bf16(tmp_path: Path) -> None:
    """A tied head that is looked for in the file, or a file's dtype that becomes the model's."""
    folder = write_folder(tmp_path, tied=True, dtype=torch.bfloat16)
    expected = saved(folder)
    for tensors, _ in run_ranks(load, 2, 240, str(folder), 2, 1, True):
        assert "lm_head.weight" not in expected and tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[k], expected[k].float()) for k in expected)
        assert {t.dtype for t in tensors.values()} == {torch.float32}


def weights_for(folder: Path, **changes: Any) -> None:
    config = llama.ModelConfig(**{**SHAPE, "tie_embeddings": False, **changes})
    config = llama.ModelConfig(**{**vars(config), "init_from": str(folder)})
    model = llama.build(config, SCHEMA)
    fill = llama.first_weights(model, config)
    materialise(model, CPU, 0, 0.02, fill)


def edit(folder: Path, name: str, value: torch.Tensor | None) -> None:
    """Change or drop one tensor of a folder, and its entry in the index."""
    index = json.loads((folder / INDEX).read_text())
    part = folder / index["weight_map"][name] if name in index["weight_map"] else None
    part = part or next(iter(sorted(folder.glob("*.safetensors"))))
    tensors = load_file(part)
    tensors.pop(name, None)
    index["weight_map"].pop(name, None)
    if value is not None:
        tensors[name] = value
        index["weight_map"][name] = part.name
    save_file(tensors, part)
    (folder / INDEX).write_text(json.dumps(index))


def test_damage_is_named(tmp_path: Path) -> None:
    """Any of these would train from random or wrong weights in silence, or end in a traceback."""
    name = "model.layers.1.mlp.up_proj.weight"
    cases: list[tuple[str, Any]] = [
        ("it lacks " + name, lambda f: edit(f, name, None)),
        ("it has model.extra.weight", lambda f: edit(f, "model.extra.weight", torch.ones(2))),
        (r"up_proj.weight is \(3, 40\) there", lambda f: edit(f, name, torch.ones(3, 40))),
        ("up_proj.weight holds NaN", lambda f: edit(f, name, torch.full((54, 40), torch.nan))),
        ("is incomplete", lambda f: sorted(f.glob("*.safetensors"))[1].unlink()),
        ("cannot be read", lambda f: sorted(f.glob("*.safetensors"))[0].write_bytes(b"{}")),
        ("has neither", lambda f: [p.unlink() for p in f.glob("*.safetensors*")]),
        ("has no config.json", lambda f: (f / "config.json").unlink()),
    ]
    for number, (said, damage) in enumerate(cases):
        folder = write_folder(tmp_path / str(number))
        damage(folder)
        with pytest.raises(ConfigError, match=said):
            weights_for(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 1}, "it has model.layers.1"),
        ({"intermediate_size": 56}, "is \\(54, 40\\) there and \\(56, 40\\)"),
        ({"rope_theta": 5e5}, "rope_parameters"),
        ({"norm_eps": 1e-6}, "rms_norm_eps"),
        ({"num_heads": 2, "num_kv_heads": 2}, "num_attention_heads"),
    ],
)
def test_another_model_is_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    """Settings that no tensor's shape shows give a model that computes something else."""
    with pytest.raises(ConfigError, match=said):
        weights_for(folder, **changes)


def test_untied_model_of_a_tied_folder(tmp_path: Path) -> None:
    """The message must say what to set."""
    folder = write_folder(tmp_path, tied=True)
    with pytest.raises(ConfigError, match="tie_embeddings to true"):
        weights_for(folder)


def test_older_single_file(tmp_path: Path) -> None:
    """Small models have one file and no index, older ones a rotary constant in it."""
    folder = write_folder(tmp_path)
    tensors = saved(folder)
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    save_file(tensors, folder / "model.safetensors")
    model = llama.build(llama.ModelConfig(**SHAPE, tie_embeddings=False), SCHEMA)
    HfWeights(folder).check(model.model)
    weights_for(folder)
