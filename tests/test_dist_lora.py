"""dist/lora.py and dist/adapter_file.py: what is adapted, its first values, and files of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist.adapter_file import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_config,
    adapter_tensors,
    read_adapter,
)
from dist.errors import ConfigError, DataRefused, SetupError
from dist.hf_weights import HfWeights
from dist.initialise import materialise
from dist.lora import (
    LoraConfig,
    add_adapters,
    cast_frozen,
    check_lora,
    filling,
    find_modules,
    find_targets,
    is_adapter,
    merge_adapters,
)
from dist.mesh import Layout, data_axes, make_mesh
from dist.precision import Precision
from dist.sharding import shard_fsdp
from recipes import causal_lm
from tests.finetune_runs import write_base
from tests.run_ranks import run_ranks

CPU = torch.device("cpu")
LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
RANK, ALPHA = 4, 8.0
IDS = torch.arange(3, 51).view(2, 24)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def lora(method: str = "lora", **more: Any) -> LoraConfig:
    known = {"rank": RANK, "alpha": ALPHA} | more
    return LoraConfig(method=method, **known)  # type: ignore[arg-type]


def made(
    base: Path, config: LoraConfig, *, seed: int = 0, shards: int = 1,
    adapter: Path | None = None,
) -> Any:  # fmt: skip
    """The root module with base and adapters filled as the recipe does it, on any layout."""
    net = causal_lm.build(causal_lm.hf_config(base))
    add_adapters(net.model, config)
    if shards > 1:
        mesh = make_mesh(CPU, Layout(rank=torch.distributed.get_rank(), shards=shards))
        precision = Precision(name="fp32", reason="")
        shard_fsdp(net, causal_lm.blocks(net), data_axes(mesh), precision)
    tensors = read_adapter(adapter, net.model, config) if adapter else None
    fill = filling(net.model, HfWeights(base).fill, seed, tensors)
    materialise(net, CPU, seed, 0.0, lambda name, p: fill(name.removeprefix("model."), p))
    return net


def whole(parameter: Tensor) -> Tensor:
    full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return full.detach().clone()


def adapters(base: str, config: LoraConfig, seed: int, shards: int) -> dict[str, Tensor]:
    """Every adapter tensor, gathered; for a process of its own."""
    net = made(Path(base), config, seed=seed, shards=shards)
    return {name: whole(p) for name, p in net.model.named_parameters() if is_adapter(name)}


def logits(model: Any) -> Tensor:
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained_net(base: Path, config: LoraConfig) -> Any:
    """As after some training: everything that is trained has moved."""
    net = made(base, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return net


def write_adapter(folder: Path, net: Any, config: LoraConfig, base: str = "base") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_tensors(net.model), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    record = adapter_config(net.model, config, base)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(record))
    return folder


# -- what is adapted ---------------------------------------------------------------------------


def test_all_linear_is_every_linear_layer_but_the_output(base: Path) -> None:
    """An output matrix with an adapter costs a product of the vocabulary, a layer left out learns
    nothing; on a model with its adapters peft's own matrices are no layers."""
    model = causal_lm.build(causal_lm.hf_config(base)).model
    assert find_targets(model, ["all-linear"]) == LINEAR
    add_adapters(model, lora())
    assert find_targets(model, ["all-linear"]) == LINEAR
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7 and all(is_adapter(name) for name in trained)


def test_named_layers_and_no_others_are_adapted(base: Path) -> None:
    """A suffix rule that takes `o_proj` for every name that ends so, or adapts only one block."""
    model = causal_lm.build(causal_lm.hf_config(base)).model
    add_adapters(model, lora(target_modules=["q_proj", "layers.1.mlp.up_proj"]))
    adapted = {name.partition(".lora_")[0] for name, _ in model.named_parameters()
               if is_adapter(name)}  # fmt: skip
    assert adapted == {
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_modules": ["q_porj"]}, "'q_porj'; did you mean 'q_proj'"),
        ({"target_modules": ["proj"]}, "no linear layer is called 'proj'"),
        ({"target_modules": ["mlp"]}, "there are down_proj, gate_proj"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head is the output matrix"),
        ({"modules_to_save": ["lm_haed"]}, "'lm_haed'; did you mean 'lm_head'"),
        ({"modules_to_save": ["q_proj"]}, "q_proj has adapters on model.layers.0.self_attn.q_proj"),
        ({"modules_to_save": ["mlp"]}, "mlp has adapters on model.layers.0.mlp"),
    ],
)
def test_names_that_fit_nothing_are_refused(base: Path, changes: dict[str, Any], said: str) -> None:
    """A typo that adapts nothing; a module both adapted and saved, which no peft file can hold."""
    model = causal_lm.build(causal_lm.hf_config(base)).model
    with pytest.raises(ConfigError, match=said):
        add_adapters(model, lora(**changes))


