"""Write a run's model as a Hugging Face folder: safetensors, tokenizer, model card, digests.

    leyden export RUN [--output FOLDER] [--step N] [--dtype bf16] [--max_shard_size 5GB]
    leyden export RUN --merge          # fine-tuned with adapters: one model, base and all
    python -m recipes.export RUN ...

A run of adapters becomes a peft adapter folder, unless --merge is given.

One process and no GPU are enough, however many ranks trained the model. The folder loads with
transformers.AutoModelForCausalLM.from_pretrained; `leyden data verify FOLDER` checks it.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dist.dataset import open_dataset
from dist.errors import ConfigError, LeydenError, run_main
from dist.export_hf import (
    DTYPES,
    model_card,
    plain,
    publish_folder,
    write_folder,
)
from dist.run_dir import RunDir
from dist.versions import code_version, library_versions
from recipes import tuned
from recipes.causal_lm import Base, BaseConfig
from recipes.trained import (
    DataRef,
    Trained,
    load_run,
    open_trained,
    parse_words,
    quiet,
    resolve,
)

LIBRARIES = ("torch", "transformers", "pytorch-lightning", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to export, and where to."""

    model: str = ""
    """The run: its name in run_root, or the path of its folder. Comes first, without --model."""
    output: str = ""
    """Folder to write, which must not exist; empty: RUN/exported/step-N."""
    step: int = 0
    """Optimizer step of the checkpoint to take; 0: the newest valid one."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights; fp32 is what was trained."""
    max_shard_size: str = "5GB"
    """Largest size of one safetensors file, as 5GB or 500MB."""
    merge: bool = False
    """Of a run of adapters: add them to the base and write the whole model."""
    base: BaseConfig = field(default_factory=BaseConfig)
    """Where a fine-tuned run's base is now, if it has moved."""
    data: DataRef = field(default_factory=DataRef)
    """Where the run's dataset is now, if it has moved; the tokenizer comes from there."""
    run_root: str = "runs"
    """Where runs lie."""


def run(config: Config) -> Path:
    """Export; returns the folder."""
    place = resolve(config.model, config.run_root, only_run=True)
    trained = open_trained(
        place, step=config.step, data_url=config.data.url, base_path=config.base.path
    )
    assert trained.checkpoint is not None
    is_tuned = tuned.is_tuned(trained.record)
    adapters = is_tuned and tuned.has_adapters(trained.record)
    if config.merge and not adapters:
        raise ConfigError(f"{place.path} trained all of its weights: there is nothing to --merge")
    suffix = "-merged" if config.merge else "-adapter" if adapters else ""
    suffix += "" if config.dtype == "fp32" else f"-{config.dtype}"
    usual = place.path / "exported" / f"step-{trained.step}{suffix}"
    folder = Path(config.output) if config.output else usual
    if folder.exists():  # said before minutes of loading; write_folder checks again
        raise ConfigError(f"{folder} exists; exports are not overwritten: give another --output")
    base = tuned.base_of(place.path, trained.record, config.base.path) if is_tuned else None
    if adapters and not config.merge:
        assert base is not None
        model = tuned.load_tuned(trained.checkpoint, trained.record, base, merged=False)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        facts = lineage(trained, config.dtype, trainable) | base_facts(base, adapter=True)
        card = card_of(facts)
        fill = tuned.adapter_writer(
            model, trained.record, base, card, DTYPES[config.dtype], trained.template
        )
        size = publish_folder(folder, fill, facts)
    else:
        model = load_run(trained).to(DTYPES[config.dtype])
        model.config.use_cache = True
        facts = lineage(trained, config.dtype, sum(p.numel() for p in model.parameters()))
        facts |= base_facts(base, adapter=False) if base is not None else {}
        size = write_folder(
            model,
            folder,
            tokenizer_json=trained.tokenizer_json,
            special=trained.special,
            facts=facts,
            card=card_of(facts),
            max_shard_size=config.max_shard_size,
            beside=tuned.tokenizer_files(base) if base is not None else (),
            template=trained.template,
        )
    print(f"{folder}: {facts['run']} at step {trained.step}, {config.dtype}, {size / 1e6:,.1f} MB")
    return folder


