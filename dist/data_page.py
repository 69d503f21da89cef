"""The page of `leyden data inspect --html`: one file, no script, no request, light and dark."""

from __future__ import annotations

import time
from html import escape
from typing import Any

import numpy as np

from dist.data_inspect import Scan
from dist.report_html import STYLE, clock, pairs, table
from dist.svg_chart import CSS, Chart, Series, draw, number

_STYLE = """
.share { display: inline-block; height: .7em; background: var(--c0); border-radius: 2px;
  margin-right: 6px; min-width: 1px; }
.piece { background: var(--panel); border: 1px solid var(--line); border-left: 3px solid var(--c1);
  border-radius: 6px; margin: 6px 0; padding: 4px 10px; }
.piece pre { border: 0; padding: 0; margin: 2px 0; max-height: 18em; overflow: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; }
td code { white-space: pre; } td.left, th.left { text-align: left; }
.row { margin: 14px 0; } .note { overflow-wrap: anywhere; }
mark { background: color-mix(in srgb, var(--c1) 28%, transparent); color: inherit;
  border-radius: 3px; }
"""
_SHOWN_PIECES = 8
_SHOWN_CHARACTERS = 1500
_BINS_AN_OCTAVE = 2


def page_of(
    facts: dict[str, Any], found: Scan | None, said: dict[str, Any] | None,
    samples: dict[str, list[dict[str, Any]]], note: str,
) -> str:  # fmt: skip
    """The whole page. said: scan_facts of `found`; note: why rows were not read, or ''."""
    name = facts["reference"].partition("@")[0].rstrip("/").rpartition("/")[2]
    digest = facts["reference"].rpartition("@")[2]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    body = [_splits(facts), f'<p class="problem">{escape(note)}</p>' if note else ""]
    if found is not None and said is not None:
        body += [_charts(found, said), _tokens(said)]
    body += [_counters(facts), _origin(facts)]
    body += [_samples(split, rows) for split, rows in samples.items() if rows]
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(name)} @ {escape(digest[:12])}</title>",
            f"<style>{STYLE}{CSS}{_STYLE}</style></head><body>",
            f'<header><h1>{escape(name)}</h1><p class="verdict">{escape(facts["kind"])} '
            f"<code>{escape(digest)}</code></p></header><main>",
            _tiles(facts, said),
            *body,
            f'</main><footer class="note">{escape(facts["reference"])} · written '
            f"{clock(time.time())} by <code>leyden data inspect</code></footer></body></html>\n",
        ]
    )


def _tiles(facts: dict[str, Any], said: dict[str, Any] | None) -> str:
    splits = facts["splits"].values()
    tiles = [
        (name, number(sum(one.get(name, 0) for one in splits)))
        for name in ("documents", "tokens", "rows", "shards")
    ]
    tiles.append(("bytes", number(sum(one["bytes"] for one in splits))))
    if said is not None and (shares := said["padding_share"]):  # examples are padded by the run
        padding = shares.get("train", max(shares.values()))
        tiles.append(("padding", f"{100 * padding:.2f} %"))
    cells = (f'<div class="tile"><b>{v}</b><span>{escape(k)}</span></div>' for k, v in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _splits(facts: dict[str, Any]) -> str:
    head = ["split", "shards", "rows", "documents", "tokens", "targets", "MB",
            "MB a shard: least", "median", "most"]  # fmt: skip
    rows = []
    for name, one in facts["splits"].items():
        cells = [f"{one.get(k, 0):,}" for k in ("shards", "rows", "documents", "tokens", "targets")]
        spread = [f"{one['shard_bytes'][k] / 1e6:,.2f}" for k in ("min", "median", "max")]
        rows.append([name, *cells, f"{one['bytes'] / 1e6:,.2f}", *spread])
    schema = ", ".join(f"{key} {value}" for key, value in sorted(facts["schema"].items()))
    return f'<h2>Splits</h2>{table(head, rows)}<p class="note">{escape(schema)}</p>'


def _charts(found: Scan, said: dict[str, Any]) -> str:
    charts = [_lengths_chart(found), _frequency_chart(found)]
    figures = "".join(
        f"<figure><figcaption>{escape(c.title)}<span>{escape(c.unit)}</span></figcaption>"
        f"{draw(c)}</figure>"
        for c in charts
    )
    quantiles = said["document_length_quantiles"]
    facts = "; ".join(f"{float(q):.0%} {number(v)}" for q, v in quantiles.items())
    return (
        f"<h2>Rows</h2><p class='note'>{escape(scanned_text(said))}</p>"
        f'<div class="charts">{figures}</div>'
        f'<p class="note">Tokens of a document, quantiles: {escape(facts)}.</p>'
    )


def scanned_text(said: dict[str, Any]) -> str:
    """How much of the dataset the figures stand on."""
    if said["complete"]:
        return f"All {said['of_rows']:,} rows were read."
    sample = f"A sample: {said['rows']:,} of {said['of_rows']:,} rows, evenly spaced"
    if said["sampled_by"] == "rows":
        return f"{sample}."
    return f"{sample} record batches; lengths are those of documents that begin and end in one."


def _lengths_chart(found: Scan) -> Chart:
    """Share of the documents by the logarithm of their length, two bins an octave."""
    lengths = found.document_lengths
    points: list[tuple[float, float]] = []
    if len(lengths):
        octave = np.floor(np.log2(lengths) * _BINS_AN_OCTAVE).astype(int)
        # An empty bin on either side, so that a line shows the first and the last one as well.
        first = max(0, int(octave.min()) - 1)
        shares = np.append(np.bincount(octave), 0)[first:] / len(lengths) * 100
        points = [(i / _BINS_AN_OCTAVE, float(share)) for i, share in enumerate(shares, first)]
    return Chart(
        title="Document length", unit="% of documents", x_name="log2 of the tokens",
        series=[Series(name="documents, %", points=points)], bands=[], levels=[], from_zero=True,
    )  # fmt: skip


def _frequency_chart(found: Scan) -> Chart:
    """Count of a token by its rank: a straight fall is text, a cliff is not."""
    counts = np.sort(found.counts[found.counts > 0])[::-1]
    ranks = np.unique(np.geomspace(1, max(1, len(counts)), 200).astype(int))
    points = [(float(np.log10(r)), float(counts[r - 1])) for r in ranks.tolist() if len(counts)]
    return Chart(
        title="Token frequency", unit="count by rank", x_name="log10 of the rank",
        series=[Series(name="count", points=points, color=3)], bands=[], levels=[],
    )  # fmt: skip


def _tokens(said: dict[str, Any]) -> str:
    largest = max((one["share"] for one in said["top_tokens"]), default=1)
    rows = []
    for one in [*said["top_tokens"], *said["special_tokens"]]:
        width = max(0.1, 7 * one["share"] / largest)
        rows.append(
            f"<tr><td><code>{escape(repr(one['text']))}</code></td><td>{one['id']}</td>"
            f"<td>{one['count']:,}</td><td class='left'>"
            f"<span class='share' style='width:{width:.2f}em'></span>{100 * one['share']:.2f} %"
            "</td></tr>"
        )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("token", "id", "count"))
    head += '<th scope="col" class="left">share</th>'
    top = len(said["top_tokens"])
    return (
        f"<h2>Tokens</h2><p class='note'>{said['distinct_tokens']:,} different ids; the {top} "
        f"most frequent, then the special tokens that occur.</p>"
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>'
        f"{''.join(rows)}</tbody></table></div>"
    )


