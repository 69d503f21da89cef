"""Loss and perplexity of a trained model on a dataset, in all and by source.

    leyden eval RUN|FOLDER [--data.url REF] [--split validation] [--rows N] [--json]
    leyden eval RUN|FOLDER --tasks arc_easy,piqa [--limit N]     # lm-evaluation-harness
    python -m recipes.evaluate RUN|FOLDER ...

RUN is the newest valid checkpoint of a run, FOLDER an exported model. Without --data.url it is
the dataset that the model was trained on, and the loss on all of `validation` is the run's own
final validation loss. A run keeps the result as eval.json.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist import strict_json
from dist.attention import packed_info
from dist.batch import Batch
from dist.dataset import Dataset, open_dataset
from dist.errors import ConfigError, DataRefused, run_main
from dist.examples import rows_as_trained
from dist.lineage import input_paths
from dist.loader import LoaderPlan, TokenLoader
from dist.loss import chunk_tokens
from dist.order import SequentialOrder
from dist.precision import decide_precision
from dist.progress import Progress
from dist.run_dir import RunDir
from dist.split_table import SplitTable
from dist.verify import ShardVerifier, check_presence
from recipes.causal_lm import BaseConfig
from recipes.eval_tasks import check_tasks, run_tasks, tasks_table
from recipes.trained import (
    DataRef,
    Trained,
    choose_device,
    load_model,
    open_trained,
    parse_words,
    quiet,
    resolve,
)

TOP_SOURCES = 20


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to evaluate, and on which rows."""

    model: str = ""
    """The run or the exported folder. Comes first, without --model."""
    data: DataRef = field(default_factory=DataRef)
    """The dataset; it must have been made with the model's tokenizer."""
    base: BaseConfig = field(default_factory=BaseConfig)
    """Where a fine-tuned run's base is now, if it has moved."""
    split: str = "validation"
    """Split of the dataset."""
    rows: int = 0
    """Rows to use, the first ones; 0: all."""
    step: int = 0
    """Of a run: the optimizer step of the checkpoint to take; 0: the newest valid one."""
    micro_batch: int = 8
    """Rows computed at once."""
    precision: Literal["auto", "fp32", "bf16-mixed"] = "auto"
    """auto: as the run was trained; fp32 for a folder."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu or cuda."""
    tasks: str = ""
    """Tasks of lm-evaluation-harness instead, separated by commas (an extra: leyden[eval])."""
    tasks_folder: str = ""
    """With tasks: folder of task YAML files of your own."""
    limit: int = 0
    """With tasks: examples of each; 0: all."""
    num_fewshot: int = -1
    """With tasks: examples shown in each prompt; -1: as the task says."""
    chat: bool = False
    """With tasks: prompts go through the model's chat template."""
    json: bool = False
    """Print one JSON object instead of the table."""
    run_root: str = "runs"
    """Where runs lie."""


def run(config: Config) -> dict[str, Any]:
    """Evaluate; returns what eval.json holds."""
    if config.rows < 0 or config.micro_batch < 1:
        raise ConfigError(f"rows {config.rows} must be >= 0, micro_batch {config.micro_batch} >= 1")
    place = resolve(config.model, config.run_root)
    device = choose_device(config.device)
    trained = open_trained(
        place, step=config.step, data_url=config.data.url, base_path=config.base.path
    )
    dataset = open_data(trained, config.data.url)
    if config.split not in dataset.manifest.splits():
        have = ", ".join(dataset.manifest.splits())
        raise ConfigError(f"{dataset.reference} has no split {config.split!r}; it has {have}")
    check_presence(dataset)
    decided = decide_precision(precision_of(config, trained), device)
    model = load_model(trained, device, packed=True)
    split = dataset.split(config.split)
    num_rows = min(config.rows or split.num_rows, split.num_rows)
    autocast = decided.compute_dtype if decided.name != "fp32" else None
    with tempfile.TemporaryDirectory() as scratch:
        stamps = place.path / "verified" if place.is_run else Path(scratch)
        verifier = ShardVerifier(dataset, split, stamps)
        plan = LoaderPlan(batch=config.micro_batch, micro_batch=config.micro_batch, end_t=num_rows)
        order = SequentialOrder(split.num_rows)
        with TokenLoader(dataset, split, order, plan, verifier=verifier) as loader:
            sums = score(model, loader, dataset, split, num_rows, device, autocast)
    result = {
        "model": str(place.path),
        "step": trained.step,
        "checkpoint": trained.checkpoint.name if trained.checkpoint else "",
        "data": dataset.reference,
        "split": config.split,
        "rows": num_rows,
        "precision": str(decided),
        "device": str(device),
        **measures(sums[:, 0].sum(), sums[:, 1].sum()),
        "sources": by_source(sums, source_names(dataset, len(sums))),
    }
    if place.is_run:
        text = strict_json.dumps(result, indent=1, sort_keys=True) + "\n"
        RunDir(place.path).write("eval.json", text.encode())
    return result


