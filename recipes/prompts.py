"""Prompts from files, and texts on terminals; used by recipes.generate, no recipe itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist.errors import ConfigError


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file, .jsonl or a line each; ConfigError names the line that has none."""
    prompts = []
    # Not splitlines(): it would cut at U+2028 and others, which JSON strings may hold.
    for number, line in enumerate(path.read_text().removesuffix("\n").split("\n"), 1):
        prompt: Any = line
        if path.suffix == ".jsonl":
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}:{number} is not JSON: {error}") from None
            prompt = record.get("prompt") if isinstance(record, dict) else record
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(f'{path}:{number} has no prompt: {{"prompt": "..."}}, or a text line')
        prompts.append(prompt)
    return prompts


def prompts_of(source: str, output: str) -> list[str]:
    """read_prompts, where `output` is still free: both are said before a model is loaded."""
    if output and Path(output).exists():
        raise ConfigError(f"{output} exists; give another --output")
    return read_prompts(Path(source))


def parse_memory(text: str) -> dict[int | str, str] | None:
    """`0=20GiB,cpu=60GiB` as accelerate takes it; None for an empty text."""
    limits: dict[int | str, str] = {}
    for one in filter(None, text.split(",")):
        name, equals, size = one.strip().partition("=")
        if not equals or not (name.isdigit() or name in ("cpu", "disk")) or not size:
            raise ConfigError(f"max_memory {one.strip()!r} is not as 0=20GiB or cpu=60GiB")
        limits[int(name) if name.isdigit() else name] = size
    return limits or None


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters are written out."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


class Shown:
    """transformers' streamer: prints a text as it comes, whole characters only, without `eos`."""

    def __init__(self, decode: Callable[[list[int]], str], eos: int | None) -> None:
        self._decode, self._eos, self._shown = decode, eos, 0
        self._ids: list[int] | None = None

    def put(self, value: torch.Tensor) -> None:
        if self._ids is None:  # the prompt comes first
            self._ids = []
            return
        self._ids += [number for number in value.flatten().tolist() if number != self._eos]
        text = self._decode(self._ids)
        if not text.endswith("\ufffd"):  # else a character is still incomplete
            self._print(text)

    def end(self) -> None:
        self._print(self._decode(self._ids or []))
        print()

    def _print(self, text: str) -> None:
        print(printable(text[self._shown :]), end="", flush=True)
        self._shown = len(text)
