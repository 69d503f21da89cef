"""`leyden data inspect REF`: what a dataset is, in the terminal, as JSON or as an HTML page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

INSPECT = "its schema, splits, counters, origin, token and length figures, and decoded samples"
REFERENCE_HELP = (
    "folder or URL of a dataset, URL@DIGEST (6 or more hex digits) for one version, or a pin file"
)
SAMPLE_CHARACTERS = 300
_SHOWN_PIECES = 3
_SHOWN_TOKENS = 8


def inspect(arguments: list[str]) -> int:
    """Print what a dataset is."""
    parser = argparse.ArgumentParser(
        prog="leyden data inspect",
        description=f"Print {INSPECT}.",
        epilog="examples: leyden data inspect data/quickstart/dataset --samples 3    "
        "leyden data inspect data/quickstart/dataset --html dataset.html",
    )
    parser.add_argument("reference", metavar="REF", help=REFERENCE_HELP)
    parser.add_argument(
        "--samples", "--rows", dest="samples", type=int, default=1, metavar="N",
        help="rows to decode per split (1)",
    )  # fmt: skip
    parser.add_argument(
        "--scan_rows", type=int, default=20_000, metavar="N",
        help="rows to count tokens and lengths in, about; a larger dataset is sampled (20,000)",
    )  # fmt: skip
    parser.add_argument("--html", metavar="FILE", help="also write a page with charts")
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    options = parser.parse_args(arguments)
    from dist import data_inspect
    from dist.data_samples import sample_rows
    from dist.dataset import open_one
    from dist.errors import ConfigError

    if options.samples < 0 or options.scan_rows < 1:
        raise ConfigError(
            f"--samples {options.samples} must be 0 or more, --scan_rows {options.scan_rows} at "
            "least 1"
        )
    dataset = open_one(options.reference)
    facts = data_inspect.facts_of(dataset)
    note = data_inspect.unread(dataset)
    found, said = None, None
    samples: dict[str, list[dict[str, Any]]] = {split: [] for split in facts["splits"]}
    if not note:
        digest = dataset.manifest.tokenizer_digest
        tokenizer = None if digest is None else dataset.read_tokenizer()
        found = data_inspect.scan(dataset, options.scan_rows)
        said = data_inspect.scan_facts(found, tokenizer)
    if options.samples > 0:
        for split in samples:
            samples[split] = sample_rows(dataset, split, options.samples)
    if options.json:
        record = {**facts, "scan": said, "samples": samples, "note": note}
        print(json.dumps(record, indent=1, sort_keys=True))
    else:
        print(inspect_text(facts, said, samples, note), end="")
    if options.html:
        from dist.data_page import page_of
        from dist.local_files import write_atomic

        write_atomic(options.html, page_of(facts, found, said, samples, note).encode())
        if not options.json:
            print(f"page       {Path(options.html)}")
    return 0


def inspect_text(
    facts: dict[str, Any], said: dict[str, Any] | None,
    samples: dict[str, list[dict[str, Any]]], note: str = "",
) -> str:  # fmt: skip
    """What `inspect` prints, for people."""
    schema = "  ".join(f"{key}={value}" for key, value in sorted(facts["schema"].items()))
    lines = [
        f"dataset    {facts['reference']}",
        f"kind       {facts['kind']}",
        f"schema     {schema}",
        f"tokenizer  {facts['tokenizer_digest'] or 'none'}",
        "splits",
        _splits_table(facts["splits"]),
        *_counter_lines(facts["counters"]),
        *_origin_lines(facts),
    ]
    if note:
        lines.append(f"note       {note}")
    if said is not None:
        lines += _scan_lines(said)
    for split, rows in samples.items():
        for row in rows:
            lines += _sample_lines(split, row)
    return "\n".join(lines) + "\n"


def _splits_table(splits: dict[str, Any]) -> str:
    columns = ["shards", "rows", "documents", "tokens", "targets"]
    table = [["", *columns, "MB", "MB a shard"]]
    for name, split in splits.items():
        cells = [f"{split.get(column, 0):,}" for column in columns]
        spread = " / ".join(
            f"{split['shard_bytes'][k] / 1e6:,.2f}" for k in ("min", "median", "max")
        )
        table.append([name, *cells, f"{split['bytes'] / 1e6:,.1f}", spread])
    return _table(table)


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _counter_lines(counters: dict[str, Any]) -> list[str]:
    if not counters:
        return []
    plain = [f"{value:,} {key.replace('_', ' ')}" for key, value in sorted(counters.items())
             if key != "quarantined_by_reason"]  # fmt: skip
    lines = [f"counters   {', '.join(plain)}"]
    if reasons := counters.get("quarantined_by_reason"):
        said = ", ".join(f"{value:,} {key}" for key, value in sorted(reasons.items()))
        lines.append(f"refused    {said}")
    return lines


def _origin_lines(facts: dict[str, Any]) -> list[str]:
    provenance, origin = facts["provenance"], facts["origin"]
    if provenance is None:
        return ["origin     unknown: no provenance file names it"]
    lines = ["origin"]
    for key, value in sorted(provenance.items()):
        if key not in ("data_digest", "counters", "inputs"):
            lines.append(f"  {key:<16} {_short(value)}")
    more = ", ..." if origin["inputs"] > len(origin["first_inputs"]) else ""
    first = ", ".join(origin["first_inputs"])
    megabytes = origin["input_bytes"] / 1e6
    lines.append(f"  {'inputs':<16} {origin['inputs']:,} files, {megabytes:,.1f} MB: {first}{more}")
    for one in origin["parents"]:
        gone = " (no longer at hand)" if one.get("gone") else ""
        lines.append(
            f"  {'parent':<16} {one['data_digest'][:12]} by {one['by']}, {one['removed']} rows "
            f"left out{gone}"
        )
    return lines


def _short(value: Any, width: int = 100) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    text = _safe(text)
    return text if len(text) <= width else text[: width - 3] + "..."


def _safe(text: str) -> str:
    # What stands in the data must not steer the terminal.
    return repr(text)[1:-1]


def _scan_lines(said: dict[str, Any]) -> list[str]:
    what = "all" if said["complete"] else f"{said['rows']:,} of"
    sampled = "" if said["complete"] else f", evenly spaced {said['sampled_by']}"
    padding = ", ".join(f"{split} {100 * v:.2f} %" for split, v in said["padding_share"].items())
    padding = f"; padding: {padding}" if padding else ""
    lines = [f"scanned    {what} {said['of_rows']:,} rows{sampled}{padding}"]
    quantiles = said["document_length_quantiles"]
    if quantiles:
        text = ", ".join(f"{float(q):.0%} {value:,.0f}" for q, value in quantiles.items())
        lines.append(f"lengths    of {said['documents']:,} documents in tokens: {text}")
    for name, key in (("tokens", "top_tokens"), ("special", "special_tokens")):
        shown = [f"{one['text']!r} {100 * one['share']:.2f} %" for one in said[key][:_SHOWN_TOKENS]]
        if shown:
            lines.append(f"{name:<10} {', '.join(shown)}")
    return lines


def row_text(row: dict[str, Any]) -> str:
    """What a sampled row consists of."""
    if "runs" in row:
        tokens = sum(run["tokens"] for run in row["runs"])
        return f"an example of {tokens} tokens, {row['targets']} of them trained"
    count = len(row["pieces"])
    padding = f", {row['padding']} of padding" if row["padding"] else ""
    return f"{count} piece{'s' * (count != 1)} of documents{padding}"


def _sample_lines(split: str, row: dict[str, Any]) -> list[str]:
    """A row with the borders of its documents."""
    pieces = row["pieces"]
    lines = [f"sample     {split} row {row['row']}: {row_text(row)}"]
    for piece in pieces[:_SHOWN_PIECES]:
        source = _safe(piece["path"]) or f"input {piece['input']}"
        lines.append(f"  +- {source} @ {piece['offset']}, {piece['tokens']} tokens")
        text = piece["text"][:SAMPLE_CHARACTERS]
        lines += ["  | " + _safe(line) for line in text.splitlines()[:12]]
        if len(piece["text"]) > len(text):
            lines.append("  | ...")
    for text in row.get("trained", []):
        lines.append(f"  trained: {_safe(text[:SAMPLE_CHARACTERS])}")
    if len(pieces) > _SHOWN_PIECES:
        lines.append(f"  +- and {len(pieces) - _SHOWN_PIECES} more")
    return lines
