"""The stages of `leyden quickstart`: folders, the command a user would type, what came out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist.errors import LeydenError
from dist.local_files import write_atomic
from launch import export, generate, prep, report, train
from launch.corpus import write_corpus

VOCAB_SIZE = 4096
NUM_SPECIAL_TOKENS = 16
VALIDATION_FRACTION = 0.02
SEQ_LEN = 256
SAMPLE_PROMPT = "def "
SAMPLE_TOKENS = 60
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Folders and sizes of one quickstart; the smoke test has its own folders."""

    name: str = "quickstart"
    input_mb: float = 30.0
    shard_size_mib: float = 8.0
    nproc: int = 2
    overrides: tuple[str, ...] = ()
    """Arguments of the recipe besides those that every quickstart has."""
    gated: bool = True

    @property
    def words(self) -> tuple[str, ...]:
        """After `leyden`, what starts this plan."""
        return ("quickstart",) if self.gated else ("quickstart", "--smoke")

    @property
    def data(self) -> Path:
        return Path("data") / self.name

    @property
    def run(self) -> Path:
        return Path("runs") / self.name

    @property
    def model(self) -> Path:
        return self.run / "model"


def make_plan(*, smoke: bool, gpus: int) -> Plan:
    """The full quickstart, or the one that the tests run (2 MB, 20 steps)."""
    # NCCL takes one rank a GPU; without GPUs two gloo ranks show that it is distributed.
    nproc = 1 if gpus == 1 else 2
    if not smoke:
        return Plan(nproc=nproc)
    return Plan(
        name="quickstart-smoke",
        input_mb=2.0,
        shard_size_mib=1.0,
        nproc=nproc,
        # Small steps: 20 of them take seconds and still cross a checkpoint and a validation.
        overrides=(
            *("--max_steps", "20", "--global_batch", "4", "--micro_batch", "2"),
            *("--val_rows", "16", "--save_every_steps", "10"),
        ),
        gated=False,
    )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the path: what it is, the words a user would type, and how it is done."""

    name: str
    what: str
    output: Path
    """Gone = the stage has to be done again."""
    words: tuple[str, ...]
    """After `leyden`; empty if no verb does this alone."""
    run: Callable[[], Result]


class StageFailed(LeydenError):
    """A stage's command ended with another code than 0; the same code ends the quickstart."""

    def __init__(self, stage: str, code: int) -> None:
        self.exit_code = code
        super().__init__(f"the stage `{stage}` ended with exit code {code}")


def stages(plan: Plan) -> list[Stage]:
    """All stages in order."""
    tokenizer, dataset = plan.data / "tokenizer", plan.data / "dataset"
    source = plan.data / "input"
    prep_tokenizer = (
        *("prep", "train-tokenizer", "--input", str(source), "--format", "text"),
        *("--vocab_size", str(VOCAB_SIZE), "--num_special_tokens", str(NUM_SPECIAL_TOKENS)),
        *("--output", str(tokenizer)),
    )
    prep_shards = (
        *("prep", "tokenize-text", "--input", str(source), "--format", "text"),
        *("--tokenizer", str(tokenizer), "--seq_len", str(SEQ_LEN)),
        *("--validation_fraction", str(VALIDATION_FRACTION)),
        *("--shard_size_mib", str(plan.shard_size_mib), "--output", str(dataset)),
    )
    training = (
        *("train", "pretrain", "--config", "tiny", "--nproc", str(plan.nproc)),
        *("--run", plan.name, "--data.url", str(dataset), *plan.overrides),
    )
    exporting = ("export", plan.name, "--output", str(plan.model))
    sampling = (
        *("generate", str(plan.model), "--prompt", SAMPLE_PROMPT),
        *("--max_new_tokens", str(SAMPLE_TOKENS), "--temperature", "0.8", "--top_k", "40"),
    )
    reporting = ("report", plan.name)
    return [
        Stage(
            name="collect",
            what=f"{plan.input_mb:.0f} MB of this machine's Python sources, a file a document",
            output=source,
            words=(),
            run=lambda: write_corpus(source, int(plan.input_mb * 1e6)),
        ),
        Stage(
            name="tokenizer",
            what=f"Spark samples the text; a byte-level BPE of {VOCAB_SIZE:,} tokens",
            output=tokenizer / "tokenizer.json",
            words=prep_tokenizer,
            run=lambda: _job(prep_tokenizer, "tokenizer"),
        ),
        Stage(
            name="shards",
            what="Spark tokenizes, shuffles, packs: immutable shards named by their digest",
            output=dataset / "LATEST",
            words=prep_shards,
            run=lambda: _shards(prep_shards, dataset),
        ),
        Stage(
            name="verify",
            what="every byte against the manifest",
            output=dataset / "LATEST",
            words=("data", "verify", str(dataset)),
            run=lambda: _verify(dataset),
        ),
        Stage(
            name="train",
            what=f"a 4M-parameter Llama on {plan.nproc} ranks, FSDP2, activation checkpointing",
            output=plan.run / "outcome.json",
            words=training,
            run=lambda: _train(training, plan.run),
        ),
        Stage(
            name="baselines",
            what="unigram and bigram losses, counted from the same shards",
            output=dataset / "LATEST",
            words=(),
            run=lambda: _baselines(dataset, plan.run),
        ),
        Stage(
            name="export",
            what="the model as a Hugging Face folder: safetensors, tokenizer, model card",
            output=plan.model,
            words=exporting,
            run=lambda: _export(exporting, plan.model),
        ),
        Stage(
            name="sample",
            what="text by this tiny model: it shows that the path works, not what is good text",
            output=plan.model,
            words=sampling,
            run=lambda: _sample(sampling),
        ),
        Stage(
            name="report",
            what="one HTML file: loss, throughput, attempts, lineage, environment",
            output=plan.run / "report.html",
            words=reporting,
            run=lambda: _report(reporting, plan.run),
        ),
    ]


