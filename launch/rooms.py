"""Where the four rooms are, and whether another package stands in front of one of them."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path

ROOMS = ("dist", "recipes", "spark_jobs", "launch")
ROOT = Path(__file__).resolve().parent.parent


def shadowed_room(path: list[str] | None = None, cwd: Path | None = None) -> str | None:
    """A sentence naming the first room that another package hides; None if all are ours.

    Two ways lead there: an installed package of the same name (torchtune ships a `recipes`), and
    a package in the current folder, which `python -m` puts first for the processes we start.
    """
    search = sys.path if path is None else path
    here = Path.cwd() if cwd is None else cwd
    for room in ROOMS:
        ours = ROOT / room / "__init__.py"
        spec = importlib.machinery.PathFinder.find_spec(room, [str(here), *search, str(ROOT)])
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found is not None and found != ours:
            what = (
                f"{here} is the current folder: run leyden from another one"
                if found.is_relative_to(here.resolve())
                else f"uninstall the package that owns it, or set PYTHONPATH={ROOT}"
            )
            return f"the package `{room}` is {found}, which hides Leyden's {ours}; {what}"
    return None
