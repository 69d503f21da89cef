"""Adapter folders as peft reads and writes them, and what one must be to go on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dist.errors import ConfigError, DataRefused
from dist.lora import ALL_LINEAR, LoraConfig, find_targets, peft_name, peft_options
from dist.model_folder import LEYDEN_JSON, read_record

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Settings of peft that change what an adapter computes, and that are not ours: at these values
# they change nothing.
_NOT_OURS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "alpha_pattern": (None, {}), "rank_pattern": (None, {}),
    "fan_in_fan_out": (None, False), "lora_bias": (None, False), "layer_replication": (None,),
}  # fmt: skip


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter file holds, by its names there: all that was trained."""
    return {
        peft_name(name): parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def adapter_config(model: nn.Module, config: LoraConfig, base: str) -> dict[str, Any]:
    """adapter_config.json as peft reads it. model: with its adapters, or its base."""
    import peft

    targets = config.target_modules
    if ALL_LINEAR in targets:
        targets = find_targets(model, targets)
    made = peft.LoraConfig(
        **peft_options(config, sorted(targets)),
        modules_to_save=list(config.modules_to_save) or None,
        base_model_name_or_path=base,
        inference_mode=True,
    ).to_dict()
    return {key: sorted(v) if isinstance(v, set) else v for key, v in made.items()}


def read_adapter(
    folder: Path, model: nn.Module, config: LoraConfig, base_digest: str = ""
) -> dict[str, Tensor]:
    """Tensors of an adapter folder by their names there, checked against a model with adapters.

    Raises ConfigError where the folder is of another kind, rank, scale, base or set of layers, or
    holds NaN or infinite values.
    """
    theirs, tensors = _read(folder)
    _check_base(folder, base_digest)
    wanted = {
        peft_name(name): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    have = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    settings = (
        ("r", config.rank), ("lora_alpha", config.alpha), ("use_rslora", config.rslora),
        ("use_dora", config.method == "dora"),
    )  # fmt: skip
    wrong = [
        f"{key} is {theirs.get(key, False)} there, {value} here"
        for key, value in settings
        if theirs.get(key, False) != value
    ]
    wrong += [
        f"{key} is {theirs.get(key)}, which is not done here"
        for key, harmless in _NOT_OURS.items()
        if theirs.get(key) not in harmless
    ]
    wrong += [
        f"{name}: {have.get(name, 'missing')} there, {shape} here"
        for name, shape in wanted.items()
        if have.get(name) != shape
    ][:3]
    wrong += [f"{name} is there and not here" for name in sorted({*have} - {*wanted})][:3]
    if wrong:
        raise ConfigError(
            f"lora.init_from: {folder} does not fit this model: {'; '.join(wrong)} (set lora.* as "
            f"its {ADAPTER_CONFIG} has it)"
        )
    for name in sorted(wanted):
        if not bool(tensors[name].isfinite().all()):
            raise ConfigError(
                f"lora.init_from: {folder}: {name} holds NaN or infinite values; the file is "
                "damaged, or its training diverged"
            )
    return tensors


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and the tensors, whatever they are."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        theirs = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"lora.init_from: {folder} cannot be read: {error}") from error
    if not isinstance(theirs, dict):
        raise ConfigError(f"lora.init_from: {folder / ADAPTER_CONFIG} holds no JSON object")
    return theirs, tensors


def _check_base(folder: Path, base_digest: str) -> None:
    """ConfigError where leyden.json, if the folder has one, names another base."""
    if not (folder / LEYDEN_JSON).is_file():
        return  # peft's own folders say a name only, which may have moved
    try:
        trained_on = read_record(folder).get("base_digest")
    except DataRefused as error:
        raise ConfigError(f"lora.init_from: {error}") from None
    if trained_on and base_digest and trained_on != base_digest:
        raise ConfigError(
            f"lora.init_from: {folder} is an adapter of another base: {trained_on[:12]}, and this "
            f"one is {base_digest[:12]}"
        )
