"""What `leyden eval`, `generate` and `export` share: find the model, show the help, start the work.

The work is a module of recipes/ and its Config lists the options; the help is read from its source
without importing it, as importing would take seconds and torch.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist.errors import ConfigError
from dist.model_folder import find_model
from launch.processes import command_text, run_child
from launch.rooms import ROOT

SHARED = ("trained", "causal_lm")


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One verb and the recipe behind it."""

    name: str
    recipe: str
    what: str
    """RUN, or RUN|FOLDER."""
    summary: str
    examples: tuple[str, ...]


def options_of(recipe: str) -> list[tuple[str, str, str]]:
    """(key, default, sentence) of each field of a recipe's Config, nested ones in full."""
    classes = {k: v for stem in (*SHARED, recipe) for k, v in _classes(stem).items()}
    return [one for one in _fields(classes, "Config") if one[0] != "model"]


def _classes(stem: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse((ROOT / "recipes" / f"{stem}.py").read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _fields(classes: dict[str, ast.ClassDef], name: str) -> Iterator[tuple[str, str, str]]:
    body = classes[name].body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        kind = ast.unparse(node.annotation)
        if kind in classes:
            for key, default, what in _fields(classes, kind):
                yield f"{node.target.id}.{key}", default, what
            continue
        default = ast.unparse(node.value) if node.value is not None else ""
        said = following.value if isinstance(following, ast.Expr) else None
        text = said.value if isinstance(said, ast.Constant) else ""
        yield node.target.id, "" if kind == "bool" else default, " ".join(str(text).split())


def help_text(verb: Verb) -> str:
    """What `leyden VERB --help` prints."""
    known = options_of(verb.recipe)
    heads = [f"--{key} {default.strip(chr(39))}".rstrip() for key, default, _ in known]
    width = max(map(len, heads))
    lines = [f"  {head:<{width}}  {what}" for head, (_, _, what) in zip(heads, known, strict=True)]
    options = "\n".join(lines)
    examples = "\n".join(f"  leyden {verb.name} {one}" for one in verb.examples)
    return (
        f"usage: leyden {verb.name} {verb.what} [--key value ...] [--dry-run]\n\n{verb.summary}\n\n"
        "RUN names runs/RUN or is the path of a run's folder"
        + ("; FOLDER is an exported model.\n" if "FOLDER" in verb.what else ".\n")
        + f"\noptions and their defaults:\n{options}\n\nexamples:\n{examples}\n"
    )


def value_of(flag: str, words: Sequence[str]) -> str | None:
    """The last value given to `--flag`, None if it is not given."""
    value = None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
    return value


def main(verb: Verb, arguments: Sequence[str], *, terminal: bool = False) -> int:
    """Check the model's name, start the recipe, return its exit code.

    With `terminal` the recipe takes this process's place, and so its terminal.
    """
    if not arguments or any(word in ("-h", "--help") for word in arguments):
        print(help_text(verb), end="")
        return 0 if arguments else 2
    words = [word for word in arguments if word != "--dry-run"]
    if not words or words[0].startswith("-"):
        raise ConfigError(f"{verb.what} comes first: leyden {verb.name} {verb.what} ...")
    root = value_of("--run_root", words) or "runs"
    find_model(words[0], root, only_run="FOLDER" not in verb.what)
    argv = [sys.executable, "-m", f"recipes.{verb.recipe}", *words]
    if "--dry-run" in arguments:
        print(command_text(argv))
        return 0
    if terminal:
        sys.stdout.flush()
        os.execv(argv[0], argv)
    return run_child(argv)


def file_given(flag: str, words: Sequence[str]) -> None:
    """ConfigError if `flag` names a file that is not there."""
    value = value_of(flag, words)
    if value is not None and not Path(value).is_file():
        raise ConfigError(f"no such file: {value} ({flag})")
