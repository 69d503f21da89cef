"""A trained model by name: the checkpoint of a run, or an exported folder; no recipe, but what
the recipes that use a model (evaluate, generate, export) share."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from dist.attention import PACKED_ATTENTION, register_packed_attention
from dist.checkpoint import find_checkpoint, read_record
from dist.checkpoint_folder import saved_steps
from dist.config import parse_config
from dist.dataset import Dataset, open_dataset
from dist.errors import ConfigError, DataRefused, LeydenError, SetupError
from dist.export_hf import DTYPES, SpecialTokens, build_empty, load_weights
from dist.model_folder import LEYDEN_JSON, ModelPlace, find_model
from dist.model_folder import read_record as read_leyden_json
from dist.run_dir import RunDir
from dist.tokenizer import tokenizer_digest
from dist.url_path import Place
from recipes import llama, tuned

Config = TypeVar("Config")
STANDARD_ATTENTION = "sdpa"


@dataclass(frozen=True, kw_only=True)
class DataRef:
    """A dataset by reference."""

    url: str = ""
    """Dataset folder or URL, or URL@DIGEST; empty: the one that the model was trained on."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model that has been found but not yet loaded, and what is known of it."""

    place: ModelPlace
    special: SpecialTokens
    tokenizer_json: bytes
    vocab_size: int
    data: str = ""
    """Reference of the dataset that it was trained on; '' where that is not known."""
    data_digest: str = ""
    seq_len: int = 0
    """Longest context that it was trained on, in tokens; 0: unknown."""
    step: int = -1
    """Optimizer steps that it was trained for; -1: unknown."""
    checkpoint: Place | None = None
    """Its checkpoint, for a run."""
    record: dict[str, Any] = field(default_factory=dict)
    """The checkpoint's record, or leyden.json."""
    schema: dict[str, Any] = field(default_factory=dict)
    """Schema of the run's dataset."""
    template: str = ""
    """Chat template (jinja); '' without one."""
    base_path: str = ""
    """Where a fine-tuned run's base is now; '' where it was."""

    @property
    def name(self) -> str:
        at = f" at step {self.step}" if self.step >= 0 else ""
        return f"{self.place.path}{at}"

    @property
    def tokenizer_digest(self) -> str:
        """SHA-256 of the dataset's tokenizer.json; an exported one may add a post-processor."""
        return str(self.record.get("tokenizer_digest") or tokenizer_digest(self.tokenizer_json))


def open_trained(
    place: ModelPlace, *, step: int = 0, data_url: str = "", base_path: str = ""
) -> Trained:
    """Find the checkpoint (0: the newest valid one), the vocabulary and the tokenizer.

    `data_url` says where the run's dataset is now, should it have moved; another dataset there is
    ignored. `base_path`: likewise the base of a fine-tuned run.
    """
    if not place.is_run:
        if step:
            raise ConfigError(f"{place.path} is an exported model: it has no other --step")
        return _open_folder(place)
    checkpoint = _choose_checkpoint(RunDir(place.path), step)
    record = read_record(checkpoint)
    dataset = _dataset_of(record["data"], data_url, place)
    reference, digest = str(record["data"]), record["data"].rpartition("@")[2]
    if dataset.data_digest == digest:
        reference = dataset.reference  # where it is now
    # A dataset that only lends its tokenizer may have rows of another length.
    schema = (RunDir(place.path).read_run() or {}).get("schema") or dataset.manifest.schema
    tokenizer_json = dataset.read_tokenizer()
    return Trained(
        place=place,
        special=SpecialTokens.of(tokenizer_json, schema.get("bos_id"), schema.get("eos_id")),
        tokenizer_json=tokenizer_json,
        vocab_size=int(schema["vocab_size"]),
        data=reference,
        data_digest=digest,
        seq_len=int(schema["seq_len"]),
        step=int(record["order"]["step"]),
        checkpoint=checkpoint,
        record=record,
        schema=schema,
        template=_template_of(dataset, schema.get("template_digest")),
        base_path=base_path,
    )


def _open_folder(place: ModelPlace) -> Trained:
    """An exported folder; one without leyden.json is taken for what its config.json says."""
    config = json.loads((place.path / "config.json").read_bytes())
    record = read_leyden_json(place.path) if (place.path / LEYDEN_JSON).exists() else {}
    try:
        tokenizer_json = (place.path / "tokenizer.json").read_bytes()
    except FileNotFoundError:
        raise DataRefused(f"{place.path} has no tokenizer.json") from None
    bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
    if isinstance(eos, list):  # some published models have several ends; the first ends a text
        eos = eos[0] if eos else None
    return Trained(
        place=place,
        special=SpecialTokens.of(tokenizer_json, bos, eos),
        tokenizer_json=tokenizer_json,
        vocab_size=int(config["vocab_size"]),
        data=record.get("data", ""),
        data_digest=record.get("data_digest", ""),
        seq_len=int(record.get("seq_len", 0)),
        step=int(record.get("step", -1)),
        record=record,
        template=_template_in(place.path),
    )


def _template_of(dataset: Dataset, digest: str | None) -> str:
    """The chat template that a dataset was made with; '' if it is gone or there was none."""
    if not digest:
        return ""
    try:
        return dataset.storage.read(f"templates/{digest}.jinja").decode()
    except FileNotFoundError:
        return ""


