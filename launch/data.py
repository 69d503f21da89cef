"""`leyden data inspect REF` and `leyden data verify REF`: what a dataset is, and whether it is."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist.errors import ConfigError
from launch import audit
from launch.cli import nearest

if TYPE_CHECKING:
    from dist.dataset import Dataset

ACTIONS = {
    "inspect": "its manifest, schema, splits, counters, origin, and a decoded sample",
    "verify": "read and hash every byte of it, or of an exported model; exit 3 names the damage",
    "who-saw": audit.WHO_SAW,
    "replay": audit.REPLAY,
}
REFERENCE_HELP = "folder or URL of a dataset, or URL@DIGEST (6 or more hex digits) for one version"
SAMPLE_CHARACTERS = 300


def help_text() -> str:
    """What `leyden data --help` prints."""
    lines = "\n".join(f"  {name:<9} {what}" for name, what in ACTIONS.items())
    return (
        "usage: leyden data inspect|verify REF\n       leyden data who-saw|replay RUN ...\n\n"
        f"actions:\n{lines}\n\nREF: {REFERENCE_HELP}\nRUN: {audit.RUN_HELP}\n\nexamples:\n"
        "  leyden data inspect data/quickstart/dataset\n"
        "  leyden data verify data/quickstart/dataset@3f9a12c4\n"
        "  leyden data who-saw quickstart train:17\n"
        "  leyden data replay quickstart --step 12\n"
    )


def facts_of(dataset: Dataset) -> dict[str, Any]:
    """What `inspect --json` prints: the manifest by split, and where it came from."""
    manifest = dataset.manifest
    splits = {}
    for name in manifest.splits():
        shards = manifest.shards_of(name)
        totals = manifest.totals.get(name, {})
        splits[name] = {"shards": len(shards), "bytes": sum(s.bytes for s in shards), **totals}
    return {
        "reference": dataset.reference,
        "kind": manifest.kind,
        "schema": manifest.schema,
        "tokenizer_digest": manifest.tokenizer_digest,
        "splits": splits,
        "provenance": dataset.read_provenance(),
    }


def sample_rows(dataset: Dataset, split: str, num_rows: int) -> list[dict[str, Any]]:
    """The first rows of a split: their pieces' lengths, lineage and decoded text."""
    from dist.examples import as_rows
    from dist.tokenizer import TextTokenizer

    if dataset.manifest.tokenizer_digest is None or not dataset.manifest.shards_of(split):
        return []
    tokenizer = TextTokenizer(dataset.read_tokenizer())
    if dataset.manifest.kind == "examples":
        dataset = as_rows(dataset, "padded")  # one example a row
    table = dataset.split(split)
    shard = table.open_shard(0, dataset.shard_path(table.shards[0]))
    rows = []
    for row in range(min(num_rows, shard.num_rows)):
        pieces = shard.lineage(row)
        used = sum(length for _, _, length in pieces)
        tokens = shard.tokens(row, row + 1)[0, :used]
        rows.append({"pieces": pieces, "text": tokenizer.decode(tokens)})
        if dataset.manifest.kind == "examples":
            ends = shard.trained_runs(row).cumsum().tolist()
            spans = [span for span in zip(ends[::2], ends[1::2], strict=True) if span[0] < span[1]]
            rows[-1]["trained"] = [tokenizer.decode(tokens[a:b]) for a, b in spans]
    shard.close()
    return rows


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _short(value: Any, width: int = 100) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= width else text[: width - 3] + "..."


