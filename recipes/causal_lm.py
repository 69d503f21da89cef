"""Published decoders by their Hugging Face folder, behind the root module of recipes/llama.py."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from dist.attention import PACKED_ATTENTION, register_packed_attention
from dist.dataset import Dataset
from dist.errors import ConfigError, DataRefused, SetupError
from dist.hf_weights import HfWeights
from dist.lora import LoraConfig, find_modules, find_targets
from dist.mesh import on_rank_zero
from dist.progress import Progress
from recipes.llama import PackedDecoder, blocks, compile_model, set_precision

__all__ = [
    "Base", "BaseConfig", "PackedDecoder", "blocks", "build", "check_adapters", "check_data",
    "compile_model", "find_base", "hf_config", "open_base", "resolve_base", "set_precision",
]  # fmt: skip

# Decoders of blocks `model.layers` under `lm_head`, whose logits are the plain product, and whose
# attention takes any kernel: tests compare each with its own. Others (soft-capped or scaled
# logits, sliding windows, experts) would train to a wrong loss in silence.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3")
_WEIGHT_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]
_CHUNK_BYTES = 16 << 20
# Keys of config.json that change nothing of what the model computes.
_SAYS_NOTHING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The model to start from."""

    path: str = ""
    """Local Hugging Face folder (config.json, safetensors, tokenizer.json), or a model of the hub
    (OWNER/NAME[@REVISION]), taken from the local cache where it is there."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model that was found and checked."""

    folder: Path
    name: str
    """As the config has it: what an adapter's file says of its base."""
    digest: str
    """Of config.json's model and of every byte of its weights, hex."""


def resolve_base(name: str, *, online: bool = True, weights: bool = True) -> Path:
    """The local folder of a base; a hub id is looked up in the cache first, then downloaded.

    weights: False where config.json is enough, so that nothing larger is downloaded.
    """
    if not name:
        raise ConfigError("base.path is empty; give a local Hugging Face folder or a hub id")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"base.path: {folder} has no config.json; it is no model's folder")
        return folder
    owner, _, revision = name.partition("@")
    if owner.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise ConfigError(f"base.path: {name} is no folder, and no hub id (OWNER/NAME)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = _WEIGHT_FILES if weights else ["config.json"]
    options: dict[str, Any] = {"revision": revision or None, "allow_patterns": files}
    try:
        cached = Path(snapshot_download(owner, local_files_only=True, **options))
        if _is_whole(cached, weights=weights):
            return cached
    except (LocalEntryNotFoundError, FileNotFoundError):
        pass
    if not online:
        raise SetupError(
            f"base.path: {name} is not in this node's Hugging Face cache; download it there "
            "first, or give a folder that all nodes see"
        )
    try:
        cached = Path(snapshot_download(owner, **options))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise SetupError(f"base.path: {name} cannot be downloaded: {first}") from None
    if not _is_whole(cached, weights=weights):  # without a network the hub's client gives what is
        raise SetupError(
            f"base.path: {name} cannot be downloaded now, and the cache has but a part: {cached}"
        )
    return cached


def _is_whole(cached: Path, *, weights: bool) -> bool:
    """Whether a folder of the cache has what is needed; a download may have been interrupted."""
    try:
        return (cached / "config.json").is_file() and bool(not weights or HfWeights(cached).files)
    except ConfigError:
        return False


def open_base(folder: Path, name: str) -> Base:
    """Check a base and take its digest; reads every byte of the weights once."""
    weights = HfWeights(folder)
    weights.check(build(hf_config(folder)).model)
    written = json.loads((folder / "config.json").read_bytes())
    kept = {key: written[key] for key in sorted(written) if key not in _SAYS_NOTHING}
    hasher = xxhash.xxh3_128(json.dumps(kept, sort_keys=True).encode())
    total = sum(path.stat().st_size for path in weights.files)
    with Progress("base weights", total / 1e6, "MB", enabled=total > 1 << 30) as bar:
        for path in weights.files:
            hasher.update(path.name.encode())
            with open(path, "rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    hasher.update(chunk)
                    bar.update(len(chunk) / 1e6)
    return Base(folder=folder, name=name, digest=hasher.hexdigest())


def hf_config(folder: Path) -> Any:
    """config.json, refused by name where this runtime would compute something else."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"{folder / 'config.json'} cannot be read: {first}") from None
    if config.model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{folder} is a {config.model_type!r}; the models that can be fine-tuned here are "
            f"{', '.join(MODEL_TYPES)} (code that comes with a model is never run)"
        )
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if kinds or (config.model_type in ("mistral", "phi3") and config.sliding_window):
        raise ConfigError(
            f"{folder}: its attention has windows ({', '.join(sorted(kinds)) or 'sliding_window'} "
            f"of {config.sliding_window} tokens), which packed attention has not; a copy of the "
            'folder whose config.json says "sliding_window": null trains it with full attention'
        )
    if config.eos_token_id is None:
        raise ConfigError(
            f"{folder}: config.json names no eos_token_id, so the model could never be taught to "
            "end a text; set it there"
        )
    config.use_cache = False
    return config


def find_base(config: BaseConfig) -> Base:
    """Resolve, check and digest the base on rank 0, then find it on this rank; all call it."""
    base = on_rank_zero(lambda: open_base(resolve_base(config.path), config.path))
    # Rank 0 has downloaded it; a node that does not share its cache says so by name.
    return replace(base, folder=resolve_base(config.path, online=False))


def check_adapters(base: Base, lora: LoraConfig) -> None:
    """ConfigError for a layer or module that the base has not; takes no memory."""
    if lora.has_adapters:
        model = build(hf_config(base.folder)).model
        find_modules(model, lora.modules_to_save, find_targets(model, lora.target_modules))


def check_data(base: Base, dataset: Dataset) -> None:
    """DataRefused unless the shards were made with the base's tokenizer."""
    schema = dataset.manifest.schema
    config = hf_config(base.folder)
    if schema["vocab_size"] > config.vocab_size:
        raise DataRefused(
            f"the dataset's vocabulary has {schema['vocab_size']:,} tokens, the base {base.name} "
            f"{config.vocab_size:,}: it was made with another tokenizer"
        )
    file = base.folder / "tokenizer.json"
    if dataset.manifest.tokenizer_digest is None or not file.is_file():
        return
    ours, theirs = _core(dataset.read_tokenizer()), _core(file.read_bytes())
    differ = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    if differ:
        raise DataRefused(
            f"the dataset was made with another tokenizer than {file} (they differ in "
            f"{', '.join(differ)}); prepare it again with this one"
        )


def _core(tokenizer_json: bytes) -> dict[str, Any]:
    """What decides a text's ids."""
    record = json.loads(tokenizer_json)
    return {k: record.get(k) for k in ("model", "normalizer", "pre_tokenizer", "added_tokens")}


def build(config: Any) -> PackedDecoder:
    """The model on the meta device: no memory, no values."""
    from transformers import AutoModelForCausalLM

    register_packed_attention()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=PACKED_ATTENTION, dtype=torch.float32
        )
        return PackedDecoder(model)