def test_a_tied_matrix_is_not_saved_alone(tmp_path: Path) -> None:
    """peft would load the output matrix and leave the embedding that it was tied to."""
    folder = write_base(tmp_path, tie_word_embeddings=True)
    model = causal_lm.build(causal_lm.hf_config(folder)).model
    with pytest.raises(ConfigError, match="ties its output matrix"):
        find_modules(model, ["lm_head"], LINEAR)
    assert find_modules(model, ["model.norm"], LINEAR) == ["model.norm"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "lroa"}, "must be one of lora, dora, qlora, full"),
        ({"rank": 0}, "rank 0 must be at least 1"),
        ({"alpha": float("nan")}, "alpha nan above 0"),
        ({"alpha": 0.0}, "alpha 0.0 above 0"),
        ({"dropout": 1.0}, "lora.dropout is 1.0"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"method": "full", "init_from": "x"}, "no adapter to fill"),
    ],
)
def test_settings_without_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    """A scale of NaN or zero trains nothing, for a day."""
    with pytest.raises(ConfigError, match=said):
        LoraConfig(**changes)


def test_where_adapters_cannot_be_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's layers on split matrices; 4-bit weights that would be cut, or have no kernel."""
    for strategy, tp in (("tp", 0), ("fsdp", 2)):
        with pytest.raises(ConfigError, match="tensor parallelism"):
            check_lora(lora(), strategy, tp)
    check_lora(lora("full"), "tp", 2)
    with pytest.raises(ConfigError, match="sharded"):
        check_lora(lora("qlora"), "fsdp")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SetupError, match="no GPU"):
        check_lora(lora("qlora"), "ddp")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_lora(lora("qlora"), "ddp")


# -- first values ------------------------------------------------------------------------------


def test_first_values_are_a_function_of_seed_and_name(base: Path) -> None:
    """A drawn from a rank's own generator, or in order of the modules: another start on other
    numbers of ranks. A that is the same in all layers; B that moves the base at once."""
    config = lora("dora")
    one, other = adapters(str(base), config, 0, 1), adapters(str(base), config, 1, 1)
    for world_size in (2, 3):
        for rank in run_ranks(adapters, world_size, 240, str(base), config, 0, world_size):
            assert rank.keys() == one.keys()
            for name in one:  # a norm's order of summation may be another
                close = torch.allclose(rank[name], one[name], rtol=1e-6, atol=0)
                assert close if "magnitude" in name else torch.equal(rank[name], one[name]), name
    matrices = [name for name in one if ".lora_A." in name]
    assert len(matrices) == 14
    few = adapters(str(base), lora(target_modules=["v_proj"]), 0, 1)
    assert all(torch.equal(few[name], one[name]) for name in few)
    values = [one[name] for name in matrices if one[name].shape == (RANK, 32)]
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    for name in matrices:
        bound = one[name].shape[1] ** -0.5
        assert not torch.equal(one[name], other[name])
        assert 0.9 * bound < one[name].abs().max() <= bound
    assert all(bool((one[name] == 0).all()) for name in one if ".lora_B." in name)


def test_magnitudes_are_the_norms_of_the_rows(base: Path) -> None:
    """DoRA's start is the base only so; a norm of columns has another shape only if not square."""
    found = adapters(str(base), lora("dora"), 0, 1)
    weights = load_file(base / "model.safetensors")
    magnitudes = {name: v for name, v in found.items() if "magnitude" in name}
    assert len(magnitudes) == 14
    for name, value in magnitudes.items():
        weight = weights[f"{name.partition('.lora_')[0]}.weight"]
        assert torch.allclose(value, weight.norm(dim=1), rtol=1e-6)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_first_forward_is_the_bases(base: Path, method: str) -> None:
    """A start that is not the base throws away what it knows."""
    from transformers import AutoModelForCausalLM

    expected = logits(AutoModelForCausalLM.from_pretrained(base))
    tolerance = 0.0 if method == "lora" else 2e-6
    found = logits(made(base, lora(method)).model)
    assert (found - expected).abs().max() <= tolerance


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_merged_weights_are_the_sum_by_hand(base: Path, rslora: bool, scale: float) -> None:
    """alpha / rank and alpha / sqrt(rank) differ by a factor that no shape shows."""
    net = trained_net(base, lora(rslora=rslora))
    layer = net.model.model.layers[0].mlp.up_proj
    a, b = whole(layer.lora_A["default"].weight), whole(layer.lora_B["default"].weight)
    expected = load_file(base / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    expected = expected + scale * (b @ a)
    before = logits(net.model)
    merge_adapters(net.model)
    weight = net.model.model.layers[0].mlp.up_proj.weight
    assert torch.allclose(weight, expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(logits(net.model), before, atol=1e-5)
    assert not any("lora" in name for name, _ in net.model.named_parameters())


def test_a_sum_that_is_not_finite_is_not_merged(base: Path) -> None:
    """A diverged run exported as a model of NaN."""
    net = trained_net(base, lora())
    with torch.no_grad():
        net.model.model.layers[1].mlp.up_proj.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(DataRefused, match=r"adapter of model\.layers\.1\.mlp\.up_proj"):
        merge_adapters(net.model)


def test_only_the_frozen_part_is_cast(base: Path) -> None:
    """Adapters in bf16 lose updates below 1/256; a base left in fp32 takes twice the memory."""
    net = made(base, lora(modules_to_save=["lm_head"]))
    cast_frozen(net, torch.bfloat16)
    for name, parameter in net.model.named_parameters():
        trained = is_adapter(name) or name == "lm_head.weight"
        assert parameter.requires_grad == trained, name
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name


# -- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        lora(), lora("dora"), lora(rslora=True),
        lora(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]),
    ],
    ids=["lora", "dora", "rslora", "modules_to_save"],
)  # fmt: skip
def test_peft_computes_what_we_do(base: Path, tmp_path: Path, config: LoraConfig) -> None:
    """Names, scales or saved modules that peft passes over in silence."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    net = trained_net(base, config)
    folder = write_adapter(tmp_path / "adapter", net, config)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (logits(net.model) - plain).abs().max() > 1e-2
    assert torch.allclose(logits(theirs), logits(net.model), atol=2e-5)
    assert get_peft_model_state_dict(theirs).keys() == adapter_tensors(net.model).keys()
    record = json.loads((folder / ADAPTER_CONFIG).read_text())
    assert record["modules_to_save"] == (config.modules_to_save or None)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_going_on_from_a_folder_brings_all_of_it(base: Path, tmp_path: Path, method: str) -> None:
    """A saved output matrix that starts again from the base's: the adapter lost half of itself."""
    config = lora(method, modules_to_save=["lm_head"])
    net = trained_net(base, config)
    folder = write_adapter(tmp_path / "adapter", net, config)
    again = made(base, config, seed=9, adapter=folder)
    found = dict(again.model.named_parameters())
    for name, parameter in net.model.named_parameters():
        assert torch.equal(parameter, found[name]), name