def lineage(trained: Trained, dtype: str, params: int) -> dict[str, Any]:
    """Everything that the model came from, as leyden.json keeps it."""
    assert trained.checkpoint is not None
    run_dir = RunDir(trained.place.path)
    identity = run_dir.read_run() or {}
    attempt = int(trained.checkpoint.name.rpartition("-a")[2])
    outcome = _read(run_dir.attempt_dir(attempt) / "outcome.json")
    started_with = _read(run_dir.attempt_dir(attempt) / "env.json")
    try:
        dataset = open_dataset(trained.data)
        prepared, totals = dataset.read_provenance() or {}, dataset.manifest.totals
    except (LeydenError, OSError):  # gone; another dataset has lent its tokenizer
        prepared, totals = {}, {}
    evaluated = _read(run_dir.path / "eval.json")
    same_step = evaluated.get("step") == trained.step
    metrics = dict(trained.record.get("facts", {}))
    if same_step:
        metrics |= {f"eval_{key}": evaluated[key] for key in ("data", "split", "rows", "loss")}
    environment: dict[str, Any] = {
        **library_versions(LIBRARIES),
        "platform": started_with.get("platform", ""),
        "python_of_training": started_with.get("python", ""),
        **{f"{k}_of_training": v for k, v in started_with.get("libraries", {}).items()},
    }
    environment |= {key: outcome.get(key, "") for key in ("ranks", "strategy", "precision")}
    facts = {
        "run": run_dir.name,
        "run_id": identity.get("run_id", ""),
        "recipe": identity.get("recipe", ""),
        "step": trained.step,
        "checkpoint": trained.checkpoint.name,
        "attempts": len(list(run_dir.path.glob("attempts/*"))),
        "dtype": dtype,
        "params": params,
        "seq_len": trained.seq_len,
        "data": trained.data,
        "data_digest": trained.data_digest,
        "tokenizer_digest": trained.tokenizer_digest,
        "data_job": prepared.get("job", ""),
        "data_code": prepared.get("code", ""),
        "data_inputs": len(prepared.get("inputs", [])),
        "data_totals": totals,
        "code": code_version(),
        "code_of_training": started_with.get("code", ""),
        "config": trained.record["config"],
        "config_digest": identity.get("config_digest", ""),
        "metrics": metrics,
        "environment": environment,
    }
    return dict(plain(facts))


def base_facts(base: Base, *, adapter: bool) -> dict[str, Any]:
    """What leyden.json adds of a fine-tuned model."""
    kind = "peft_adapter" if adapter else "exported_model"
    return {"kind": kind, "base": base.name, "base_digest": base.digest}


def card_of(facts: dict[str, Any]) -> str:
    """README.md of the exported folder."""
    told = "run", "run_id", "recipe", "step", "checkpoint", "attempts", "config_digest"
    told = (*told, "base", "base_digest") if "base" in facts else told  # type: ignore[assignment]
    data = "data_digest", "tokenizer_digest", "data", "data_job", "data_code", "data_inputs"
    groups = {
        "Metrics": facts["metrics"],
        "Lineage": {
            **{key: facts[key] for key in (*told, *data)},
            "exported by": facts["code"],
            "trained by": facts["code_of_training"],
        },
        "Data": facts["data_totals"],
        "Resolved config": facts["config"],
        "Environment": facts["environment"],
    }
    trained = (
        f"trained by Leyden for {facts['step']:,} steps on rows of {facts['seq_len']:,} tokens of "
        f"the dataset `{facts['data_digest']}`"
    )
    size = f"{facts['params']:,} parameters ({facts['dtype']})"
    if facts.get("kind") == "peft_adapter":
        summary = f"A peft adapter of {size} on `{facts['base']}`, {trained}."
    elif "base" in facts:
        summary = f"`{facts['base']}`, fine-tuned: {size}, {trained}."
    else:
        summary = (
            f"A Llama of {size} from random weights, {trained}. It is a base model: it continues "
            "text, and was not tuned to follow instructions or checked for safety."
        )
    groups = {name: {k: v for k, v in group.items() if v != ""} for name, group in groups.items()}
    return model_card(
        facts["run"],
        summary,
        groups,
        base=facts.get("base", ""),
        adapter=facts.get("kind") == "peft_adapter",
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError):
        return {}


def main() -> int:
    """Parse the command line and export."""
    # SIGTERM unwinds, so that the temporary folder goes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    quiet()
    run(parse_words(Config, sys.argv[1:], verb="export", description=__doc__ or ""))
    return 0


if __name__ == "__main__":
    run_main(main)