def _counters(facts: dict[str, Any]) -> str:
    counters = dict(facts["counters"])
    if not counters:
        return ""
    reasons = counters.pop("quarantined_by_reason", {})
    shown = [(key.replace("_", " "), f"{value:,}") for key, value in sorted(counters.items())]
    shown += [(f"refused: {key}", f"{value:,}") for key, value in sorted(reasons.items())]
    return f"<h2>Counters</h2>{pairs(shown)}"


def _origin(facts: dict[str, Any]) -> str:
    origin = facts["origin"]
    if facts["provenance"] is None:
        return '<h2>Origin</h2><p class="problem">Unknown: no provenance names this version.</p>'
    shown = [(key.replace("_", " "), origin.get(key))
             for key in ("job", "started", "ended", "code", "reason")]  # fmt: skip
    more = " ..." if origin["inputs"] > len(origin["first_inputs"]) else ""
    megabytes = origin["input_bytes"] / 1e6
    shown.append(("inputs", f"{origin['inputs']} files, {megabytes:,.1f} MB: "
                  f"{', '.join(origin['first_inputs'])}{more}"))  # fmt: skip
    shown.append(("tokenizer", facts["tokenizer_digest"]))
    shown += [("parent", parent_text(one)) for one in origin["parents"]]
    config = facts["provenance"].get("config")
    listed = sorted(config.items()) if isinstance(config, dict) else []
    settings = pairs([(key, str(value)) for key, value in listed])
    return (
        f"<h2>Origin</h2>{pairs(shown)}<details><summary>config of the job</summary>{settings}"
        "</details>"
    )


def parent_text(one: dict[str, Any]) -> str:
    """One line on a parent version."""
    gone = ", no longer at hand" if one.get("gone") else ""
    removed = f", {one['removed']} rows left out" if one["removed"] else ""
    return f"{one['data_digest'][:12]} by {one['by']}{removed}{gone}"


def row_text(row: dict[str, Any]) -> str:
    """What a sampled row consists of."""
    if "runs" in row:
        tokens = sum(run["tokens"] for run in row["runs"])
        return f"an example of {tokens:,} tokens, {row['targets']:,} of them trained (marked)"
    count = len(row["pieces"])
    padding = f", {row['padding']:,} of padding" if row["padding"] else ""
    return f"{count} piece{'s' * (count != 1)} of documents{padding}"


def _text(row: dict[str, Any], piece: dict[str, Any]) -> str:
    """A piece's text, cut; of an example what is trained is marked."""
    runs = row.get("runs") or [{"trained": False, "text": piece["text"]}]
    left, parts = _SHOWN_CHARACTERS, []
    for run in runs:
        text = escape(run["text"][:left])
        parts.append(f"<mark>{text}</mark>" if run["trained"] and text else text)
        left = max(0, left - len(run["text"]))
    return "".join(parts) + (" ..." if len(piece["text"]) > _SHOWN_CHARACTERS else "")


def _samples(split: str, rows: list[dict[str, Any]]) -> str:
    parts = [f"<h2>Samples of {escape(split)}</h2>"]
    for row in rows:
        parts.append(
            f'<div class="row"><b>row {row["row"]:,}</b> <span class="note">{row_text(row)}</span>'
        )
        for piece in row["pieces"][:_SHOWN_PIECES]:
            source = piece["path"] or f"input {piece['input']}"
            parts.append(
                f'<div class="piece"><span class="note">{escape(source)} @ {piece["offset"]}, '
                f"{piece['tokens']} tokens</span>"
                f"<pre>{_text(row, piece)}</pre></div>"
            )
        left = len(row["pieces"]) - _SHOWN_PIECES
        parts.append(f'<p class="note">and {left} more</p></div>' if left > 0 else "</div>")
    return "".join(parts)
