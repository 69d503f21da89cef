"""`leyden quickstart`: the whole path on real input, by the commands that a user would type.

collect -> tokenizer -> shards -> verify -> train -> baselines -> export -> sample -> report ->
gate. Every stage is recorded when it is complete and commits its output atomically, so that a rerun
after any interruption goes on with the first stage that is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist.errors import SetupError
from dist.local_files import write_atomic
from launch.processes import command_text
from launch.quickstart_stages import (
    Plan,
    Result,
    Stage,
    StageFailed,
    came_out,
    make_plan,
    stages,
)
from launch.torchrun import num_gpus

GATE_NATS = 0.5
FREE_MB_NEEDED = 2000


class Record:
    """Which stages are complete: <data>/stages.json, rewritten atomically after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.stages: dict[str, Any] = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            self.stages = {}

    def complete(self, stage: Stage) -> bool:
        """Done by the same words, with its output still there."""
        entry = self.stages.get(stage.name, {})
        return bool(entry.get("words") == list(stage.words) and stage.output.exists())

    def add(self, stage: Stage, seconds: float, result: Result) -> None:
        self.stages[stage.name] = {
            "words": list(stage.words),
            "seconds": round(seconds, 2),
            "result": result,
        }
        self._write()

    def forget(self, names: list[str]) -> None:
        """These stages have to be done again."""
        self.stages = {name: entry for name, entry in self.stages.items() if name not in names}
        self._write()

    def _write(self) -> None:
        write_atomic(self.path, (json.dumps(self.stages, indent=1) + "\n").encode())


@contextlib.contextmanager
def only_one(plan: Plan) -> Iterator[None]:
    """Refuse a second quickstart in the same folder; the kernel drops the lock with the process."""
    plan.data.parent.mkdir(parents=True, exist_ok=True)
    path = plan.data.parent / f".{plan.name}.lock"
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SetupError(
                f"another quickstart is running in {plan.data.absolute()}; wait for it, or run "
                "this one in another folder"
            ) from None
        yield


def check_space(folder: Path) -> None:
    """Raise SetupError if the disk of `folder` cannot hold the quickstart."""
    free_mb = shutil.disk_usage(folder).free / 1e6
    if free_mb < FREE_MB_NEEDED:
        raise SetupError(
            f"{folder.absolute()} has {free_mb:.0f} MB free and the quickstart needs "
            f"{FREE_MB_NEEDED} MB for shuffle files and checkpoints; make room"
        )


def leyden_text(words: tuple[str, ...]) -> str:
    """`leyden ...` as a person can type it here."""
    own = str(Path(sys.executable).parent / "leyden")
    found = shutil.which("leyden")
    return command_text(["leyden" if found and Path(found).samefile(own) else own, *words])


def run_stages(plan: Plan, record: Record) -> None:
    """Do every stage that is not complete; a stage after one that was redone is redone too."""
    todo = stages(plan)
    redo = False
    for number, stage in enumerate(todo, 1):
        head = f"[{number}/{len(todo)}] {stage.name}"
        if not redo and record.complete(stage):
            seconds = record.stages[stage.name]["seconds"]
            print(f"{head}: done before, in {seconds:.1f} s", flush=True)
            continue
        if not redo:
            # An output of a half-done repetition must not pass for the one recorded before.
            record.forget([later.name for later in todo[number - 1 :]])
        redo = True
        print(f"{head}: {stage.what}", flush=True)
        if stage.words:
            print(f"$ {leyden_text(stage.words)}", flush=True)
        started = time.monotonic()
        result = stage.run()
        seconds = time.monotonic() - started
        record.add(stage, seconds, result)
        print(f"{head}: done in {seconds:.1f} s", flush=True)


def judge(plan: Plan, record: Record) -> Result:
    """Losses and whether the gate is passed; what quickstart.json holds."""
    entries = record.stages
    losses = entries["baselines"]["result"]
    loss = float(entries["train"]["result"]["validation_loss"])
    limit = losses["unigram"] - GATE_NATS
    return {
        "status": "passed" if loss < limit else ("failed" if plan.gated else "not gated"),
        "validation_loss": loss,
        "unigram": losses["unigram"],
        "bigram": losses.get("bigram"),
        "gate": limit,
        "seconds": round(sum(entry["seconds"] for entry in entries.values()), 2),
        "stages": entries,
        "machine": {"cores": len(os.sched_getaffinity(0)), "python": sys.version.split()[0]},
    }


