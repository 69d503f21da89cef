"""What a run would need of each rank's memory and time, before any device is taken.

    leyden plan pretrain --config 8b --ranks 64 --device h100 --vocab_size 128256 --seq_len 8192
    leyden plan RECIPE --config NAME --data.url DATASET --ranks N [--sweep] [--json]
    python -m recipes.plan RECIPE ...

Takes the recipe's own module through one step on fake tensors (dist/memory_plan.py). RECIPE is a
file here or a path; it needs a Config and `module_to_plan(config, schema, precision)`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from dist.config import parse_config
from dist.dataset import open_dataset
from dist.devices import Device, find_device
from dist.errors import ConfigError, run_main
from dist.examples import as_rows
from dist.local_device import cpu_device
from dist.memory_plan import MAX_RANKS, Request, plan
from dist.memory_trace import GRADIENTS, OPTIMIZER, PARAMETERS
from dist.plan_text import GIB, Case, case_record, case_text, heading, line
from dist.step_time import step_time
from recipes import causal_lm

SUGGESTIONS = 3


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks for."""

    recipe: ModuleType
    name: str
    """The recipe's name."""
    config: Any
    schema: dict[str, Any]
    ranks: int
    device: Device


def options() -> argparse.ArgumentParser:
    """The options of our own; all others are the recipe's."""
    parser = argparse.ArgumentParser(
        prog="leyden plan",
        description="Memory and time of one rank, from one step of the recipe on fake tensors; "
        "all other options are the recipe's (--config NAME, --key value). Exit code 0: it fits, "
        "1: it does not.",
        epilog="example: leyden plan pretrain --config 8b --ranks 64 --device h100 "
        "--vocab_size 128256 --seq_len 8192",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe's name, or a path of a .py file")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks in all (1)")
    parser.add_argument("--device", default="h100", metavar="NAME",
                        help="h100, h200, a100-80, b200, l40s, ... (dist/devices.py), or cpu, "
                        "which is measured here (h100)")  # fmt: skip
    parser.add_argument("--memory-gib", type=float, default=0.0, metavar="X",
                        help="memory of a device, instead of the table's")  # fmt: skip
    parser.add_argument("--ranks-per-node", type=int, default=0, metavar="N",
                        help="devices of a node (8; rtx4090: 4)")  # fmt: skip
    parser.add_argument("--vocab_size", type=int, default=0, metavar="N",
                        help="of the tokenizer, where there is no --data.url yet")  # fmt: skip
    parser.add_argument("--seq_len", type=int, default=0, metavar="N",
                        help="tokens of a row, where there is no --data.url yet")  # fmt: skip
    parser.add_argument("--sweep", action="store_true",
                        help="a table of micro-batch x checkpointing x strategy")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def load_recipe(name: str) -> tuple[ModuleType, str]:
    """The module of a recipe and its short name; ConfigError if it says nothing to plan."""
    if name.endswith(".py"):
        path = Path(name)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise ConfigError(f"no such recipe file: {name}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        name = path.stem
    else:
        module = importlib.import_module(f"recipes.{name}")
    missing = [one for one in ("Config", "module_to_plan") if not hasattr(module, one)]
    if missing:
        raise ConfigError(
            f"the recipe {name} has no {' and no '.join(missing)}, so it cannot be planned; see "
            "module_to_plan in recipes/pretrain.py"
        )
    return module, name


def parse(words: Sequence[str]) -> tuple[Asked, argparse.Namespace]:
    """The command line as what is to be planned."""
    given, rest = options().parse_known_args([word for word in words if word != "--"])
    recipe, name = load_recipe(given.recipe)
    config = parse_config(
        recipe.Config, rest, prog=f"leyden plan {given.recipe}", description="",
        configs=Path(__file__).parent / "configs", prefix=f"{name}_",
    )  # fmt: skip
    device = find_device(given.device) if given.device != "cpu" else cpu_device(given.ranks)
    if given.memory_gib:
        device = replace(device, memory_gib=given.memory_gib)
    if given.ranks_per_node:
        device = replace(device, ranks_per_node=given.ranks_per_node)
    schema = schema_of(config.data, given.vocab_size or base_vocab(config), given.seq_len)
    asked = Asked(
        recipe=recipe, name=name, config=config, schema=schema, ranks=given.ranks, device=device
    )
    return asked, given


def base_vocab(config: Any) -> int:
    """Vocabulary of the base that a config fine-tunes, where there is no dataset; 0 without one."""
    base = getattr(config, "base", None)
    if config.data.url or not isinstance(base, causal_lm.BaseConfig):
        return 0
    return int(causal_lm.hf_config(causal_lm.resolve_base(base.path, weights=False)).vocab_size)


def schema_of(data: Any, vocab_size: int, seq_len: int) -> dict[str, Any]:
    """Vocabulary and row length: the dataset's, or as given."""
    if data.url:
        schema = as_rows(open_dataset(data.url), data.packing, data.seq_len).schema
        for key, value in (("vocab_size", vocab_size), ("seq_len", seq_len)):
            if value and value != schema[key]:
                has = f"{data.url} has {schema[key]}"
                raise ConfigError(f"--{key} {value}, but {has}; leave it out")
        return schema
    if vocab_size < 1 or seq_len < 1:
        raise ConfigError(
            "the sizes of vocabulary and rows come with a dataset: pass --data.url FOLDER, or "
            "--vocab_size N and --seq_len N"
        )
    return {"vocab_size": vocab_size, "seq_len": seq_len, "bos_id": None, "eos_id": None}


def case_of(asked: Asked, *, name: str = "", ranks: int = 0, **changes: Any) -> Case:
    """Plan one configuration; `changes` are keys of the config or of its `parallel`."""
    inner = {key: changes.pop(key) for key in list(changes) if hasattr(asked.config.parallel, key)}
    parallel = replace(asked.config.parallel, **inner)
    config = replace(asked.config, parallel=parallel, **changes)
    request = Request(
        make_module=asked.recipe.module_to_plan,  # type: ignore[attr-defined]
        config=config,
        schema=asked.schema,
        num_ranks=ranks or asked.ranks,
        device=asked.device,
    )
    made = plan(request)
    return Case(
        name=name,
        ranks=request.num_ranks,
        strategy=str(parallel),
        micro_batch=config.micro_batch,
        checkpointing=config.activation_checkpointing,
        device=asked.device,
        plan=made,
        time=step_time(made, asked.device),
    )


def what_would_fit(asked: Asked, first: Case) -> Iterator[Case]:
    """Cases that fit, nearest to what was asked first; each is traced before it is given."""
    changes: dict[str, Any] = {}
    said: list[str] = []

    def tried(change: dict[str, Any]) -> Case | None:
        trial = {**changes, **change}
        words = " ".join(f"--{_key(asked.config, name)} {_value(v)}" for name, v in change.items())
        try:
            case = case_of(asked, name=", ".join([*said, words]), **trial)
        except ConfigError:  # tp does not divide the model, say
            return None
        said.append(words)
        changes.update(change)
        return case

    last = first
    smaller = next_micro_batch(asked.config, first)
    if smaller:
        alone = case_of(asked, name=f"--micro_batch {smaller}", micro_batch=smaller)
        if alone.fits:
            yield alone
    for change in steps_down(asked, first):
        if "tp" in changes:
            break
        case = tried(change)
        last = case or last
        if case is not None and case.fits:
            yield case
    if asked.config.parallel.strategy == "ddp" and asked.ranks == 1:
        said.append("--parallel.strategy fsdp")
        changes["strategy"] = "fsdp"
    ranks = asked.ranks
    while ranks < MAX_RANKS:
        ranks = 1 << ranks.bit_length()
        if not might_fit(last, ranks):
            continue
        last = case_of(asked, name=", ".join([*said, f"--ranks {ranks}"]), ranks=ranks, **changes)
        if last.fits:
            yield last
            return


def steps_down(asked: Asked, first: Case) -> Iterator[dict[str, Any]]:
    """Changes that need less memory, each on top of those before it."""
    parallel, ranks = asked.config.parallel, asked.ranks
    if asked.config.activation_checkpointing != "full":
        yield {"activation_checkpointing": "full"}
    if asked.config.micro_batch > 1:
        yield {"micro_batch": 1}
    if parallel.strategy == "deepspeed":
        if parallel.zero_stage < 3 and ranks > 1:
            yield {"zero_stage": 3}
        if not parallel.offload_optimizer and asked.device.kind != "cpu":
            yield {"offload_optimizer": True}
        return
    sharded = parallel.strategy == "fsdp"
    if ranks > 1 and parallel.strategy in ("ddp", "hsdp"):
        if parallel.strategy == "ddp" and ranks > asked.device.ranks_per_node:
            yield {"strategy": "hsdp"}
        yield {"strategy": "fsdp", "replicas": 0}
        sharded = True
    # Micro-batches of one row are as many as a rank's rows.
    accumulates = asked.config.global_batch > first.plan.layout.dp_size
    if sharded and accumulates and parallel.reduce_each == "step":
        yield {"reduce_each": "micro_batch"}
    tp = math.gcd(ranks, asked.device.ranks_per_node)
    while parallel.strategy != "tp" and parallel.tp <= 1 < tp:
        yield {"strategy": "fsdp", "tp": tp}  # the first that divides the model's sizes is kept
        tp //= 2


def _key(config: Any, name: str) -> str:
    return f"parallel.{name}" if hasattr(config.parallel, name) else name


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def might_fit(last: Case, ranks: int) -> bool:
    """Whether tracing is worth while: if so many ranks shared the state, and held no gradients."""
    held = last.plan.peak.categories
    shared = (held[PARAMETERS] + held[OPTIMIZER]) * (1 - last.ranks / ranks)
    freed = shared + held[GRADIENTS]
    return last.needed_gib - 1.1 * freed / GIB <= last.device.memory_gib


def next_micro_batch(config: Any, first: Case) -> int:
    """The largest smaller power of two by which activations in proportion would fit; 0: none."""
    if config.micro_batch == 1:
        return 0
    total = first.needed_gib
    kept = (
        sum(
            size
            for name, size in first.plan.peak.categories.items()
            if name in ("activations", "temporaries")
        )
        / GIB
    )
    micro = 1 << ((config.micro_batch - 1).bit_length() - 1)
    while micro > 1:
        if total - kept * (1 - micro / config.micro_batch) <= first.device.memory_gib:
            break
        micro //= 2
    return micro


def sweep(asked: Asked) -> Iterator[Case]:
    """micro-batch x checkpointing x strategy, on the ranks asked for."""
    rows = -(-asked.config.global_batch // asked.ranks)
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if size <= rows][:4] or [1]
    for parallel in strategies(asked):
        for checkpointing in ("none", "full"):
            for size in sizes:
                try:
                    yield case_of(
                        asked, activation_checkpointing=checkpointing, micro_batch=size, **parallel
                    )
                except ConfigError as error:
                    print(f"left out: {error}", file=sys.stderr)
                    break


def strategies(asked: Asked) -> list[dict[str, Any]]:
    """Those worth comparing on these ranks, as keys of `parallel`."""
    none: dict[str, Any] = {
        "tp": 0, "replicas": 0, "offload_optimizer": False, "reduce_each": "step",
    }  # fmt: skip
    found: list[dict[str, Any]] = [{**none, "strategy": "ddp"}, {**none, "strategy": "fsdp"}]
    if asked.ranks > asked.device.ranks_per_node:
        found.append({**none, "strategy": "hsdp"})
    tp = math.gcd(asked.ranks, asked.device.ranks_per_node)
    if tp > 1:
        found += [{**none, "strategy": name, "tp": tp} for name in ("tp", "fsdp")]
    return found + [{**none, "strategy": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)]


def main(words: Sequence[str] | None = None) -> int:
    """Plan and print; 0 if it fits, 1 if not."""
    asked, given = parse(sys.argv[1:] if words is None else words)
    max_steps = asked.config.max_steps
    if given.sweep:
        cases = []
        if not given.json:
            print(heading(changes=False), flush=True)
        for case in sweep(asked):
            cases.append(case)
            if not given.json:
                print(line(case, changes=False), flush=True)
        if given.json:
            print(json.dumps([case_record(case, max_steps) for case in cases], indent=1))
        return 0 if any(case.fits for case in cases) else 1
    first = case_of(asked)
    if not given.json:
        print(case_text(first, asked.name, max_steps), flush=True)
    fitting: list[Case] = []
    if not first.fits:
        if not given.json:
            print(f"\nwhat would make it fit\n{heading(changes=True)}", flush=True)
        for case in what_would_fit(asked, first):
            fitting.append(case)
            if not given.json:
                print(line(case, changes=True), flush=True)
            if len(fitting) == SUGGESTIONS:
                break
        if not fitting and not given.json:
            print("  nothing that was tried; a smaller model, shorter rows, or other devices")
    if given.json:
        record = case_record(first, max_steps)
        record["keep"] = getattr(asked.config, "keep", 1)
        record["would_fit"] = [case_record(case, max_steps) for case in fitting]
        print(json.dumps(record, indent=1))
    return 0 if first.fits else 1


if __name__ == "__main__":
    run_main(main)