def run_harness(config: Config) -> dict[str, Any]:
    """Evaluate on tasks; returns what eval_tasks.json holds."""
    names = check_tasks(config.tasks)
    place = resolve(config.model, config.run_root)
    trained = open_trained(
        place, step=config.step, data_url=config.data.url, base_path=config.base.path
    )
    tasks = run_tasks(
        trained, choose_device(config.device), names, folder=config.tasks_folder,
        limit=config.limit, num_fewshot=config.num_fewshot, batch_size=config.micro_batch,
        chat=config.chat,
    )  # fmt: skip
    result = {
        "model": str(place.path),
        "step": trained.step,
        "checkpoint": trained.checkpoint.name if trained.checkpoint else "",
        "harness": version("lm-eval"),
        "limit": config.limit,
        "tasks": tasks,
    }
    if place.is_run:
        text = strict_json.dumps(result, indent=1, sort_keys=True) + "\n"
        RunDir(place.path).write("eval_tasks.json", text.encode())
    return result


def precision_of(config: Config, trained: Trained) -> Any:
    """What auto means: what a run decided when it was trained, not what this machine would."""
    if config.precision != "auto" or not trained.place.is_run:
        return "fp32" if config.precision == "auto" else config.precision
    outcome = RunDir(trained.place.path).read_outcome() or {}
    said = str(outcome.get("precision", "")).partition(" ")[0]
    return said or trained.record["config"].get("precision", "auto")


def open_data(trained: Trained, url: str) -> Dataset:
    """The dataset to evaluate on; DataRefused if its tokens are another vocabulary's."""
    if not url and not trained.data:
        raise ConfigError(
            f"{trained.place.path} does not say what it was trained on; pass --data.url FOLDER"
        )
    try:
        dataset = open_dataset(url or trained.data)
    except ConfigError as error:
        hint = "" if url else " (or, if it was moved, --data.url FOLDER)"
        raise ConfigError(f"{error}{hint}") from None
    if len(dataset.sources) > 1:
        have = ", ".join(one.storage.url for one in dataset.sources)
        raise ConfigError(
            f"{trained.place.path} was trained on several sources; pass one of them as --data.url: "
            f"{have}"
        )
    if dataset.manifest.tokenizer_digest != trained.tokenizer_digest:
        raise DataRefused(
            f"{dataset.reference} was made with the tokenizer {dataset.manifest.tokenizer_digest}, "
            f"{trained.place.path} was trained with {trained.tokenizer_digest}: its ids mean other "
            "text. Run `leyden prep tokenize-text` with the model's tokenizer"
        )
    return rows_as_trained(dataset, trained.record.get("config") or {})


@torch.no_grad()
def score(
    model: Any, loader: TokenLoader, dataset: Dataset, split: SplitTable, num_rows: int,
    device: torch.device, autocast: torch.dtype | None,
) -> NDArray[np.float64]:  # fmt: skip
    """(inputs, 2): the sum of losses in nats and the number of targets of each input file."""
    lineage = _Lineage(dataset, split)
    losses, targets = np.zeros(0), np.zeros(0)
    with Progress("eval", num_rows, "rows") as bar:
        for batch in loader:
            here = batch.to(device)
            losses_NS = token_losses(model, here, autocast).double().cpu().numpy()
            doc_ids, valid, rows = (x.numpy() for x in (batch.doc_ids, batch.valid, batch.rows))
            for row, key in enumerate(rows.tolist()):
                if key < 0:  # padding
                    continue
                inputs = lineage.inputs_of(key)
                keep = valid[row]
                grown = max(len(losses), int(inputs.max(initial=-1)) + 1)
                losses, targets = (np.pad(x, (0, grown - len(x))) for x in (losses, targets))
                # doc_ids number the pieces of the whole micro-batch; a row's first is its piece 0.
                owner = inputs[(doc_ids[row] - doc_ids[row, 0])[keep]]
                losses += np.bincount(owner, losses_NS[row][keep], grown)
                targets += np.bincount(owner, minlength=grown)
            mean = losses.sum() / max(targets.sum(), 1)
            bar.update(int((rows >= 0).sum()), f"loss {mean:.3f}")
    lineage.close()
    return np.stack((losses, targets), axis=1)


