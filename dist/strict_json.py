"""Numbers that JSON does not have (NaN, infinities), in files that any parser can read.

Python writes a bare NaN, which jq, DuckDB and JavaScript refuse. Here such a number is null, and
`non_finite` says what it was: {"loss": null, "non_finite": {"loss": "nan"}}, nested ones by their
path ("facts/train_loss"). Files of before, with a bare NaN, are read too.
"""

from __future__ import annotations

import json
import math
from typing import Any

NON_FINITE = "non_finite"


def dumps(record: dict[str, Any], **options: Any) -> str:
    """json.dumps without NaN, Infinity and -Infinity; loads() gives them back."""
    found: dict[str, str] = {}
    plain = _plain(record, "", found)
    if found:
        plain[NON_FINITE] = found
    return json.dumps(plain, allow_nan=False, **options)


def loads(text: bytes | str) -> Any:
    """json.loads, with the numbers that dumps() took out; ValueError for what is no JSON."""
    record = json.loads(text)
    if isinstance(record, dict) and isinstance(record.get(NON_FINITE), dict):
        for path, value in record.pop(NON_FINITE).items():
            _put(record, path.split("/"), float(value))
    return record


def _plain(value: Any, path: str, found: dict[str, str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        found[path] = repr(float(value))
        return None
    if isinstance(value, dict):
        inner = {key: f"{path}/{key}" if path else str(key) for key in value}
        return {key: _plain(one, inner[key], found) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one, f"{path}/{i}", found) for i, one in enumerate(value)]
    return value


def _put(record: Any, path: list[str], value: float) -> None:
    """Set what a path names; nothing where an editor has taken it away."""
    for word in path[:-1]:
        try:
            record = record[int(word)] if isinstance(record, list) else record[word]
        except (KeyError, IndexError, ValueError, TypeError):
            return
    if isinstance(record, list):
        if path[-1].isdigit() and int(path[-1]) < len(record):
            record[int(path[-1])] = value
    elif isinstance(record, dict):
        record[path[-1]] = value
