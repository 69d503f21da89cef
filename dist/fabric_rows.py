"""A row of `leyden check`, the table of them, and which nodes they would leave out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

OK, WARN, FAIL, SKIPPED = "ok", "warn", "fail", "-"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    check: str
    verdict: str
    value: str
    """What was measured."""
    advice: str = ""
    """What is wrong and what to do; '' if nothing is."""
    nodes: tuple[str, ...] = ()
    """Where it is wrong."""


def nodes_to_exclude(rows: Iterable[Row], all_nodes: Iterable[str]) -> list[str]:
    """Nodes that fail where others do not; what fails everywhere is not the nodes' fault."""
    every = set(all_nodes)
    found = {node for row in rows if row.verdict == FAIL and set(row.nodes) < every
             for node in row.nodes}  # fmt: skip
    return sorted(found) if found < every else []


def table_text(rows: Sequence[Row]) -> str:
    """Aligned lines: verdict, check, what was measured; the advice below its row."""
    width = max(len(row.check) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.verdict:<5} {row.check:<{width}}  {row.value}")
        if row.advice:
            lines.append(f"{'':<5} {'':<{width}}  {row.advice}")
    return "\n".join(lines)


def record_of(rows: Sequence[Row], facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For --json: the rows, the nodes, and every pair's speed."""
    nodes = list(nodes_of(facts))
    return {
        "rows": [asdict(row) for row in rows],
        "nodes": nodes,
        "exclude": nodes_to_exclude(rows, nodes),
        "pairs": [pair for one in facts for pair in one["pairs"]],
        "ok": all(row.verdict != FAIL for row in rows),
    }


def nodes_of(facts: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the nodes, each once, in the order of ranks."""
    return tuple(dict.fromkeys(str(one["node"]) for one in facts))
