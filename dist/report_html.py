"""Style and small parts of the report's page."""

from __future__ import annotations

import time
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1c2024; --soft: #5c6670;
  --line: #e3e7ea; --panel: #f6f8f9; --bad: #c62828; --good: #1a7f37; --wait: #9a6700;
  --c0: #0969da; --c1: #bc4c00; --c2: #1a7f37; --c3: #8250df; --c4: #bf3989; --c5: #1b7c83; }
@media (prefers-color-scheme: dark) { :root { --page: #0e1116; --text: #e6e9ec; --soft: #9aa5b1;
  --line: #262c34; --panel: #161b22; --bad: #ff7b72; --good: #56d364; --wait: #e3b341;
  --c0: #6cb6ff; --c1: #ffa657; --c2: #56d364; --c3: #d2a8ff; --c4: #ff9bce; --c5: #56d4dd; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 20px 16px 48px; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 36px 0 10px; }
.status { display: inline-block; font-size: .85rem; font-weight: 600; padding: 1px 10px;
  border: 1.5px solid currentColor; border-radius: 999px; vertical-align: 3px; margin-left: 6px; }
.completed { color: var(--good); } .running, .stopped { color: var(--c0); }
.failed, .data_refused, .hung, .no_restart, .killed, .problem { color: var(--bad); }
.verdict { font-size: 1.05rem; margin: 6px 0 18px; max-width: 75ch; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 10px; }
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: 8px 12px; }
.tile b { display: block; font-size: 1.15rem; font-weight: 600; white-space: nowrap; }
.tile span, .note, figcaption span, .empty { color: var(--soft); font-size: .85rem; }
.charts { display: grid; gap: 18px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; min-width: 0; } figcaption { margin-bottom: 2px; font-weight: 600; }
figcaption span { font-weight: 400; margin-left: 6px; } .wide { display: none; }
@media (min-width: 720px) { .wide { display: block; } .narrow { display: none; } }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 2px 0 0; padding: 0;
  list-style: none; font-size: .85rem; color: var(--soft); }
.legend svg { width: 26px; height: 10px; margin-right: 5px; } .legend path { stroke-width: 2.2; }
.legend .dashed { stroke-dasharray: 5 4; } .legend .band { fill: var(--bad); opacity: .25; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: right; padding: 4px 8px; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
.bar { display: flex; height: 16px; border-radius: 4px; overflow: hidden; margin: 12px 0 6px;
  background: var(--line); } .bar i { display: block; min-width: 1px; }
.useful { background: var(--c2); } .lost { background: var(--bad); }
.startup { background: var(--wait); } .saves { background: var(--c0); }
.check { background: var(--c3); } .other { background: var(--soft); }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: 5px; }
dl { display: grid; grid-template-columns: minmax(7em, max-content) 1fr; gap: 3px 16px; margin: 0;
  font-size: .92rem; } dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 560px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: 8px; } }
code, pre { font: .86em/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; margin: 8px 0;
  padding: 10px 12px; overflow-x: auto; } details { margin: 10px 0; }
summary { cursor: pointer; color: var(--c0); } footer { margin-top: 40px; }
"""


def pairs(facts: list[tuple[str, Any]]) -> str:
    """Names and values as a definition list; empty values are left out."""
    rows = (f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts if v)
    return f"<dl>{''.join(rows)}</dl>"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table that scrolls sideways on its own where it is too wide."""
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def clock(seconds: float | None) -> str:
    """A time of the epoch in this machine's time zone; ? if it is not known."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "?"


def duration(seconds: float | None) -> str:
    """12.3 s, 4 min 05 s, 3 h 07 min; ? if it is not known."""
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
