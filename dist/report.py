"""A run's report: one HTML file with charts, attempts, lineage and environment.

Self-contained: no script, no request to anywhere (a Content-Security-Policy forbids both),
light and dark by the reader's preference, readable on a phone.
"""

from __future__ import annotations

import json
import shlex
import time
from html import escape
from pathlib import Path
from typing import Any

from dist.local_files import write_atomic
from dist.report_facts import (
    Facts,
    config_changes,
    percent,
    read_facts,
    verdict,
)
from dist.report_html import STYLE, clock, duration, pairs, table
from dist.run_dir import RunDir
from dist.svg_chart import CSS, NUM_COLORS, Chart, Series, draw, number

SHOWN_ATTEMPTS = 40
SHOWN_INPUTS = 20
SHOWN_VALUES = 40
CHARTS = (
    # key, title, unit, factor, from zero
    ("lr", "Learning rate", "", 1.0, True),
    ("tokens_per_s", "Throughput", "tokens per second", 1.0, True),
    ("data_wait", "Data wait", "% of step time", 100.0, True),
    ("grad_norm", "Gradient norm", "before clipping", 1.0, True),
)
MEMORY_UNITS = {"_bytes": ("GiB", 1 / 2**30), "_mib": ("GiB", 1 / 2**10), "_gib": ("GiB", 1.0)}


def write_report(run: RunDir, output: Path | None = None) -> tuple[Path, str]:
    """Write the report (RUN/report.html unless said otherwise); its path and the verdict."""
    facts = read_facts(run)
    path = output or run.path / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, html_of(facts).encode())
    return path, verdict(facts)


