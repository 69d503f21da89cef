"""`leyden train RECIPE`: run a recipe, or a user's own file, on the ranks of this machine."""

from __future__ import annotations

import ast
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from dist.errors import ConfigError
from launch.cli import nearest
from launch.nodes import NodeOptions, Nodes, find_nodes
from launch.processes import command_text, run_child
from launch.restarts import MAX_RESTARTS, Launch, follow, is_own_folder, lead
from launch.rooms import ROOT
from launch.torchrun import AGENT, STANDALONE, num_gpus, parse_nproc, torchrun_argv, torchrun_env

# Files of recipes with a main of their own that train nothing: verbs of their own start them.
NOT_TRAINING = ("evaluate", "export", "generate", "plan")
_NODE_WORDS = {
    "--nnodes": "nnodes", "--rdzv": "rdzv", "--rdzv-id": "rdzv_id", "--node-rank": "node_rank",
    "--local-addr": "local_addr", "--join-timeout": "join_timeout",
}  # fmt: skip


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
        "\n       leyden train path/to/mine.py [--nproc N] [--dry-run] [ARGUMENT ...]\n"
        "       on each of N nodes: leyden train RECIPE --nnodes N --rdzv HOST:PORT ...\n\n"
        "Runs a recipe under torchrun; all other arguments go to the recipe as they are\n"
        "(`leyden train RECIPE --help` lists its keys).\n\n"
        "  --nproc N    ranks: a number, or auto (default) = one for each GPU, 1 without a GPU\n"
        "  --run NAME   the run's folder, runs/NAME; a run that exists is resumed\n"
        "  --fresh      with --run: start another run (NAME-2, ...) and leave the old one alone\n"
        "  --max-restarts N  with --run: after a crash, a hang or a killed rank go on from the\n"
        f"               newest checkpoint, at most N times (default {MAX_RESTARTS}, and 0 for a\n"
        "               file of your own); three without a new checkpoint end the run (93)\n"
        "  --dry-run    print the exact command and start nothing\n"
        "  --           everything after it goes to the recipe, even the names above\n\n"
        "several nodes, without Slurm (the same command on each; --run on a shared file system):\n"
        "  --nnodes N|MIN:MAX   nodes of the run\n"
        "  --rdzv HOST:PORT     the first node as the others know it, and a free port of it\n"
        "  --node-rank K        0 on the first node; found by HOST's address if left out\n"
        "  --local-addr ADDR    this node's address, where the one towards HOST is not it\n"
        "  --rdzv-id NAME       instead of one made of the run's folder\n"
        "  --join-timeout S     how long nodes wait for each other (300)\n\n"
        f"recipes:\n{lines}\n\n"
        "examples:\n"
        "  leyden train pretrain --config tiny --nproc 2 --data.url data/quickstart/dataset\n"
        "  leyden train pretrain --config tiny --run first --max_steps 200\n"
        "  leyden train pretrain --config tiny --run first --dry-run\n"
        "  leyden train pretrain --config 124m --run first --nnodes 2 --rdzv 10.0.0.1:29500\n"
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
    max_restarts: str = ""
    nodes: NodeOptions = field(default_factory=NodeOptions)
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
        elif word.partition("=")[0] in ("--max-restarts", *_NODE_WORDS):
            name, equals, value = word.partition("=")
            if not equals and not left:
                raise ConfigError(f"{name} needs a value; leyden train --help shows one")
            value = value if equals else left.pop(0)
            if name == "--max-restarts":
                request.max_restarts = value
            else:
                setattr(request.nodes, _NODE_WORDS[name], value)
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
    run = os.path.abspath(run_folder(request.run, request.run_root)) if request.run else ""
    nodes = find_nodes(request.nodes, run=run, target=target, only_text=request.dry_run)
    restarts = parse_max_restarts(request.max_restarts, target)
    env = torchrun_env(nproc, os.environ, len(os.sched_getaffinity(0)))
    meeting = nodes.options() if nodes else STANDALONE
    shown = command_text(torchrun_argv(target, passed, nproc=nproc, meeting=meeting), env)
    if request.dry_run:
        print(shown)
        return 0
    print(f"$ {shown}", file=sys.stderr, flush=True)
    env["LEYDEN_NUM_RANKS"] = nodes.num_ranks(nproc) if nodes else str(nproc)

    def start(more: list[str], settings: dict[str, str]) -> tuple[int, bool]:
        argv = torchrun_argv(
            target, passed, nproc=nproc, launcher=AGENT, meeting=meeting, more=more
        )  # fmt: skip
        signals: list[int] = []
        return run_child(argv, env={**env, **settings}, title=title, received=signals), bool(
            signals
        )

    if restarts is None or not is_own_folder(run):
        return start([], {"LEYDEN_RUN": run} if run else {})[0]
    launch = Launch(
        run=Path(run), node=node_name(nodes), nproc=nproc, max_restarts=restarts, start=start,
        own_file=target.endswith(".py"), several=nodes is not None,
        join_timeout_s=nodes.join_timeout_s if nodes else 0.0,
    )  # fmt: skip
    return lead(launch) if nodes is None or nodes.is_host else follow(launch)


def parse_max_restarts(text: str, target: str) -> int | None:
    """How often a run may be started again; None for a user's own file that does not say."""
    if not text:
        return None if target.endswith(".py") else MAX_RESTARTS
    if not text.isdigit():
        raise ConfigError(f"--max-restarts {text!r} is not a number: give 0, 1, 2, ...")
    return int(text)


def node_name(nodes: Nodes | None) -> str:
    """Of this node among the run's: how the others reach it, or this machine's name."""
    return nodes.local_addr if nodes else socket.gethostname()