def inspect_text(facts: dict[str, Any], samples: dict[str, list[dict[str, Any]]]) -> str:
    """What `inspect` prints, for people."""
    schema = "  ".join(f"{key}={value}" for key, value in sorted(facts["schema"].items()))
    lines = [
        f"dataset    {facts['reference']}",
        f"kind       {facts['kind']}",
        f"schema     {schema}",
        f"tokenizer  {facts['tokenizer_digest'] or 'none'}",
        "splits",
    ]
    columns = ["shards", "rows", "documents", "tokens", "targets"]
    table = [["", *columns, "MB"]]
    for name, split in facts["splits"].items():
        cells = [f"{split.get(column, 0):,}" for column in columns]
        table.append([name, *cells, f"{split['bytes'] / 1e6:,.1f}"])
    lines.append(_table(table))
    provenance = facts["provenance"]
    lines.append("origin" if provenance else "origin     unknown: no provenance file names it")
    for key, value in sorted((provenance or {}).items()):
        if key != "data_digest":
            lines.append(f"  {key:<16} {_short(value)}")
    for split, rows in samples.items():
        for number, row in enumerate(rows):
            pieces = ", ".join(
                f"{length} tokens of input {source} at byte {offset}"
                for source, offset, length in row["pieces"][:3]
            )
            more = ", ..." if len(row["pieces"]) > 3 else ""
            lines += [f"sample     {split} row {number}: {pieces}{more}"]
            text = row["text"][:SAMPLE_CHARACTERS]
            # repr() of each line: what stands in the data must not steer the terminal.
            lines += ["  | " + repr(line)[1:-1] for line in text.splitlines()[:12]]
            lines += [f"  trained: {one[:SAMPLE_CHARACTERS]!r}" for one in row.get("trained", [])]
    return "\n".join(lines) + "\n"


def inspect(arguments: list[str]) -> int:
    """Print what a dataset is."""
    parser = argparse.ArgumentParser(
        prog="leyden data inspect",
        description="Print " + ACTIONS["inspect"] + ".",
        epilog="example: leyden data inspect data/quickstart/dataset --rows 3",
    )
    parser.add_argument("reference", metavar="REF", help=REFERENCE_HELP)
    parser.add_argument("--rows", type=int, default=1, help="rows to decode per split (1)")
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    options = parser.parse_args(arguments)
    from dist.dataset import open_dataset

    dataset = open_dataset(options.reference)
    facts = facts_of(dataset)
    samples = {
        split: sample_rows(dataset, split, max(0, options.rows)) for split in facts["splits"]
    }
    if options.json:
        print(json.dumps({**facts, "samples": samples}, indent=1, sort_keys=True))
    else:
        print(inspect_text(facts, samples), end="")
    return 0


def verify(arguments: list[str]) -> int:
    """Hash every byte of a dataset or an exported model; DataRefused (exit 3) names the damage."""
    parser = argparse.ArgumentParser(
        prog="leyden data verify",
        description="Check a dataset, or a folder that `leyden export` wrote: "
        + ACTIONS["verify"]
        + ".",
        epilog="example: leyden data verify data/quickstart/dataset",
    )
    parser.add_argument(
        "reference", metavar="REF", help=f"{REFERENCE_HELP}; or the folder of an exported model"
    )
    parser.add_argument(
        "--presence", action="store_true", help="only names, sizes and the tokenizer; fast"
    )
    options = parser.parse_args(arguments)
    from dist.dataset import open_dataset
    from dist.model_folder import LEYDEN_JSON, check_folder
    from dist.verify import check_presence, verify_full

    folder = Path(options.reference)
    if (folder / LEYDEN_JSON).is_file() or (folder / "config.json").is_file():
        model = check_folder(folder)
        print(
            f"verified: {model.files} files, {model.bytes / 1e6:,.1f} MB, every byte as exported "
            f"from step {model.record['step']} of {model.record['run_id']}, trained on "
            f"{model.record['data_digest']}"
        )
        return 0
    dataset = open_dataset(options.reference)
    if options.presence:
        check_presence(dataset)
        print(f"present: {len(dataset.manifest.shards)} shards of {dataset.reference}")
        return 0
    report = verify_full(dataset)
    print(
        f"verified: {report.shards} shards, {report.bytes / 1e6:,.1f} MB in {report.seconds:.1f} s,"
        f" every byte as {dataset.reference} says"
    )
    return 0


def main(arguments: list[str]) -> int:
    """Run one action on a dataset."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text(), end="")
        return 0 if arguments else 2
    action, rest = arguments[0], arguments[1:]
    if action == "inspect":
        return inspect(rest)
    if action == "verify":
        return verify(rest)
    if action in ("who-saw", "replay"):
        return (audit.who_saw if action == "who-saw" else audit.replay)(rest)
    raise ConfigError(
        f"{action!r} is not an action of leyden data{nearest(action, list(ACTIONS))} "
        f"(actions: {', '.join(ACTIONS)})"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
