"""Adapters by peft: LoRA and DoRA on a frozen base, made on the meta device, filled by rule.

LoRA: Hu et al., arXiv 2106.09685; rank-stabilised scaling: Kalajdzievski, arXiv 2312.03732; DoRA:
Liu et al., arXiv 2402.09353; QLoRA: Dettmers et al., arXiv 2305.14314. The adapted model computes
at first exactly what its base does (B is zero, DoRA's magnitudes are the base's row norms).
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist.attention import PACKED_ATTENTION, register_packed_attention
from dist.errors import ConfigError, DataRefused, SetupError
from dist.initialise import Fill, local_slice, seed_of

Method = Literal["lora", "dora", "qlora", "full"]
ALL_LINEAR = "all-linear"
_NAME = "default"  # peft's name of a model's only adapter
_PEFT_PREFIX = "base_model.model."
# peft keeps each kind in a dict by adapter; its files leave that name out.
_ADAPTER = re.compile(rf"\.(lora_A|lora_B|lora_magnitude_vector)\.{_NAME}(\.|$)")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What is trained: adapters beside a frozen base, or all of it."""

    method: Method = "lora"
    """lora; dora: with trained magnitudes; qlora: lora on a base in 4 bits (CUDA); full: no
    adapters, every weight is trained."""
    rank: int = 16
    """Width of an adapter's bottleneck."""
    alpha: float = 32.0
    """Adapters are scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs dropped in training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    target_modules: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    """Linear layers to adapt, by the end of their names (q_proj); all-linear: all but the output
    matrix."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules trained whole beside the adapters, such as lm_head or embed_tokens."""
    init_from: str = ""
    """Adapter folder (peft's format) to go on from; empty: a new adapter."""

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ConfigError(
                f"lora.method is {self.method!r}; it must be one of {', '.join(get_args(Method))}"
            )
        if self.rank < 1 or not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(
                f"lora: rank {self.rank} must be at least 1, alpha {self.alpha} above 0"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"lora.dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.method != "full" and not self.target_modules:
            raise ConfigError("lora.target_modules is empty; name layers, or give all-linear")
        if self.method == "full" and self.init_from:
            raise ConfigError("lora.init_from with lora.method full: there is no adapter to fill")

    @property
    def has_adapters(self) -> bool:
        return self.method != "full"

    def __str__(self) -> str:
        if not self.has_adapters:
            return "all weights trained"
        scale = "alpha / sqrt(rank)" if self.rslora else "alpha / rank"
        return (
            f"{self.method} of rank {self.rank}, alpha {self.alpha:g} ({scale}) on "
            f"{', '.join(self.target_modules)}"
        )


def check_lora(config: LoraConfig, strategy: str, tp: int = 0) -> None:
    """ConfigError where adapters cannot be trained with this strategy or on this machine."""
    if config.has_adapters and (strategy == "tp" or tp > 1):
        raise ConfigError(
            f"lora.method {config.method} under tensor parallelism: peft's layers compute on whole "
            "matrices, and a split base would need adapters split with it; use fsdp or hsdp"
        )
    if config.method != "qlora":
        return
    if strategy != "ddp":
        raise ConfigError(
            f"lora.method qlora with parallel.strategy {strategy}: bitsandbytes keeps 4-bit "
            "weights in a layout that cannot be sharded here; use ddp (one rank, or replicas)"
        )
    if not torch.cuda.is_available():
        raise SetupError(
            "lora.method qlora: bitsandbytes' NF4 kernels run on CUDA and this machine shows no "
            "GPU; use lora (the base in its own precision)"
        )


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Freeze a transformers model and put adapters into it, in place; nothing for `full`.

    Call it on the meta device, before activation checkpointing, compiling and sharding. Raises
    ConfigError for a name that no linear layer or module ends in, with the nearest.
    """
    if not config.has_adapters:
        return
    import peft

    targets = find_targets(model, config.target_modules)
    saved = find_modules(model, config.modules_to_save, targets)
    peft.inject_adapter_in_model(
        peft.LoraConfig(**peft_options(config, targets)), model, adapter_name=_NAME
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_ADAPTER.search(name) is not None)
    for name in saved:
        model.get_submodule(name).requires_grad_(True)


def peft_options(config: LoraConfig, targets: list[str]) -> dict[str, Any]:
    return {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.method == "dora",
        "target_modules": targets,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }


def find_targets(model: nn.Module, wanted: list[str]) -> list[str]:
    """Names of linear layers as given, checked; all-linear becomes the kinds that there are."""
    output = model.get_output_embeddings()  # type: ignore[operator]
    layers = [
        name.removesuffix(".base_layer")  # of a model with its adapters
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output and not is_adapter(name)
    ]
    kinds = sorted({name.rpartition(".")[2] for name in layers})
    if ALL_LINEAR in wanted:
        return kinds
    for word in wanted:
        if not _ending(layers, word):
            if _ending([name for name, one in model.named_modules() if one is output], word):
                raise ConfigError(
                    f"lora.target_modules: {word} is the output matrix, which takes no adapter "
                    "here; train it whole by lora.modules_to_save"
                )
            raise ConfigError(
                f"lora.target_modules: no linear layer is called {word!r}{_nearest(word, kinds)} "
                f"(there are {', '.join(kinds)}; or all-linear)"
            )
    return list(wanted)


def find_modules(model: nn.Module, wanted: list[str], targets: list[str]) -> list[str]:
    """Full names of the modules whose names end so; ConfigError for a word that matches none, a
    module that holds layers of `targets`, or one whose weight another shares that stays frozen.

    model: before its adapters.
    """
    modules = [name for name, _ in model.named_modules() if name]
    found = []
    for word in wanted:
        matching = _ending(modules, word)
        if not matching:
            kinds = sorted({name.rpartition(".")[2] for name in modules})
            raise ConfigError(
                f"lora.modules_to_save: no module is called {word!r}{_nearest(word, kinds)}"
            )
        inside = tuple(f"{name}." for name in matching)
        adapted = [
            name
            for target in targets
            for name in _ending(modules, target)
            if name in matching or name.startswith(inside)
        ]
        if adapted:
            raise ConfigError(
                f"lora.modules_to_save: {word} has adapters on {adapted[0]} too, and no adapter "
                "file can hold both; name it in modules_to_save or in target_modules, not in both"
            )
        found += matching
    if found and bool(getattr(model.config, "tie_word_embeddings", False)):
        ends = {name.rpartition(".")[2] for name in found}
        if ends & {"lm_head", "embed_tokens"}:
            raise ConfigError(
                f"lora.modules_to_save {wanted}: the base ties its output matrix to its input "
                "embedding, so an adapter file cannot hold one of them apart; leave them out, or "
                "use lora.method full"
            )
    return found


def _ending(names: list[str], word: str) -> list[str]:
    """Names that are a word, or end in it after a dot: peft's rule."""
    return [name for name in names if name == word or name.endswith(f".{word}")]


def _nearest(word: str, names: list[str]) -> str:
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters to the dtype that computes, what is trained to fp32. Before sharding."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def base_name(name: str) -> str:
    """Name that a parameter has in the base model's files."""
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's, by its name."""
    return _ADAPTER.search(name) is not None


def filling(
    model: nn.Module, base: Fill | None, seed: int, adapter: dict[str, Tensor] | None = None
) -> Fill:
    """First values: adapters by `seed`, or what `adapter` holds (read_adapter); else by `base`.

    A is uniform in +-1/sqrt(in), as peft draws it (kaiming_uniform with a = sqrt(5)), keyed by
    its name; B is zero. Magnitudes are the row norms of the base's weight, which peft's order of
    parameters fills first. model: the transformers model that holds the parameters.
    """

    def fill(name: str, parameter: Tensor) -> None:
        found = _ADAPTER.search(name)
        if adapter is not None and (value := adapter.get(peft_name(name))) is not None:
            _put(parameter, value)  # an adapter's, or one of modules_to_save
        elif found is None:
            if base is not None:
                base(base_name(name), parameter)
        elif found[1] == "lora_A":
            generator = torch.Generator("cpu").manual_seed(seed_of(seed, name))
            bound = 1.0 / math.sqrt(parameter.shape[1])
            value = torch.empty(tuple(parameter.shape)).uniform_(-bound, bound, generator=generator)
            _put(parameter, value)
        elif found[1] == "lora_B":
            _put(parameter, torch.zeros(tuple(parameter.shape)))
        else:
            layer = model.get_submodule(name[: found.start()])
            _local(parameter).copy_(_local(layer.base_layer.weight).float().norm(dim=1))  # type: ignore[union-attr, arg-type]

    return fill


def fill_trained(model: nn.Module, fill: Fill) -> None:
    """Put first values into what is trained alone, where the base has its own already."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                fill(name, parameter)


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _put(parameter: Tensor, full: Tensor) -> None:
    _local(parameter).copy_(local_slice(full, parameter))


def dora_layers(model: nn.Module) -> list[tuple[nn.Module, nn.Parameter]]:
    """(module, parameter of another module that its forward reads) of every DoRA layer: what
    ZeRO-3 must be told to gather."""
    return [
        (layer.lora_magnitude_vector[_NAME], other.weight)
        for layer in model.modules()
        if len(getattr(layer, "lora_magnitude_vector", {})) > 0
        for other in (layer.base_layer, layer.lora_A[_NAME], layer.lora_B[_NAME])
    ]


def peft_name(name: str) -> str:
    """A trained parameter's name in an adapter file; `name` is that in the transformers model."""
    kept = _ADAPTER.sub(lambda found: f".{found[1]}{found[2]}", name)
    # DoRA's magnitude is a module with one weight, and a plain tensor in the file.
    if ".lora_magnitude_vector" in kept:
        kept = kept.removesuffix(".weight")
    return _PEFT_PREFIX + kept


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add the adapters to the base's weights and take their layers out, in place.

    Raises DataRefused where the sum is not finite.
    """
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    for name in adapted:
        owner, _, leaf = name.rpartition(".")
        layer: Any = model.get_submodule(name)
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise DataRefused(f"the adapter of {name} cannot be merged: {error}") from None
        setattr(model.get_submodule(owner), leaf, layer.get_base_layer())


def load_in_4bit(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A base in bitsandbytes' NF4 with double quantisation, computed in `dtype` (QLoRA)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SetupError(
            "lora.method qlora needs the package bitsandbytes: pip install bitsandbytes, or use "
            "lora (the base in bf16)"
        )
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    register_packed_attention()
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantised, attn_implementation=PACKED_ATTENTION,
        dtype=dtype, device_map={"": device}, local_files_only=True,
    )  # fmt: skip
    # It comes for inference, without dropout, and Lightning keeps a module's mode.
    return model.train()
