"""A fine-tuned model by its run: base and adapters, merged or as a peft folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist.adapter_file import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_config,
    adapter_tensors,
)
from dist.attention import PACKED_ATTENTION, register_packed_attention
from dist.errors import ConfigError, DataRefused
from dist.export_hf import load_weights
from dist.lora import LoraConfig, add_adapters, merge_adapters
from dist.run_dir import RunDir
from dist.url_path import Place
from recipes.causal_lm import Base, hf_config, open_base, resolve_base

# What belongs to a base's tokenizer, and how it is prompted.
TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", TEMPLATE,
    "generation_config.json",
)  # fmt: skip


def is_tuned(record: dict[str, Any]) -> bool:
    """Whether a checkpoint's record is a fine-tuning run's."""
    return "lora" in record["config"] and "base" in record["config"]


def has_adapters(record: dict[str, Any]) -> bool:
    """Whether a run of recipes/finetune.py trained adapters, not all weights."""
    return lora_of(record).has_adapters


def lora_of(record: dict[str, Any]) -> LoraConfig:
    """The run's adapter config."""
    return LoraConfig(**record["config"]["lora"])


def base_of(run: Path, record: dict[str, Any], path: str = "") -> Base:
    """The base of a run, where it was or at `path`; DataRefused if it is another now."""
    name = path or str(record["config"]["base"]["path"])
    try:
        base = open_base(resolve_base(name), name)
    except ConfigError as error:
        hint = "" if path else "; if it was moved, pass --base.path FOLDER"
        raise ConfigError(f"the base of the run {run}: {error}{hint}") from None
    wanted = (RunDir(run).read_run() or {}).get("base_digest")
    if wanted != base.digest:
        raise DataRefused(
            f"{base.folder} is another model ({base.digest[:12]}) than the base of the run {run} "
            f"({str(wanted)[:12]}); pass --base.path FOLDER of that one"
        )
    return base


def load_tuned(
    checkpoint: Place, record: dict[str, Any], base: Base, *, merged: bool = True
) -> Any:
    """The transformers model in fp32 on the CPU; merged, or with its adapters."""
    from transformers import AutoModelForCausalLM

    register_packed_attention()
    lora = lora_of(record)
    model = AutoModelForCausalLM.from_pretrained(
        base.folder, config=hf_config(base.folder), dtype=torch.float32,
        attn_implementation=PACKED_ATTENTION, local_files_only=True,
    )  # fmt: skip
    add_adapters(model, lora)
    load_weights(checkpoint, model)
    if merged and lora.has_adapters:
        merge_adapters(model)
    return model


def tokenizer_files(base: Base) -> list[Path]:
    """Those of TOKENIZER_FILES that the base has."""
    return [base.folder / name for name in TOKENIZER_FILES if (base.folder / name).is_file()]


def adapter_writer(
    model: Any, record: dict[str, Any], base: Base, card: str, dtype: torch.dtype, template: str
) -> Callable[[Path], None]:
    """Writes a peft folder of `model`, which has its adapters, for dist.export_hf.publish_folder.

    DoRA's magnitudes and modules_to_save go with it; peft.PeftModel.from_pretrained loads it.
    """
    from safetensors.torch import save_file

    def fill(folder: Path) -> None:
        tensors = {name: one.to(dtype) for name, one in adapter_tensors(model).items()}
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config = adapter_config(model, lora_of(record), base.name)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        for path in tokenizer_files(base):
            if path.name != "generation_config.json":
                shutil.copyfile(path, folder / path.name)
        if template:  # that of the training, whatever the base has
            (folder / TEMPLATE).write_text(template)
        (folder / "README.md").write_text(card)

    return fill