def _job(words: tuple[str, ...], title: str) -> Result:
    code = prep.main(list(words[1:]), title)
    if code:
        raise StageFailed(title, code)
    return {}


def _shards(words: tuple[str, ...], root: Path) -> Result:
    _job(words, "shards")
    from dist.dataset import open_dataset

    dataset = open_dataset(str(root))
    totals = dataset.manifest.totals
    return {
        "data_digest": dataset.data_digest,
        "shards": len(dataset.manifest.shards),
        "tokens": {split: counts["tokens"] for split, counts in totals.items()},
    }


def _verify(root: Path) -> Result:
    from dist.dataset import open_dataset
    from dist.verify import verify_full

    report = verify_full(open_dataset(str(root)))
    return {"shards": report.shards, "bytes": report.bytes}


def _train(words: tuple[str, ...], run: Path) -> Result:
    code = train.main(list(words[1:]), "train")
    if code:
        raise StageFailed("train", code)
    from dist.run_dir import RunDir

    outcome = RunDir(run).read_outcome() or {}
    if outcome.get("status") != "completed" or "validation_loss" not in outcome:
        raise LeydenError(
            f"the run {run} ended without a validation loss (outcome: {outcome}); "
            "look at its metrics.jsonl"
        )
    return outcome


def _baselines(root: Path, run: Path) -> Result:
    from dist.baselines import unigram_bigram
    from dist.dataset import open_dataset
    from dist.progress import Progress

    with Progress("baselines"):
        losses = dict(unigram_bigram(open_dataset(str(root))))
    # The run's report draws them beside the loss.
    write_atomic(run / "baselines.json", (json.dumps(losses, indent=1) + "\n").encode())
    return losses


def _export(words: tuple[str, ...], folder: Path) -> Result:
    # Exports are never overwritten; this one is ours, of a run that was redone.
    shutil.rmtree(folder, ignore_errors=True)
    code = export.main(list(words[1:]))
    if code:
        raise StageFailed("export", code)
    files = [path for path in folder.iterdir() if path.is_file()]
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def _sample(words: tuple[str, ...]) -> Result:
    code = generate.main(list(words[1:]))
    if code:
        raise StageFailed("sample", code)
    return {"prompt": SAMPLE_PROMPT, "tokens": SAMPLE_TOKENS}


def _report(words: tuple[str, ...], run: Path) -> Result:
    code = report.main(list(words[1:]))
    if code:
        raise StageFailed("report", code)
    return {"bytes": (run / "report.html").stat().st_size}


def came_out(name: str, result: Result) -> str:
    """One phrase on what a stage produced."""
    if name == "collect":
        return f"{result['files']:,} files, {result['bytes'] / 1e6:.1f} MB"
    if name == "tokenizer":
        return f"{VOCAB_SIZE:,} tokens, {NUM_SPECIAL_TOKENS} of them special"
    if name == "shards":
        tokens = ", ".join(f"{split} {count:,}" for split, count in result["tokens"].items())
        return f"{result['shards']} shards; tokens: {tokens}"
    if name == "verify":
        return f"{result['bytes'] / 1e6:.1f} MB hashed, all as the manifest says"
    if name == "train":
        return f"{result['step']:,} steps, {result.get('tokens', 0):,} tokens"
    if name == "export":
        return f"{result['files']} files, {result['bytes'] / 1e6:.1f} MB"
    if name == "sample":
        return f"up to {result['tokens']} tokens after {result['prompt']!r}, by a tiny model"
    if name == "report":
        return f"report.html, {result['bytes'] / 1e3:.0f} kB"
    return f"{result['targets']:,.0f} validation targets"