def summary(plan: Plan, verdict: Result) -> str:
    """What the quickstart says at its end: what each thing is, and what to do next."""
    lines = [f"\nquickstart: {verdict['status']}, {verdict['seconds']:.0f} s of work\n"]
    for stage in stages(plan):
        entry = verdict["stages"][stage.name]
        out = came_out(stage.name, entry["result"])
        lines.append(f"  {stage.name:<10} {entry['seconds']:>7.1f} s  {out}")
    bigram = f", bigram {verdict['bigram']:.3f}" if verdict["bigram"] is not None else ""
    lines += [
        "",
        f"  validation loss {verdict['validation_loss']:.3f} nats/token "
        f"(counted from the same shards: unigram {verdict['unigram']:.3f}{bigram})",
    ]
    if plan.gated:
        words = "below" if verdict["status"] == "passed" else "NOT below"
        lines.append(f"  gate: {words} unigram - {GATE_NATS} = {verdict['gate']:.3f}")
    else:
        lines.append("  20 steps only show that every part works, so the loss is not judged")
    dataset, tokenizer = plan.data / "dataset", plan.data / "tokenizer"
    where = (
        (plan.data / "input", "the text, one file a document"),
        (tokenizer, "tokenizer.json, loads in Hugging Face tokenizers"),
        (dataset, "shards (Arrow files), manifests, provenance"),
        (plan.run, "the run: config, metrics.jsonl, consumed.jsonl, checkpoints, quickstart.json"),
        (plan.model, "the model: loads in transformers (AutoModelForCausalLM.from_pretrained)"),
        (plan.run / "report.html", "the run's report: open it in a browser"),
    )
    width = max(len(str(folder)) for folder, _ in where)
    again = ("train", "pretrain", "--config", "tiny", "--nproc", str(plan.nproc))
    return "\n".join(
        [
            *lines,
            "\nwhat is where",
            *(f"  {folder!s:<{width}}  {what}" for folder, what in where),
            "\nwhat to do next",
            f"  look into the data   {leyden_text(('data', 'inspect', str(dataset)))}",
            f"  a step's exact batch {leyden_text(('data', 'replay', plan.name, '--step', '9'))}",
            f"  talk to the model    {leyden_text(('generate', str(plan.model)))}",
            "  train longer         "
            + leyden_text((*again, "--run", "longer", "--data.url", str(dataset)))
            + " --max_steps 2000",
            "  your own text        "
            + leyden_text(("prep", "tokenize-text", "--input", "FOLDER", "--output", "data/mine"))
            + f" --tokenizer {tokenizer}",
            "",
        ]
    )


def quickstart(plan: Plan, *, fresh: bool) -> int:
    """Run or finish the quickstart of `plan`; 0 if the gate is passed."""
    with only_one(plan):
        if fresh:
            for folder in (plan.data, plan.run):
                shutil.rmtree(folder, ignore_errors=True)
        plan.data.mkdir(parents=True, exist_ok=True)
        check_space(plan.data)
        record = Record(plan.data / "stages.json")
        if all(record.complete(stage) for stage in stages(plan)):
            print(f"quickstart: done before; {leyden_text((*plan.words, '--fresh'))} starts over")
        else:
            print(f"quickstart: writes only to {plan.data} and {plan.run}", flush=True)
            run_stages(plan, record)
        verdict = judge(plan, record)
        write_atomic(plan.run / "quickstart.json", (json.dumps(verdict, indent=1) + "\n").encode())
        print(summary(plan, verdict), end="")
    return 1 if verdict["status"] == "failed" else 0


def main(arguments: list[str]) -> int:
    """Command line of `leyden quickstart`."""
    parser = argparse.ArgumentParser(
        prog="leyden quickstart",
        description="The whole path on this machine: Python sources -> Spark -> verified shards -> "
        "a small Llama on 2 ranks, under 6 minutes on 2 cores. Writes to ./data and ./runs only. "
        "A rerun goes on where the last one stopped.",
        epilog="examples: leyden quickstart    leyden quickstart --fresh    leyden quickstart"
        " --smoke",
    )
    parser.add_argument("--fresh", action="store_true", help="delete the last quickstart first")
    parser.add_argument("--smoke", action="store_true", help="2 MB and 20 steps: under a minute")
    parser.add_argument("--dry-run", action="store_true", help="print each stage's command")
    options = parser.parse_args(arguments)
    plan = make_plan(smoke=options.smoke, gpus=num_gpus())
    if options.dry_run:
        for stage in stages(plan):
            print(f"# {stage.name}: {stage.what}")
            if stage.words:
                print(leyden_text(stage.words))
        return 0
    try:
        return quickstart(plan, fresh=options.fresh)
    except (KeyboardInterrupt, StageFailed) as error:
        code = getattr(error, "exit_code", 130)
        # A drained run says 75; for the person at the keyboard it is an interrupted quickstart.
        code = 130 if code == 75 else code
        again = leyden_text(plan.words)
        said = "interrupted" if code in (130, 143) else str(error)
        print(
            f"\nquickstart: {said}; what is complete is kept, {again} goes on from there, "
            "with --fresh it starts over",
            file=sys.stderr,
        )
        return code
