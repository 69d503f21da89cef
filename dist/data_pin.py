"""A pin: a small JSON file, for Git and DVC, that names one version of a dataset.

`data.url: corpus.pin` is as good as `URL@digest`. A relative url is relative to the pin file.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist.errors import ConfigError, DataRefused
from dist.local_files import write_atomic

if TYPE_CHECKING:
    from dist.dataset import Dataset

PIN_VERSION = 1
SUFFIXES = (".pin", ".pin.json")
_KEYS = {
    "leyden_pin",
    "url",
    "data_digest",
    "kind",
    "shards",
    "bytes",
    "totals",
    "tokenizer_digest",
}


def is_pin(reference: str) -> bool:
    """Whether a reference is a pin file's path."""
    return reference.endswith(SUFFIXES)


def pin_record(dataset: Dataset, url: str) -> dict[str, Any]:
    """What a pin file of a version holds."""
    manifest = dataset.manifest
    return {
        "leyden_pin": PIN_VERSION,
        "url": url,
        "data_digest": dataset.data_digest,
        "kind": manifest.kind,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "totals": manifest.totals,
        "tokenizer_digest": manifest.tokenizer_digest,
    }


def pin_url(dataset: Dataset, given: str, folder: Path) -> str:
    """The url to write: relative to the pin's folder if the user named the dataset relatively."""
    local = dataset.storage.local_path("")
    if local is None or given.startswith(("/", "file://")):
        return dataset.storage.url
    return os.path.relpath(local, folder.absolute())


def write_pin(path: Path, record: dict[str, Any]) -> None:
    """Write a pin file; ConfigError for a name by which it would not be known as one."""
    if not is_pin(path.name):
        raise ConfigError(f"{path} is not a pin's name; let it end in .pin or .pin.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, pin_text(record).encode())


def pin_text(record: dict[str, Any]) -> str:
    """The file: sorted, indented, so that a diff of two versions shows what changed."""
    return json.dumps(record, indent=1, sort_keys=True) + "\n"


def read_pin(path: Path) -> str:
    """`URL@digest` that a pin file stands for."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"there is no pin file {path}") from None
    except ValueError as error:
        raise DataRefused(f"{path} is not JSON ({error}); restore it from Git") from None
    version = record.get("leyden_pin") if isinstance(record, dict) else None
    if isinstance(version, int) and version > PIN_VERSION:
        raise DataRefused(f"{path} is a pin of version {version}; update Leyden")
    if version != PIN_VERSION or set(record) != _KEYS:
        raise DataRefused(f"{path} is not a pin that `leyden data pin` wrote")
    url, digest = record["url"], str(record["data_digest"])
    if not isinstance(url, str) or not url or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise DataRefused(f"{path}: its url or data_digest is not one; restore it from Git")
    if "://" not in url and not os.path.isabs(url):
        url = os.path.normpath(path.absolute().parent / url)
    return f"{url}@{digest}"