def token_losses(model: Any, batch: Batch, autocast: torch.dtype | None) -> Tensor:
    """-log p of each target of a batch in nats, (n, seq) fp32, logits a chunk at a time."""
    tokens = batch.tokens.long()
    dtype = autocast or model.model.embed_tokens.weight.dtype
    with torch.autocast(tokens.device.type, autocast, enabled=autocast is not None):
        hidden = model.model(
            input_ids=tokens[:, :-1],
            position_ids=batch.position_ids,
            use_cache=False,
            packed=packed_info(batch.doc_ids, batch.cu_seqlens, batch.max_len, dtype),
        ).last_hidden_state
        weight_VD = model.lm_head.weight
        hidden_ND, targets_N = hidden.flatten(0, 1), tokens[:, 1:].flatten()
        chunk = chunk_tokens(weight_VD.shape[0], hidden.device)
        parts = []
        for start in range(0, len(hidden_ND), chunk):
            logits_CV = torch.mm(hidden_ND[start : start + chunk], weight_VD.t()).float()
            wanted_C = targets_N[start : start + chunk]
            parts.append(torch.nn.functional.cross_entropy(logits_CV, wanted_C, reduction="none"))
    return torch.cat(parts).view(tokens.shape[0], -1)


class _Lineage:
    """Which input each document of a row came from; keeps one shard open, as rows go in order."""

    def __init__(self, dataset: Dataset, split: SplitTable) -> None:
        self._dataset, self._split = dataset, split
        self._number = -1
        self._shard: Any = None

    def inputs_of(self, row: int) -> NDArray[np.int64]:
        """(documents,) input index of each document of a row of the split."""
        numbers, local = self._split.locate(np.array([row]))
        if int(numbers[0]) != self._number:
            self.close()
            self._number = int(numbers[0])
            path = self._dataset.shard_path(self._split.shards[self._number])
            self._shard = self._split.open_shard(self._number, path)
        return np.array([piece[0] for piece in self._shard.lineage(int(local[0]))], np.int64)

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()
        self._shard, self._number = None, -1


def source_names(dataset: Dataset, num_inputs: int) -> list[str]:
    """The source of each input: the first folder or file that tells the inputs apart."""
    paths = [path for path, _ in input_paths(dataset)]
    paths += [f"input {number}" for number in range(len(paths), num_inputs)]
    return first_parts(paths)


def first_parts(paths: Sequence[str]) -> list[str]:
    """The first folder of each path, below what all of them have in common."""
    parts = [path.strip("/").split("/") for path in paths]
    depth = 0
    shortest = min((len(one) for one in parts), default=1)
    while depth < shortest - 1 and len({one[depth] for one in parts}) == 1:
        depth += 1
    return [one[depth] for one in parts]


def measures(loss_sum: float, num_targets: float) -> dict[str, Any]:
    """Loss in nats a target, perplexity, targets; null where there are no targets."""
    if not num_targets:
        return {"loss": None, "perplexity": None, "targets": 0}
    loss = float(loss_sum / num_targets)
    perplexity = math.exp(loss) if loss < 700 else None
    return {"loss": loss, "perplexity": perplexity, "targets": int(num_targets)}


def by_source(sums: NDArray[np.float64], names: Sequence[str]) -> list[dict[str, Any]]:
    """The sources with targets, largest first; beyond the top 20 as one entry."""
    totals: dict[str, NDArray[np.float64]] = {}
    for name, one in zip(names, sums, strict=False):
        totals[name] = totals.get(name, 0) + one
    found = [(name, total) for name, total in totals.items() if total[1] > 0]
    found.sort(key=lambda pair: (-pair[1][1], pair[0]))
    top, rest = found[:TOP_SOURCES], found[TOP_SOURCES:]
    if rest:
        top.append((f"({len(rest)} others)", np.sum([total for _, total in rest], axis=0)))
    return [{"source": name, **measures(*total)} for name, total in top]


def table(result: dict[str, Any]) -> str:
    """What is printed for people."""
    lines = [["source", "targets", "loss", "perplexity"]]
    for one in (*result["sources"], {"source": "all", **result}):
        loss, perplexity = (
            "-" if one[key] is None else f"{one[key]:,.{digits}f}"
            for key, digits in (("loss", 4), ("perplexity", 2))
        )
        # repr: a file name must not steer the terminal.
        lines.append([repr(one["source"])[1:-1], f"{one['targets']:,}", loss, perplexity])
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    text = [
        "  ".join((line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])))
        for line in lines
    ]
    at = f" at step {result['step']}" if result["step"] >= 0 else ""
    text.append(
        f"{result['model']}{at} on {result['rows']:,} rows of {result['split']} of "
        f"{result['data'][:-52]}, {result['precision']}; loss in nats/token"
    )
    return "\n".join(text)


def main() -> int:
    """Parse the command line and evaluate."""
    quiet()
    config = parse_words(Config, sys.argv[1:], verb="eval", description=__doc__ or "")
    result = run_harness(config) if config.tasks else run(config)
    show = tasks_table if config.tasks else table
    print(strict_json.dumps(result, indent=1, sort_keys=True) if config.json else show(result))
    return 0


if __name__ == "__main__":
    run_main(main)
