"""`leyden data who-saw RUN KEY` and `leyden data replay RUN --step S`: audit of a run's data."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist.audit import Answer, Replay, ReplayedRow

WHO_SAW = "every step, rank and micro-batch that trained or will train on a row or a source"
REPLAY = "the exact global batch of a step: rows, source documents, text"
RUN_HELP = "a run's name (runs/RUN) or its folder"
SHOWN_LINES = 40
SHOWN_CHARACTERS = 300


def who_saw(arguments: list[str]) -> int:
    """Print at which steps what KEY names was trained on."""
    parser = argparse.ArgumentParser(
        prog="leyden data who-saw",
        description=f"Print {WHO_SAW}.",
        epilog="examples: leyden data who-saw quickstart train:17    "
        "leyden data who-saw quickstart stdlib/abc.py.txt    "
        "leyden data who-saw quickstart raw/part-3.jsonl@81920 --json",
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "key",
        metavar="KEY",
        help="SPLIT:ROW, SHARD_DIGEST:ROW (the first hex digits do), the path of an input file, "
        "or PATH@OFFSET for one document of it",
    )
    parser.add_argument("--epochs", type=int, help="epochs to answer for (as many as planned)")
    parser.add_argument("--data", default="", metavar="FOLDER", help="where the dataset is now")
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    options = parser.parse_args(arguments)
    from dist import audit
    from dist.errors import ConfigError
    from dist.run_history import find_run

    if options.epochs is not None and options.epochs < 1:
        raise ConfigError(f"--epochs {options.epochs} must be at least 1")
    answer = audit.who_saw(
        find_run(options.run), options.key, epochs=options.epochs, data=options.data
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(answer), indent=1))
    else:
        print(who_saw_text(answer), end="")
    return 0


def replay(arguments: list[str]) -> int:
    """Print the exact batch of a step."""
    parser = argparse.ArgumentParser(
        prog="leyden data replay",
        description=f"Print {REPLAY}.",
        epilog="examples: leyden data replay quickstart --step 12    "
        "leyden data replay quickstart --step 12 --rank 1 --full-text",
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=int, help="optimizer step, from 0")
    which.add_argument("--bundle", metavar="FOLDER", help="repro bundle of the guard: its batch")
    parser.add_argument("--rank", type=int, help="only the rows of this data-parallel rank")
    parser.add_argument("--data", default="", metavar="FOLDER", help="where the dataset is now")
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    parser.add_argument("--full-text", action="store_true", help="all text, not each row's start")
    options = parser.parse_args(arguments)
    from dist import audit
    from dist.run_history import find_run

    if options.bundle:
        return _replay_bundle(options)
    found = audit.replay(find_run(options.run), options.step, rank=options.rank, data=options.data)
    if options.json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        print(replay_text(found, full=options.full_text), end="")
    return 0


def _replay_bundle(options: argparse.Namespace) -> int:
    from dist.bundle import read_bundle, replay_bundle

    found = replay_bundle(options.bundle, data=options.data, rank=options.rank)
    record = read_bundle(options.bundle)
    if options.json:
        print(json.dumps({**record, "replay": dataclasses.asdict(found)}, indent=1))
        return 0
    print(bundle_text(record) + replay_text(found, full=options.full_text), end="")
    return 0


def bundle_text(record: dict[str, Any]) -> str:
    """What was wrong with the step of a bundle, for people."""
    lines = [
        f"bundle     {', '.join(record['reasons'])}: loss {record['loss']}, gradient norm "
        f"{record['grad_norm']}",
        f"limits     loss {record['loss_limit']}, gradient norm {record['grad_norm_limit']}",
    ]
    for one in record["ranks"]:
        losses = ", ".join(str(loss) for loss in one["losses"])
        lines.append(f"rank {one['rank']:<5} on {one['host']}: loss sums {losses}")
    return "\n".join(lines) + "\n"


def who_saw_text(answer: Answer) -> str:
    """What `who-saw` prints, for people."""
    shards = {(ref.split, ref.row): ref for ref in answer.rows}
    lines = [*data_lines(answer.data), f"key        {printable(answer.key)}"]
    lines.append(f"rows       {len(answer.rows):,}{_splits(answer)}")
    for ref in answer.rows[:SHOWN_LINES]:
        if ref.split != "train":
            lines.append(f"  {ref.name}  is of the split {ref.split}: never trained on")
    for one in answer.sightings[:SHOWN_LINES]:
        ref = shards[one.split, one.row]
        state = f"consumed by attempt {one.attempt}" if one.consumed else "not yet"
        if not one.consumed and not one.planned:
            state = "after the planned end"
        lines.append(
            f"  {ref.name:<14} epoch {one.epoch}  step {one.step:<7} rank {one.rank} of "
            f"{one.world_size}  micro-batch {one.micro} row {one.index}  {state}  "
            f"({ref.shard[:8]}:{ref.row_in_shard})"
        )
    for row, digest in sorted(answer.removed.items())[:SHOWN_LINES]:
        name = shards["train", row].name
        lines.append(
            f"  {name:<14} removed: not in the version {digest[:12]} that the run went on with "
            "(--switch_data)"
        )
    if len(answer.sightings) > SHOWN_LINES:
        lines.append(f"  ... {len(answer.sightings) - SHOWN_LINES:,} more; --json prints all")
    done = sum(one.consumed for one in answer.sightings)
    ahead = sum(not one.consumed and one.planned for one in answer.sightings)
    lines.append(
        f"in all     consumed {done:,} times, {ahead:,} more planned; epochs searched: "
        f"{answer.epochs}; steps done: {answer.steps_done:,} of {answer.planned_steps or '?'}"
    )
    return "\n".join(lines) + "\n"


def replay_text(found: Replay, *, full: bool) -> str:
    """What `replay` prints, for people."""
    state = f"consumed by attempt {found.attempt}" if found.consumed else "not consumed yet"
    lines = [
        *data_lines(found.data),
        f"step       {found.step}: samples {found.t0} to {found.t1 - 1}, {found.t1 - found.t0} "
        f"rows on {found.world_size} data-parallel ranks, {state}",
    ]
    for row in found.rows:
        lines.append(
            f"rank {row.rank} micro-batch {row.micro} row {row.index}: {_row_name(row)} "
            f"({row.shard[:8]}:{row.row_in_shard}), epoch {row.epoch}, sample {row.t}"
        )
        lines += _pieces(row, full=full)
    return "\n".join(lines) + "\n"


def _row_name(row: ReplayedRow) -> str:
    return f"{row.source}/train:{row.source_row}" if row.source else f"train:{row.row}"


def data_lines(reference: str) -> list[str]:
    """The dataset, or each source of a mixture on a line of its own."""
    from dist.references import MIXED, mixed_references

    if not reference.startswith(MIXED):
        return [f"data       {reference}"]
    sources = mixed_references(reference)
    width = max(len(name) for name, _ in sources)
    return [f"source     {name:<{width}}  {one}" for name, one in sources]


def printable(text: str) -> str:
    """Text that cannot steer the terminal: control characters are written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _splits(answer: Answer) -> str:
    names = sorted({ref.split for ref in answer.rows})
    return (
        f" of {', '.join(names)}" if names else ": none of it is in the data (filtered, refused?)"
    )


def _pieces(row: ReplayedRow, *, full: bool) -> list[str]:
    lines: list[str] = []
    left = SHOWN_CHARACTERS
    for number, piece in enumerate(row.pieces):
        if left <= 0 and not full:
            lines.append(f"  ... {len(row.pieces) - number} more documents; --full-text prints all")
            break
        source = printable(piece.path) or f"input {piece.input}"
        lines.append(f"  {source}@{piece.offset}: {piece.tokens} tokens")
        if piece.text is None:
            left -= SHOWN_CHARACTERS // 4
            continue
        shown = piece.text if full else piece.text[:left]
        left -= len(shown)
        lines += ["  | " + printable(line) for line in shown.splitlines()]
        if len(shown) < len(piece.text):
            lines.append(f"  | ... {len(piece.text) - len(shown):,} more characters")
    return lines