def html_of(facts: Facts) -> str:
    """The whole page."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    problems = "".join(f'<p class="problem">{escape(text)}</p>' for text in facts.problems)
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(facts.name)}: {escape(facts.status)}</title>",
            f"<style>{STYLE}{CSS}</style></head><body>",
            f"<header><h1>{escape(facts.name)} "
            f'<span class="status {escape(facts.status)}">{escape(facts.status)}</span></h1>',
            f'<p class="verdict">{escape(verdict(facts))}</p>{problems}</header>',
            "<main>",
            _tiles(facts),
            _charts(facts),
            _attempts(facts),
            _lineage(facts),
            _config(facts),
            _environment(facts),
            "</main>",
            f'<footer class="note">{escape(facts.path)} · written '
            f"{clock(time.time())} by <code>leyden report</code></footer></body></html>\n",
        ]
    )


def _tiles(facts: Facts) -> str:
    total = f" of {facts.planned_steps:,}" if facts.planned_steps else ""
    tiles = [("steps", f"{facts.next_step:,}{total}")]
    if facts.tokens is not None:
        tiles.append(("tokens", number(facts.tokens)))
    if facts.epochs is not None:
        tiles.append(("epochs", number(facts.epochs)))
    for key, name in (("validation_loss", "validation loss"), ("loss", "train loss")):
        if (value := facts.last(key)) is not None:
            tiles.append((f"{name}, nats/token", f"{value:.3f}"))
    if facts.tokens_per_s is not None:
        tiles.append(("tokens/s", number(facts.tokens_per_s)))
    if facts.data_wait_share is not None:
        tiles.append(("data wait", percent(facts.data_wait_share)))
    if facts.goodput is not None:
        tiles.append(("goodput", percent(facts.goodput)))
    if (params := facts.outcome.get("params")) is not None:
        tiles.append(("parameters", number(params)))
    cells = (
        f'<div class="tile"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _charts(facts: Facts) -> str:
    if not facts.metrics:
        return '<h2>Training</h2><p class="note">metrics.jsonl holds nothing yet.</p>'
    loss = Chart(
        title="Loss",
        unit="nats per token",
        series=[
            *series_of(facts, "loss", "train"),
            *series_of(facts, "validation_loss", "validation", dots=True),
        ],
        bands=_bands(facts),
        levels=[(value, name) for name, value in sorted(facts.baselines.items())],
    )
    parts = [
        "<h2>Training</h2>",
        f"<figure>{_caption(loss)}",
        f'<div class="wide">{draw(loss, width=1120, height=340)}</div>',
        f'<div class="narrow">{draw(loss)}</div>',
        _legend(facts),
        "</figure><p></p>",
        '<div class="charts">',
    ]
    keys = {key for line in facts.metrics for key in line}
    memory = [
        (key, key.replace("_", " ").capitalize(), *_memory_unit(key), True)
        for key in sorted(keys)
        if "memory" in key
    ]
    for key, title, unit, factor, from_zero in (*CHARTS, *memory):
        series = series_of(facts, key, title.lower(), factor=factor)
        if series:
            chart = Chart(
                title=title, unit=unit, series=series, bands=_bands(facts), levels=[],
                from_zero=from_zero,
            )  # fmt: skip
            parts.append(f"<figure>{_caption(chart)}{draw(chart)}</figure>")
    return "".join([*parts, "</div>", _values(facts)])


def series_of(
    facts: Facts, key: str, name: str, *, dots: bool = False, factor: float = 1.0
) -> list[Series]:
    """Points of a metric as one series an attempt, its rewound part as another."""
    found: dict[tuple[int, bool], list[tuple[float, float]]] = {}
    for line in facts.metrics:
        value = line.get(key)
        if key == "data_wait":
            value = line["data_wait_s"] / line["step_s"] if line.get("step_s") else None
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        group = found.setdefault((line["attempt"], line["rewound"]), [])
        group.append((line["step"], value * factor))
    several = len(facts.attempts) > 1
    return [
        Series(
            name=(f"{name}, attempt {attempt}" if several else name)
            + (" (rewound)" if rewound else ""),
            points=points,
            color=attempt % NUM_COLORS,
            style="dots" if dots else "dashed" if rewound else "line",
        )
        for (attempt, rewound), points in sorted(found.items())
    ]


def _memory_unit(key: str) -> tuple[str, float]:
    for suffix, unit in MEMORY_UNITS.items():
        if key.endswith(suffix):
            return unit
    return "", 1.0


def _bands(facts: Facts) -> list[tuple[float, float, str]]:
    return [
        (*span, f"steps {span[0]:,} to {span[1]:,} of attempt {attempt.number}: lost, done again")
        for attempt in facts.attempts
        if (span := attempt.rewound)
    ]


def _caption(chart: Chart) -> str:
    odd = sum(1 for one in chart.series for _, y in one.points if not abs(y) < float("inf"))
    bad = f'<span class="problem">{odd:,} values are not finite</span>' if odd else ""
    return f"<figcaption>{escape(chart.title)}<span>{escape(chart.unit)}</span>{bad}</figcaption>"


def _legend(facts: Facts) -> str:
    def item(drawing: str, name: str) -> str:
        return f'<li><svg viewBox="0 0 26 10" aria-hidden="true">{drawing}</svg>{escape(name)}</li>'

    numbers = [attempt.number for attempt in facts.attempts if attempt.segment] or [0]
    shown = numbers if len(numbers) <= 8 else [*numbers[:4], *numbers[-4:]]
    items = []
    for n in shown:
        name = f"train, attempt {n}" if len(numbers) > 1 else "train"
        items.append(item(f'<path class="c{n % NUM_COLORS}" d="M0 5h26"/>', name))
    if len(shown) < len(numbers):
        items.append(f"<li>{len(numbers) - len(shown)} more attempts</li>")
    if any("validation_loss" in line for line in facts.metrics):
        items.append(item('<path class="dot c0" d="M8 5l5-5l5 5l-5 5z"/>', "validation"))
    if _bands(facts):
        dashes = '<rect class="band" width="26" height="10"/><path class="c0 dashed" d="M0 5h26"/>'
        items.append(item(dashes, "rewound: lost at a restart and done again"))
    return f'<ul class="legend">{"".join(items)}</ul>'


def _values(facts: Facts) -> str:
    keys = ("loss", "validation_loss", "lr", "grad_norm", "tokens_per_s")
    lines = [line for line in facts.metrics if any(key in line for key in keys)]
    every = max(1, -(-len(lines) // SHOWN_VALUES))
    chosen = sorted({*range(0, len(lines), every), len(lines) - 1})
    rows = [
        [
            f"{lines[i]['step']:,}" + (" (rewound)" if lines[i]["rewound"] else ""),
            str(lines[i]["attempt"]),
            *(number(float(v)) if (v := lines[i].get(key)) is not None else "" for key in keys),
        ]
        for i in chosen
    ]
    head = ["step", "attempt", *(key.replace("_", " ") for key in keys)]
    note = f" ({len(rows)} of {len(lines):,} logged lines)" if every > 1 else ""
    return f"<details><summary>Values{note}</summary>{table(head, rows)}</details>"


def _attempts(facts: Facts) -> str:
    shown = facts.attempts[-SHOWN_ATTEMPTS:]
    rows = []
    for attempt in shown:
        world = attempt.segment.world_size if attempt.segment else attempt.outcome.get("ranks")
        between = attempt.saves_s + attempt.validation_s
        times = (attempt.useful_s, attempt.lost_s, attempt.startup_s, between, attempt.rest_s)
        rows.append(
            [
                str(attempt.number),
                attempt.status.replace("_", " "),
                clock(attempt.env.get("time")),
                str(attempt.env.get("host", "?")),
                str(world or "?"),
                f"{attempt.first_step:,} to {attempt.end_step:,}",
                f"{attempt.lost_steps:,}",
                *map(duration, (*times, attempt.wall_s)),
            ]
        )
    head = ["attempt", "ended", "began", "host", "ranks", "steps", "of them lost"]
    head += ["kept steps", "lost steps", "start-up", "saves, validation", "rest", "in all"]
    hidden = len(facts.attempts) - len(shown)
    note = f'<p class="note">{hidden} earlier attempts are not shown.</p>' if hidden else ""
    return f"<h2>Attempts and goodput</h2>{_goodput(facts)}{note}{table(head, rows)}"


def _goodput(facts: Facts) -> str:
    attempts = facts.attempts
    timed = [attempt for attempt in attempts if attempt.wall_s is not None]
    if not timed:
        return '<p class="note">No attempt has ended yet, so its time is not known.</p>'
    startup_known = all(attempt.startup_s is not None for attempt in timed)
    validation_known = any(attempt.validation_s for attempt in timed)
    rest = [*([] if validation_known else ["validation"]), *([] if startup_known else ["start-up"])]
    parts = [
        ("useful", "steps that count", sum(a.useful_s for a in timed)),
        ("lost", "steps that were lost", sum(a.lost_s for a in timed)),
        ("startup", "start-up", sum(a.startup_s or 0.0 for a in timed)),
        ("saves", "checkpoints", sum(a.saves_s for a in timed)),
        ("check", "validation", sum(a.validation_s for a in timed)),
        ("other", ", ".join([*rest, "rest"]), sum(a.rest_s or 0.0 for a in timed)),
    ]
    total = sum(seconds for *_, seconds in parts) or 1.0
    bar = "".join(
        f'<i class="{kind}" style="width:{100 * seconds / total:.2f}%"></i>'
        for kind, _, seconds in parts
        if seconds
    )
    words = "".join(
        f'<li><span class="key {kind}"></span>{name}: {duration(seconds)} '
        f"({percent(seconds / total)})</li>"
        for kind, name, seconds in parts
        if seconds
    )
    unknown = len(attempts) - len(timed)
    note = (
        f'<p class="note">Left out, as their end was not recorded: {unknown} of '
        f"{len(attempts)} attempts.</p>"
        if unknown
        else ""
    )
    said = escape(", ".join(f"{name} {percent(seconds / total)}" for _, name, seconds in parts))
    return (
        f'<div class="bar" role="img" aria-label="{said}">{bar}</div>'
        f'<ul class="legend">{words}</ul><p class="note">Goodput is the time in steps that count '
        f"over all the time of the attempts.</p>{note}"
    )


def _lineage(facts: Facts) -> str:
    data, made = facts.data, facts.provenance
    facts_of_data: list[tuple[str, Any]] = [
        ("data", "the sources below" if facts.by_source else facts.identity.get("data")),
        ("data digest", facts.identity.get("data_digest")),
    ]
    if data is None:
        facts_of_data.append(("not opened", facts.data_problem))
    else:
        manifest = data.manifest
        facts_of_data += [
            ("tokenizer", manifest.tokenizer_digest or "none"),
            ("schema", ", ".join(f"{k} {v}" for k, v in sorted(manifest.schema.items()))),
            *(
                (
                    f"split {name}",
                    f"{len(manifest.shards_of(name)):,} shards, "
                    + ", ".join(f"{v:,} {k}" for k, v in manifest.totals[name].items()),
                )
                for name in manifest.splits()
            ),
        ]
    if made:
        quarantine = made.get("quarantine")
        facts_of_data += [
            ("made by", made.get("job")),
            ("by code", made.get("code")),
            ("begun", made.get("started")),
            ("finished", made.get("ended")),
            ("counters", ", ".join(f"{k} {v:,}" for k, v in (made.get("counters") or {}).items())),
            ("quarantine", json.dumps(quarantine) if quarantine else "none"),
            ("inputs", _inputs_summary(made.get("inputs") or [])),
        ]
    seen = f"{facts.samples:,} rows" + (f", {facts.epochs:.3f} epochs" if facts.epochs else "")
    facts_of_data.append(("consumed", seen))
    facts_of_data += [
        (
            f"source {name}",
            f"{rows:,} rows consumed, {epochs:.3f} epochs of it; {facts.versions[name]}",
        )
        for name, rows, epochs in facts.by_source
    ]
    listed = [_input_name(one) for one in (made.get("inputs") or [])]
    more = f"\n... {len(listed) - SHOWN_INPUTS:,} more" if len(listed) > SHOWN_INPUTS else ""
    files = (
        f"<details><summary>Inputs</summary><pre>{escape(chr(10).join(listed[:SHOWN_INPUTS]))}"
        f"{more}</pre></details>"
        if listed
        else ""
    )
    hint = (
        '<p class="note"><code>leyden data who-saw RUN KEY</code> tells when a row or a source was '
        "trained on; <code>leyden data replay RUN --step S</code> prints a step's batch.</p>"
    )
    return f"<h2>Data and lineage</h2>{pairs(facts_of_data)}{files}{hint}"


def _input_name(one: Any) -> str:
    return str(one.get("url") or one.get("path")) if isinstance(one, dict) else str(one)


def _inputs_summary(inputs: list[Any]) -> str:
    sizes = [one.get("size") or 0 for one in inputs if isinstance(one, dict)]
    kinds = sorted({str(one.get("format")) for one in inputs if isinstance(one, dict)})
    more = f", {sum(sizes) / 1e6:,.1f} MB, {', '.join(kinds)}" if sizes else ""
    return f"{len(inputs):,} files{more}"


def _config(facts: Facts) -> str:
    changes = config_changes(facts.attempts)
    changed = f"<p>Changed on the way:</p><pre>{escape(chr(10).join(changes))}</pre>"
    last = facts.attempts[-1].env if facts.attempts else {}
    command = shlex.join(map(str, last.get("argv", [])))
    given = f"<p>Started with:</p><pre>{escape(command)}</pre>" if command else ""
    return (
        f"<h2>Config</h2>{given}{changed if changes else ''}<details><summary>Resolved config "
        f"({escape(str(facts.identity.get('config_digest', ''))[:12])})</summary>"
        f"<pre>{escape(facts.config_yaml)}</pre></details>"
    )


def _environment(facts: Facts) -> str:
    env = facts.attempts[-1].env if facts.attempts else {}
    outcome = facts.outcome
    strategy = outcome.get("strategy") or (facts.config.get("parallel") or {}).get("strategy")
    facts_of_run = [
        ("run id", facts.identity.get("run_id")),
        ("recipe", facts.identity.get("recipe")),
        ("host", env.get("host")),
        ("platform", env.get("platform")),
        ("Python", env.get("python")),
        ("code", env.get("code")),
        ("strategy", strategy),
        ("precision", outcome.get("precision") or facts.config.get("precision")),
        ("job", outcome.get("job_id")),
    ]
    libraries = facts.provenance.get("libraries") or {}
    facts_of_run.append(("data made with", ", ".join(f"{k} {v}" for k, v in libraries.items())))
    text = "\n".join(f"{k}={v}" for k, v in (env.get("environment") or {}).items())
    more = (
        f"<details><summary>Environment variables</summary><pre>{escape(text)}</pre></details>"
        if text
        else ""
    )
    return f"<h2>Environment</h2>{pairs(facts_of_run)}{more}"
