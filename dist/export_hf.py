"""A trained model as a Hugging Face folder: from a checkpoint's shards to files others can load.

One process, no GPU, no process group: torch's distributed checkpoint reads what any number of
ranks wrote into an unsharded model. The folder is written beside its final name and renamed, so
that nobody sees half of it.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import sys
import uuid
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from dist.checkpoint_url import reader_of
from dist.errors import ConfigError, DataRefused
from dist.model_folder import write_record
from dist.url_path import Place

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PAD_TEXTS = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>")


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of the tokens that frame a document, None where the dataset has none, and padding's."""

    bos: int | None
    eos: int | None
    pad: int

    @classmethod
    def of(cls, tokenizer_json: bytes, bos: int | None, eos: int | None) -> SpecialTokens:
        """Padding is the tokenizer's own token for it, else eos, else bos, else token 0."""
        import tokenizers

        made = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        found = [made.token_to_id(text) for text in _PAD_TEXTS]
        pads = [number for number in (*found, eos, bos, 0) if number is not None]
        return cls(bos=bos, eos=eos, pad=pads[0])


def build_empty(build: Callable[[], nn.Module]) -> nn.Module:
    """A Hugging Face model with memory, buffers and tied weights, but no first values: drawing
    them takes minutes for billions of parameters that a checkpoint overwrites."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = build()
    model.tie_weights()  # type: ignore[operator]
    return model


def load_weights(checkpoint: Place, model: nn.Module, prefix: str = "model.") -> None:
    """Fill a model's parameters and persistent buffers from a checkpoint, in this process alone.

    `prefix` stands before the names in the checkpoint, where the model was part of a larger
    module. The caller has checked the files (find_checkpoint does): `.metadata` is a pickle.
    """
    tensors = {
        prefix + name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad  # what is frozen is not in it
    }
    persistent = model.state_dict(keep_vars=True).keys()
    tensors |= {prefix + name: b for name, b in model.named_buffers() if name in persistent}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP warns that there is no process group
            dcp.load({"model": tensors}, storage_reader=reader_of(checkpoint), no_dist=True)
    except (RuntimeError, ValueError, KeyError, dcp.CheckpointException) as error:
        first = str(error).strip().splitlines()[-1]
        raise DataRefused(
            f"the checkpoint {checkpoint} does not hold this model ({first}); was recipes/llama.py "
            "changed since?"
        ) from error


def write_folder(
    model: Any,
    folder: Path,
    *,
    tokenizer_json: bytes,
    special: SpecialTokens,
    facts: dict[str, Any],
    card: str,
    max_shard_size: str = "5GB",
    beside: Iterable[Path] = (),
    template: str = "",
) -> int:
    """Write `model` (a transformers model) as `folder`; returns its bytes.

    `facts` (JSON) go into leyden.json and `card` is README.md; the files `beside` are copied and
    replace those that would be made; `template` is the chat template of the training, if it was
    one of chats. Raises ConfigError if the folder exists: an export is never
    overwritten.
    """

    def fill(temporary: Path) -> None:
        try:
            model.save_pretrained(temporary, max_shard_size=max_shard_size)
        except ValueError as error:
            raise ConfigError(f"max_shard_size {max_shard_size!r}: {error}; as in 5GB") from None
        _write_generation_config(model, temporary, special)
        (temporary / "tokenizer.json").write_bytes(framed_tokenizer(tokenizer_json, special))
        longest = int(model.config.max_position_embeddings)
        config = tokenizer_config(tokenizer_json, special, longest)
        (temporary / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
        for path in beside:
            shutil.copyfile(path, temporary / path.name)
        if template:
            (temporary / "chat_template.jinja").write_text(template)
        (temporary / "README.md").write_text(card)

    return publish_folder(folder, fill, facts)


def publish_folder(folder: Path, fill: Callable[[Path], None], facts: dict[str, Any]) -> int:
    """Let `fill` write files into a new folder, add leyden.json and show it whole; its bytes."""
    if folder.exists():
        raise ConfigError(f"{folder} exists; exports are not overwritten: give another --output")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    # ".tmp": git ignores it, and a person who finds it after a power cut knows what it is.
    owner = f"{socket.gethostname()}.{os.getpid()}"
    temporary = folder.with_name(f".{folder.name}.{owner}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir()
        fill(temporary)
        write_record(temporary, plain(facts))
        mode = 0o666 & ~_umask()  # safetensors makes files for their owner alone
        for path in temporary.iterdir():
            path.chmod(mode)
            _fsync(path)
        size = sum(path.stat().st_size for path in temporary.iterdir())
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return size


def _remove_leftovers(folder: Path) -> None:
    """Delete what killed exports to `folder` left, if they ran on this machine."""
    ours = re.escape(f".{folder.name}.{socket.gethostname()}.") + r"(\d+)\.[0-9a-f]{8}\.tmp"
    for path in folder.parent.iterdir():
        match = re.fullmatch(ours, path.name)
        if match is None or int(match[1]) == os.getpid():
            continue
        try:
            os.kill(int(match[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
            print(f"deleted {path}, which a killed export had left", file=sys.stderr)
        except OSError:
            continue  # alive, and somebody else's


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _publish(temporary: Path, folder: Path) -> None:
    _fsync(temporary)
    try:
        os.rename(temporary, folder)
    except OSError as error:  # somebody else made it meanwhile
        raise ConfigError(
            f"{folder} cannot take the export ({error.strerror}); give another --output"
        ) from None
    _fsync(folder.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_generation_config(model: Any, folder: Path, special: SpecialTokens) -> None:
    from transformers import GenerationConfig

    GenerationConfig(
        bos_token_id=special.bos,
        eos_token_id=special.eos,
        pad_token_id=special.pad,
        do_sample=True,
    ).save_pretrained(folder)


def framed_tokenizer(tokenizer_json: bytes, special: SpecialTokens) -> bytes:
    """tokenizer.json that begins a prompt as documents began in training: with bos, or without.

    transformers takes that from the file's post-processor alone. Training ignored it and framed
    documents itself; where both agree, the file stays byte for byte the dataset's.
    """
    import tokenizers

    made = tokenizers.Tokenizer.from_buffer(tokenizer_json)
    bare = made.encode("", add_special_tokens=True).ids
    if bare == ([] if special.bos is None else [special.bos]):
        return tokenizer_json
    first: list[Any] = []
    used: dict[Any, Any] = {}
    if special.bos is not None:
        text = made.id_to_token(special.bos)
        first = [{"SpecialToken": {"id": text, "type_id": 0}}]
        used = {text: {"id": text, "ids": [special.bos], "tokens": [text]}}
    one, two = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [*first, one],
        "pair": [*first, one, two],
        "special_tokens": used,
    }
    record = {**json.loads(tokenizer_json), "post_processor": template}
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()


def tokenizer_config(tokenizer_json: bytes, special: SpecialTokens, longest: int) -> dict[str, Any]:
    """tokenizer_config.json, which AutoTokenizer reads beside tokenizer.json."""
    import tokenizers

    made = tokenizers.Tokenizer.from_buffer(tokenizer_json)
    names = {"bos_token": special.bos, "eos_token": special.eos, "pad_token": special.pad}
    return {
        # Not LlamaTokenizer: transformers would build its own splitting of text for that.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: made.id_to_token(n) for name, n in names.items() if n is not None},
        "padding_side": "left",
        "model_max_length": longest,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def plain(value: Any) -> Any:
    """JSON that every reader takes: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def model_card(
    title: str, summary: str, facts: dict[str, Any], *, base: str = "", adapter: bool = False
) -> str:
    """README.md: what the model is, how to load it, and a table for each group of `facts`.

    Nested groups are written as YAML, as the resolved config is. base: the model that this one
    was fine-tuned from; adapter: the folder holds a peft adapter on it.
    """
    import yaml

    loading = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
    ]
    if adapter:
        loading[0] = "from peft import PeftModel\n" + loading[0]
        loading[2] = f'base = AutoModelForCausalLM.from_pretrained("{base}")'
        loading.append('model = PeftModel.from_pretrained(base, "path/to/this/folder")')
    lines = [
        "---",
        f"library_name: {'peft' if adapter else 'transformers'}",
        "pipeline_tag: text-generation",
        *([f"base_model: {json.dumps(base)}"] if base else []),
        "tags: [leyden]",
        "---",
        "",
        f"# {title}",
        "",
        summary,
        "",
        "```python",
        *loading,
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
        "",
        "`leyden data verify FOLDER` checks every byte against leyden.json.",
    ]
    for name, group in facts.items():
        lines += ["", f"## {name}", ""]
        if any(isinstance(value, dict) for value in group.values()):
            text = yaml.safe_dump(group, sort_keys=False, allow_unicode=True).rstrip()
            lines += ["```yaml", text, "```"]
        else:
            lines += ["| | |", "|---|---|"]
            lines += [f"| {key} | {_cell(value)} |" for key, value in group.items()]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
