"""`leyden train RECIPE`: run a recipe, or a user's own file, on the ranks of this machine."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from dist.errors import ConfigError
from launch.cli import nearest
from launch.processes import command_text, run_child
from launch.rooms import ROOT
from launch.torchrun import AGENT, num_gpus, parse_nproc, torchrun_argv, torchrun_env

# Files of recipes with a main of their own that train nothing: verbs of their own start them.
NOT_TRAINING = ("evaluate", "export", "generate", "plan")
RUN_VARIABLE = "LEYDEN_RUN"


def recipes() -> dict[str, str]:
    """Recipe name -> first line of its docstring: the files of recipes that define a main."""
    found = {}
    for path in sorted((ROOT / "recipes").glob("*.py")):
        if path.stem in NOT_TRAINING:
            continue
        tree = ast.parse(path.read_text())
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if "main" in names:
            summary = (ast.get_docstring(tree) or "").strip().splitlines()[:1]
            found[path.stem] = summary[0] if summary else ""
    return found


def help_text() -> str:
    """What `leyden train --help` prints."""
    lines = "\n".join(f"  {name:<18} {what}" for name, what in recipes().items())
    return (
        "usage: leyden train RECIPE [--nproc N] [--fresh] [--dry-run] [--config NAME] [--key v ...]"
        "\n       leyden train path/to/mine.py [--nproc N] [--dry-run] [ARGUMENT ...]\n\n"
        "Runs a recipe under torchrun on this machine; all other arguments go to the recipe as\n"
        "they are (`leyden train RECIPE --help` lists its keys).\n\n"
        "  --nproc N    ranks: a number, or auto (default) = one for each GPU, 1 without a GPU\n"
        "  --run NAME   the run's folder, runs/NAME; a run that exists is resumed\n"
        "  --fresh      with --run: start another run (NAME-2, ...) and leave the old one alone\n"
        "  --dry-run    print the exact command and start nothing\n"
        "  --           everything after it goes to the recipe, even the names above\n\n"
        f"recipes:\n{lines}\n\n"
        "examples:\n"
        "  leyden train pretrain --config tiny --nproc 2 --data.url data/quickstart/dataset\n"
        "  leyden train pretrain --config tiny --run first --max_steps 200\n"
        "  leyden train pretrain --config tiny --run first --dry-run\n"
    )


@dataclass
class Request:
    """What a command line of `leyden train` asks for."""

    nproc: str = "auto"
    dry_run: bool = False
    fresh: bool = False
    run: str = ""
    """Value of --run, which stays among `passed`."""
    run_root: str = "runs"
    """Value of --run_root, likewise."""
    passed: list[str] = field(default_factory=list)
    """Arguments of the recipe, byte for byte and in order."""


def split_arguments(words: Sequence[str]) -> Request:
    """Take our own options out and leave every other word alone.

    Not argparse: it would complete abbreviations and move words, and a value like `--x` or an
    empty string must arrive at the recipe as it was typed.
    """
    request = Request()
    left = list(words)
    while left:
        word = left.pop(0)
        if word == "--":
            request.passed += left
            break
        if word == "--dry-run":
            request.dry_run = True
        elif word == "--fresh":
            request.fresh = True
        elif word == "--nproc":
            if not left:
                raise ConfigError("--nproc needs a number of ranks: give 1, 2, ... or auto")
            request.nproc = left.pop(0)
        elif word.startswith("--nproc="):
            request.nproc = word.removeprefix("--nproc=")
        else:
            request.passed.append(word)
    for name in ("run", "run_root"):
        setattr(request, name, value_of(f"--{name}", request.passed) or getattr(request, name))
    return request


def value_of(flag: str, words: Sequence[str]) -> str:
    """The last value given to `flag` as `--flag value` or `--flag=value`; '' if there is none."""
    value = ""
    for word, following in pairwise([*words, ""]):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
    return value


def run_folder(name: str, run_root: str) -> str:
    """Folder of a run as the recipes find it: a name in run_root, or a path."""
    return name if "/" in name else os.path.join(run_root, name)


def fresh_name(name: str, run_root: Path) -> str:
    """`name`, or the first of name-2, name-3, ... that no run has."""
    number, candidate = 1, name
    while (run_root / candidate).exists():
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def replace_run(words: Sequence[str], old: str, new: str) -> list[str]:
    """The arguments with the value of --run replaced."""
    replaced, after_run = [], False
    for word in words:
        if after_run and word == old:
            replaced.append(new)
        elif word == f"--run={old}":
            replaced.append(f"--run={new}")
        else:
            replaced.append(word)
        after_run = word == "--run"
    return replaced


def find_target(recipe: str) -> str:
    """A module of recipes, or the path of a user's own file."""
    if recipe.endswith(".py") or "/" in recipe:
        if not Path(recipe).is_file():
            raise ConfigError(f"no such recipe file: {recipe}; give the path of a .py file")
        if not recipe.endswith(".py"):
            raise ConfigError(f"{recipe} is not a .py file, so torchrun cannot start it")
        return recipe
    known = recipes()
    if recipe not in known:
        raise ConfigError(
            f"{recipe!r} is not a recipe{nearest(recipe, list(known))} "
            f"(recipes: {', '.join(known)}; your own: leyden train path/to/mine.py)"
        )
    return f"recipes.{recipe}"


def main(arguments: list[str], title: str = "") -> int:
    """Run the recipe on its ranks and return their exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text(), end="")
        return 0 if arguments else 2
    target = find_target(arguments[0])
    request = split_arguments(arguments[1:])
    nproc = parse_nproc(request.nproc, num_gpus())
    passed = request.passed
    if any(word in ("-h", "--help", "--print_config") for word in passed):
        # One process is enough to answer, and two would answer twice.
        what = [target] if target.endswith(".py") else ["-m", target]
        return run_child([sys.executable, *what, *passed])
    if request.fresh and request.run:
        # Without a name every start is another run.
        root = Path(".") if "/" in request.run else Path(request.run_root)
        fresh = fresh_name(request.run, root)
        passed = replace_run(passed, request.run, fresh)
        request.run = fresh
    env = torchrun_env(nproc, os.environ, len(os.sched_getaffinity(0)))
    shown = command_text(torchrun_argv(target, passed, nproc=nproc), env)
    if request.dry_run:
        print(shown)
        return 0
    print(f"$ {shown}", file=sys.stderr, flush=True)
    if request.run:
        # By this, whatever a run left behind can be told from other runs' processes.
        env = {**env, RUN_VARIABLE: os.path.abspath(run_folder(request.run, request.run_root))}
    return run_child(
        torchrun_argv(target, passed, nproc=nproc, launcher=AGENT), env=env, title=title
    )
