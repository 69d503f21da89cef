"""Configs: dataclass defaults < YAML files < flags; an unknown key is refused with the nearest."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import io
import json
import re
import typing
from pathlib import Path
from typing import Any, TypeVar

from dist.errors import ConfigError

Config = TypeVar("Config")


def parse_config(
    cls: type[Config],
    argv: list[str],
    *,
    prog: str,
    description: str,
    configs: Path | None = None,
    prefix: str = "",
) -> Config:
    """Build `cls` from `--config FILE` (a path, or NAME for configs/<prefix>NAME.yaml; repeatable)
    and `--a.b value` flags. ConfigError says what is wrong and the nearest key."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file, or the name of a shipped one")
    parser.add_class_arguments(cls, as_group=False)
    argv = _bare_lists(_named_configs(argv, configs, prefix), cls)
    try:
        # jsonargparse prints parts of its usage before it raises; ours is the only message.
        with contextlib.redirect_stderr(io.StringIO()):
            parsed = parser.parse_args(argv)
            values = parser.instantiate(parsed)
    except jsonargparse.ArgumentError as error:
        raise ConfigError(_explain(str(error), cls, prog)) from None
    fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(**fields)


def to_yaml(config: Any) -> str:
    """The resolved config as YAML, keys in the order of the fields."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def config_digest(config: Any) -> str:
    """SHA-256 (hex) of the resolved config."""
    return hashlib.sha256(to_yaml(config).encode()).hexdigest()


def keys_of(cls: type) -> list[str]:
    """Every dotted key of a config dataclass, nested ones in full."""
    hints = typing.get_type_hints(cls)
    keys: list[str] = []
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        keys.append(field.name)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            keys += [f"{field.name}.{key}" for key in keys_of(kind)]
    return keys


def _named_configs(argv: list[str], configs: Path | None, prefix: str) -> list[str]:
    """Resolve names given to --config; a file of that name goes first."""
    resolved: list[str] = []
    expects = False
    for word in argv:
        if expects:
            resolved.append(_find_config(word, configs, prefix))
        elif word.startswith("--config="):
            resolved.append("--config=" + _find_config(word[len("--config=") :], configs, prefix))
        else:
            resolved.append(word)
        expects = word == "--config"
    return resolved


def _find_config(name: str, configs: Path | None, prefix: str) -> str:
    if Path(name).is_file():
        return name
    shipped = sorted(configs.glob(f"{prefix}*.yaml")) if configs is not None else []
    names = {path.stem[len(prefix) :]: str(path) for path in shipped}
    if name in names:
        return names[name]
    if configs is None or "/" in name or name.endswith((".yaml", ".yml")):
        raise ConfigError(f"no config file {name}")
    raise ConfigError(f"no config {name!r}: neither a file nor one of {sorted(names)}")


def _explain(message: str, cls: type, prog: str) -> str:
    """jsonargparse's message with the nearest key, without its parser's inner words."""
    message = re.sub(r"\s+", " ", message).strip()
    keys = keys_of(cls)
    name = _unknown_key(message)
    if name and name not in keys:
        nearest = difflib.get_close_matches(name, keys, n=1, cutoff=0.5)
        if not nearest:  # the last part may be right and its group forgotten
            tail = name.rsplit(".", 1)[-1]
            nearest = [key for key in keys if key.rsplit(".", 1)[-1] == tail][:1]
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        return f"unknown key {name!r}{hint} (`{prog} --help` lists all keys)"
    return f"{message} (`{prog} --help` lists all keys)"


def _unknown_key(message: str) -> str:
    """The key that jsonargparse did not know, '' if the message is about something else."""
    if nested := re.search(r"Group '([\w.]+)' does not accept option '([\w.\-]+)'", message):
        return f"{nested[1]}.{nested[2]}"
    if plain := re.search(
        r"[Uu]nrecognized arguments: (?:--)?([\w.\-]+)|(?:Key|Option)s? '([\w.\-]+)'", message
    ):
        return plain[1] or plain[2]
    return ""


def _bare_lists(argv: list[str], cls: type) -> list[str]:
    """`--input a --input b` for a list[str] field means ["a", "b"]; a JSON list stays as it is."""
    hints = typing.get_type_hints(cls)
    lists = {f"--{name}" for name, kind in hints.items() if kind == list[str]}
    given: dict[str, list[str]] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in lists:
            rest.append(word)
            continue
        if not equals:
            value = next(words, "")
        if value.startswith("["):
            rest += [flag, value]
        else:
            given.setdefault(flag, []).append(value)
    for flag, values in given.items():
        rest += [flag, json.dumps(values)]
    return rest
