"""`leyden submit --sweep KEY=V1,V2,...`: one job array, each task a run of its own.

Task k runs in the folder that --run names with {task} replaced by k (NAME-{task} if the name has
none), with the k-th combination of values: of several keys all combinations, the last key fastest.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from dist.errors import ConfigError

PLACE = "{task}"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of an array."""

    number: int
    run_dir: str
    arguments: tuple[str, ...]
    """Of the recipe, all of them."""
    values: tuple[str, ...]
    """KEY=VALUE of what the sweep gives it."""


def parse_sweep(text: str) -> tuple[str, list[str]]:
    r"""(key, values) of KEY=V1,V2,...; a comma inside a value is written `\,`."""
    key, equals, rest = text.partition("=")
    key = key.removeprefix("--")
    if not key or not equals:
        raise ConfigError(f"--sweep {text!r} is not KEY=V1,V2,..., such as seed=0,1,2")
    values = [""]
    letters = iter(rest)
    for letter in letters:
        if letter == ",":
            values.append("")
            continue
        following = next(letters, "") if letter == "\\" else ""
        # Of any other letter the backslash stays: a value is taken as it was typed.
        values[-1] += following if following == "," else letter + following
    if len(set(values)) != len(values):
        raise ConfigError(
            f"--sweep {text!r} gives a value twice: two runs would be one and the same"
        )
    return key, values


def combinations(sweeps: Sequence[str]) -> list[list[tuple[str, str]]]:
    """(key, value) pairs of each task."""
    parsed = [parse_sweep(text) for text in sweeps]
    keys = [key for key, _ in parsed]
    if len(set(keys)) != len(keys):
        raise ConfigError(
            f"--sweep names a key twice ({', '.join(keys)}); give all its values once"
        )
    grid = itertools.product(*(values for _, values in parsed))
    return [list(zip(keys, values, strict=True)) for values in grid]


def name_pattern(name: str) -> str:
    """A run's name with the place of the task's number."""
    return name if PLACE in name else f"{name}-{PLACE}"


def at(pattern: str, number: int | str) -> str:
    """The pattern for one task."""
    return pattern.replace(PLACE, str(number))


def make_tasks(
    sweeps: Sequence[str], *, run_dir: str, arguments: Sequence[str], run_words: Sequence[str]
) -> tuple[Task, ...]:
    """The tasks of an array. run_dir and run_words (`--run NAME`; empty for none) hold {task}."""
    for key, _ in combinations(sweeps)[0]:
        given = [word.partition("=")[0] for word in arguments]
        if f"--{key}" in given:
            raise ConfigError(f"--{key} is given, and --sweep gives it values too; leave one out")
    tasks = []
    for number, pairs in enumerate(combinations(sweeps)):
        words = [f"--{key}={value}" for key, value in pairs]
        own = [at(word, number) for word in run_words]
        tasks.append(
            Task(
                number=number,
                run_dir=at(run_dir, number),
                arguments=(*arguments, *own, *words),
                values=tuple(f"{key}={value}" for key, value in pairs),
            )  # fmt: skip
        )
    return tuple(tasks)


def without_run(words: Sequence[str], name: str) -> list[str]:
    """The arguments without `--run NAME`."""
    left: list[str] = []
    skip = False
    for word, following in itertools.pairwise([*words, ""]):
        if skip:
            skip = False
        elif word == "--run" and following == name:
            skip = True
        elif word != f"--run={name}":
            left.append(word)
    return left
