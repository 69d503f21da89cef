"""`leyden data diff`, `gc` and `pin`: compare versions, clean a folder, name a version."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist.data_diff import Difference

DIFF = "what differs between two versions: shards, rows, config, inputs, documents; exit 1"
GC = "delete what no version refers to and is older than 7 days; --dry-run lists it"
PIN = "a small file for Git or DVC that names one version, to pass as --data.url"
SHOWN = 20


def diff(arguments: list[str]) -> int:
    """Print how B differs from A; 0 if they are the same version, 1 if not."""
    parser = argparse.ArgumentParser(
        prog="leyden data diff",
        description=f"Print {DIFF} if they differ, 0 if not.",
        epilog="example: leyden data diff data/corpus@3f9a12c4 data/corpus",
    )
    parser.add_argument("a", metavar="A", help="a dataset: folder, URL, URL@DIGEST or pin file")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    options = parser.parse_args(arguments)
    from dist.data_diff import diff_datasets
    from dist.dataset import open_one

    found = diff_datasets(open_one(options.a), open_one(options.b))
    if options.json:
        record = {**dataclasses.asdict(found), "equal": found.equal}
        print(json.dumps(record, indent=1, sort_keys=True))
    else:
        print(diff_text(found), end="")
    return 0 if found.equal else 1


def diff_text(found: Difference) -> str:
    """What `diff` prints, for people."""
    lines = [f"A          {found.a}", f"B          {found.b}"]
    if found.equal:
        return "\n".join([*lines, "equal      the same version"]) + "\n"
    lines.append(
        f"shards     {found.shared} shared ({found.shared_bytes / 1e6:,.1f} MB), "
        f"{len(found.gone)} only in A, {len(found.added)} only in B"
    )
    for split, changed in found.totals.items():
        text = ", ".join(f"{key} {a:,} -> {b:,}" for key, (a, b) in changed.items())
        lines.append(f"{split:<10} {text}")
    for title, changes in (("identity", found.identity), ("config", found.config)):
        for key, (a, b) in changes.items():
            lines.append(f"{title:<10} {key}: {_short(a)} -> {_short(b)}")
    for how, paths in found.inputs.items():
        shown = ", ".join(map(_short, paths[:SHOWN])) + (", ..." if len(paths) > SHOWN else "")
        lines.append(f"inputs     {len(paths)} {how}: {shown}")
    documents = found.documents
    if "unknown" in documents:
        lines.append(f"documents  {documents['unknown']}")
    else:
        lines.append(
            f"documents  {documents['only_a']:,} only in A, {documents['only_b']:,} only in B"
        )
        for name in ("a", "b"):
            for text in documents[f"listed_{name}"]:
                lines.append(f"  {'-' if name == 'a' else '+'} {_short(text)}")
            if documents[f"only_{name}"] > len(documents[f"listed_{name}"]):
                lines.append(f"  {'-' if name == 'a' else '+'} ...")
    return "\n".join(lines) + "\n"


def _short(value: Any, width: int = 80) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    text = repr(text)[1:-1]
    return text if len(text) <= width else text[: width - 3] + "..."


def gc(arguments: list[str]) -> int:
    """Delete what nothing refers to; SetupError (exit 4) while a job writes there."""
    parser = argparse.ArgumentParser(
        prog="leyden data gc",
        description="In a dataset's folder, " + GC + ". Every version (each file of manifests/) "
        "is kept whole; while a job writes there nothing is deleted.",
        epilog="examples: leyden data gc data/corpus --dry-run    "
        "leyden data gc data/corpus --older-than 30d",
    )
    parser.add_argument("url", metavar="URL", help="folder or URL of a dataset")
    parser.add_argument("--dry-run", action="store_true", help="list it, delete nothing")
    parser.add_argument(
        "--older-than", default="7d", metavar="AGE", help="as 7d, 12h or 30m (7d); younger is kept"
    )
    options = parser.parse_args(arguments)
    from dist import data_gc
    from dist.data_pin import is_pin
    from dist.errors import ConfigError
    from dist.manifest import parse_reference
    from dist.references import MIXED
    from dist.storage import Storage

    older_than_s = data_gc.parse_age(options.older_than)
    url, prefix = parse_reference(options.url)
    if prefix is not None or url.startswith(MIXED):
        raise ConfigError("gc cleans a whole folder: pass it without the @ and digest of a version")
    if is_pin(url):
        raise ConfigError(f"gc cleans a whole folder: pass the one that {url} names")
    storage = Storage(url)
    found = data_gc.collect(storage, older_than_s, dry_run=options.dry_run)
    if options.dry_run and (note := data_gc.lease_note(storage)):
        print(f"note: {note}, so gc would be refused", file=sys.stderr)
    for name, size in sorted(found.garbage.items()):
        print(f"{size:>14,}  {name}")
    did = "would be deleted" if options.dry_run else "deleted"
    print(
        f"{len(found.garbage)} files, {sum(found.garbage.values()) / 1e6:,.1f} MB {did}; "
        f"{found.versions} versions keep {found.kept} files; {len(found.young)} files, "
        f"{sum(found.young.values()) / 1e6:,.1f} MB, are unreferenced and younger than "
        f"{options.older_than}"
    )
    if found.foreign:
        print(f"left alone, not Leyden's: {', '.join(found.foreign[:SHOWN])}", file=sys.stderr)
    return 0


def pin(arguments: list[str]) -> int:
    """Write or print a pin file."""
    parser = argparse.ArgumentParser(
        prog="leyden data pin",
        description=f"Write {PIN}. It holds url, digest, kind, totals, size and the tokenizer's "
        "digest. A relative REF is written relative to the file.",
        epilog="example: leyden data pin data/corpus -o corpus.pin",
    )
    parser.add_argument("reference", metavar="REF", help="folder, URL, URL@DIGEST, or a pin file")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="NAME.pin; standard output if left out"
    )
    options = parser.parse_args(arguments)
    from dist import data_pin
    from dist.dataset import open_one

    dataset = open_one(options.reference)
    path = Path(options.output) if options.output else None
    folder = path.parent if path else Path.cwd()
    url = data_pin.pin_url(dataset, options.reference, folder)
    record = data_pin.pin_record(dataset, url)
    if path is None:
        print(data_pin.pin_text(record), end="")
        return 0
    data_pin.write_pin(path, record)
    print(f"{path}: {dataset.reference}")
    return 0