def _template_in(folder: Path) -> str:
    """The chat template of a Hugging Face folder."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    try:
        said = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return ""
    return str(said.get("chat_template") or "")


def _choose_checkpoint(run: RunDir, step: int) -> Place:
    """The newest valid checkpoint, or the newest of `step`; says why others were passed over."""
    checkpoints = run.checkpoints
    checkpoint, problems = find_checkpoint(checkpoints, step=step)
    if checkpoint is not None:
        for problem in problems:
            print(f"passed over the checkpoint {problem}", file=sys.stderr)
        return checkpoint
    if problems:
        raise DataRefused(f"{run.path} has no valid checkpoint: {'; '.join(problems)}")
    what = f"of step {step}" if step else "yet; it saves at `save_every_steps` and at its end"
    have = saved_steps(checkpoints)
    hint = f"; it has steps {', '.join(map(str, have))}" if have else ""
    raise ConfigError(f"{run.path} has no checkpoint {what}{hint} (looked in {checkpoints})")


def _dataset_of(reference: str, data_url: str, place: ModelPlace) -> Dataset:
    """The run's own dataset, where it was or at `data_url`.

    Where it is gone, another one of the same tokenizer at `data_url` gives the vocabulary.
    """
    digest = reference.rpartition("@")[2]
    given = open_dataset(data_url) if data_url else None
    if given is not None and given.data_digest == digest:
        return given
    try:
        return open_dataset(reference)
    except (ConfigError, DataRefused, SetupError, OSError) as error:
        wanted = (RunDir(place.path).read_run() or {}).get("tokenizer_digest", "")
        if given is not None and wanted and given.manifest.tokenizer_digest == wanted:
            return given
        hint = "if the dataset was moved, pass --data.url FOLDER"
        if wanted:
            hint += f"; any dataset made with the tokenizer {wanted[:12]} will do"
        text = (
            f"the run {place.path} was trained on {reference}, which cannot be opened ({error}); "
            f"{hint}"
        )
        raise (type(error) if isinstance(error, LeydenError) else DataRefused)(text) from None


def load_model(trained: Trained, device: torch.device, *, packed: bool, dtype: str = "auto") -> Any:
    """The transformers model in evaluation mode, on `device`.

    packed: attention within documents, for rows of a dataset (needs the keyword `packed`);
    otherwise standard attention, which can generate. dtype: fp32, bf16 or auto (as stored).
    """
    register_packed_attention()
    attention = PACKED_ATTENTION if packed else STANDARD_ATTENTION
    if trained.checkpoint is None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            trained.place.path, attn_implementation=attention, dtype=DTYPES.get(dtype, "auto")
        )
    else:
        model = load_run(trained)
        model.set_attn_implementation(attention)
        if dtype != "auto":
            model = model.to(DTYPES[dtype])
    return model.to(device).eval()


def load_spread(
    trained: Trained, *, device_map: str, dtype: str, max_memory: Any, offload_folder: str
) -> Any:
    """An exported model over several devices, memory and disk, by accelerate; to generate."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        trained.place.path,
        dtype=DTYPES.get(dtype, "auto"),
        attn_implementation=STANDARD_ATTENTION,
        device_map=device_map,
        max_memory=max_memory,
        offload_folder=offload_folder or None,
    ).eval()


def load_run(trained: Trained) -> Any:
    """A run's model, whole, in fp32 on the CPU; adapters merged into their base."""
    from transformers import LlamaForCausalLM

    assert trained.checkpoint is not None
    if tuned.is_tuned(trained.record):
        base = tuned.base_of(trained.place.path, trained.record, trained.base_path)
        return tuned.load_tuned(trained.checkpoint, trained.record, base)
    register_packed_attention()
    shape = trained.record["config"].get("model", {})
    try:
        config = llama.ModelConfig(**shape)
    except TypeError as error:
        raise ConfigError(
            f"the model of {trained.place.path} is not a recipes.llama.ModelConfig ({error}); a "
            "recipe of your own needs its own copy of recipes/trained.py"
        ) from None
    model = build_empty(lambda: LlamaForCausalLM(llama.hf_config(config, trained.schema)))
    load_weights(trained.checkpoint, model)
    return model


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {name}: this machine shows no GPU; pass --device cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is not auto, cpu or cuda[:N]") from None


def parse_words(cls: type[Config], words: Sequence[str], *, verb: str, description: str) -> Config:
    """A recipe's Config from `RUN|FOLDER --key value ...`; a bare `--flag` means true."""
    left = list(words)
    if left and not left[0].startswith("-"):
        left = ["--model", *left]
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    flags = {f"--{one.name}" for one in fields if hints[one.name] is bool}
    argv: list[str] = []
    for word, following in zip(left, [*left[1:], "--"], strict=True):
        argv.append(word)
        if word in flags and following.startswith("--"):
            argv.append("true")
    return parse_config(cls, argv, prog=f"leyden {verb}", description=description)


def resolve(word: str, run_root: str, *, only_run: bool = False) -> ModelPlace:
    """find_model for a recipe's `model` key."""
    if not word:
        raise ConfigError("no model: name a run or an exported folder first")
    return find_model(word, run_root, only_run=only_run)


def quiet() -> None:
    """For a command's main: no bars for files that load at once, no hints of other libraries."""
    from transformers.utils import logging

    if not torch.cuda.is_available():
        # accelerate imports deepspeed where it is installed, which warns that it sees no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    logging.set_verbosity_error()