def edit_weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        change(tensors)
        save_file(tensors, folder / ADAPTER_WEIGHTS)

    return edit


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        record = json.loads((folder / ADAPTER_CONFIG).read_text())
        (folder / ADAPTER_CONFIG).write_text(json.dumps({**record, **changes}))

    return edit


def filled(value: float) -> Callable[[Path], None]:
    return edit_weights(lambda tensors: tensors[NAME].view(-1)[5:6].fill_(value))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


NAME = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
DAMAGE: list[tuple[str, Callable[[Path], Any]]] = [
    (rf"{NAME}: missing there", edit_weights(lambda tensors: tensors.pop(NAME))),
    (r"x\.weight is there and not here",
     edit_weights(lambda t: t.update({"x.weight": t[NAME].clone()}))),
    (r"\(48, 3\) there, \(48, 4\) here",
     edit_weights(lambda t: t.update({NAME: t[NAME][:, :3].clone()}))),
    (rf"{NAME} holds NaN", filled(float("nan"))),
    (rf"{NAME} holds NaN or inf", filled(float("-inf"))),
    ("r is 8 there, 4 here", edit_config(r=8)),
    (r"lora_alpha is 16 there, 8\.0 here", edit_config(lora_alpha=16)),
    ("use_rslora is True there, False here", edit_config(use_rslora=True)),
    ("use_dora is True there, False here", edit_config(use_dora=True)),
    ("peft_type is LOHA, which is not done here", edit_config(peft_type="LOHA")),
    ("alpha_pattern is", edit_config(alpha_pattern={"q_proj": 2})),
    ("cannot be read", lambda f: cut_short(f / ADAPTER_WEIGHTS)),
    ("cannot be read", lambda f: (f / ADAPTER_WEIGHTS).unlink()),
    ("cannot be read", lambda f: (f / ADAPTER_CONFIG).unlink()),
    ("cannot be read", lambda f: (f / ADAPTER_CONFIG).write_text("{")),
    ("holds no JSON object", lambda f: (f / ADAPTER_CONFIG).write_text("[]")),
    ("was not|is not JSON", lambda f: (f / "leyden.json").write_text("{")),
]  # fmt: skip


def test_adapters_that_do_not_fit_are_refused(base: Path, tmp_path: Path) -> None:
    """Each would start from another adapter than the folder holds, or end in a traceback: parts
    missing or left over, NaN, another rank or scale, settings that peft has and we do not."""
    config = lora()
    net = trained_net(base, config)
    read_adapter(write_adapter(tmp_path / "good", net, config), net.model, config)
    for number, (said, damage) in enumerate(DAMAGE):
        folder = write_adapter(tmp_path / str(number), net, config)
        damage(folder)
        with pytest.raises(ConfigError, match=said) as refused:
            read_adapter(folder, net.model, config)
        assert str(folder) in str(refused.value), "which folder"


def test_older_adapter_files_are_taken(base: Path, tmp_path: Path) -> None:
    """peft's files of 2023 have no use_dora and no use_rslora."""
    config = lora()
    net = trained_net(base, config)
    folder = write_adapter(tmp_path, net, config)
    record = json.loads((folder / ADAPTER_CONFIG).read_text())
    kept = ("r", "lora_alpha", "peft_type", "target_modules", "base_model_name_or_path")
    (folder / ADAPTER_CONFIG).write_text(json.dumps({key: record[key] for key in kept}))
    assert read_adapter(folder, net.model, config).keys() == adapter_tensors(net.model).keys()
