"""Real text that every machine has: Python sources, copied in a fixed order up to a size."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist.errors import SetupError

# Slim images lack `test`; the other folders are not the standard library's.
LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
# Core requirements with many sources of their own, in sorted order.
PACKAGES = (
    "accelerate",
    "fsspec",
    "jsonargparse",
    "numpy",
    "pandas",
    "peft",
    "pyspark",
    "pytorch-lightning",
    "torch",
    "torchmetrics",
    "transformers",
)


def standard_library() -> Iterator[tuple[str, Path]]:
    """(name, path) of the standard library's sources without its tests, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not LEFT_OUT.intersection(parts[:-1]):
            found.append(("/".join(("stdlib", *parts)), path))
    yield from sorted(found)


def installed_packages() -> Iterator[tuple[str, Path]]:
    """(name, path) of the sources of PACKAGES that are installed, package by package."""
    for package in PACKAGES:
        try:
            distribution = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        files = [file for file in distribution.files or [] if file.suffix == ".py"]
        for file in sorted(files, key=str):
            yield f"{package}/{file}", Path(str(distribution.locate_file(file)))


def readable(path: Path) -> bytes | None:
    """The file's bytes if it is text that is not blank, else None."""
    try:
        data = path.read_bytes()
        return data if data.decode("utf-8").strip() else None
    except (OSError, UnicodeDecodeError):
        return None


def write_corpus(target: Path, max_bytes: int) -> dict[str, Any]:
    """Copy sources to `target` until the next file would pass `max_bytes`; returns the inventory.

    The folder appears under its name when it is complete. Equal installations give equal bytes.
    """
    from dist.progress import Progress

    making = target.with_name(target.name + ".tmp")
    shutil.rmtree(making, ignore_errors=True)
    total, files, digest = 0, 0, hashlib.sha256()
    with Progress("collect", max_bytes / 1e6, "MB") as bar:
        for source in (standard_library, installed_packages):
            for name, path in source():
                data = readable(path)
                if data is None:
                    continue
                if total + len(data) > max_bytes:
                    break
                copy = making / f"{name}.txt"
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(data)
                digest.update(f"{name} {len(data)} ".encode() + data)
                total, files = total + len(data), files + 1
                bar.set(total / 1e6, note=f"{files} files")
            else:
                continue
            break
    if files == 0:
        raise SetupError(
            f"no Python sources under {sysconfig.get_path('stdlib')}; use a Python that is "
            "installed with its library as .py files"
        )
    inventory = {"files": files, "bytes": total, "sha256": digest.hexdigest()}
    shutil.rmtree(target, ignore_errors=True)
    making.rename(target)
    # Beside the folder, not in it: everything in the folder is input.
    target.with_suffix(".json").write_text(json.dumps(inventory, indent=1) + "\n")
    return inventory
