"""First weights from a local Hugging Face folder: each rank reads its slices and no more.

A folder holds `model.safetensors`, or parts and `model.safetensors.index.json` that says which
tensor lies in which. Files are mapped, so a slice costs its own bytes; no rank ever holds a whole
tensor of which it needs a part.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist.errors import ConfigError
from dist.initialise import local_span

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Constants that older files hold and that every model computes for itself.
_COMPUTED = ("rotary_emb.inv_freq",)


class HfWeights:
    """The tensors of a folder by name. Raises ConfigError where a part is missing or unreadable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        """Bytes of tensors that were read so far."""
        self._files: dict[str, Any] = {}

    @cached_property
    def _part_of(self) -> dict[str, str]:
        """File of each tensor; read when first asked for, so that a plan needs no weights."""
        return _parts(self.folder)

    @property
    def files(self) -> list[Path]:
        """Its safetensors files, sorted."""
        return [self.folder / name for name in sorted({*self._part_of.values()})]

    def check(self, module: nn.Module) -> None:
        """Compare names and shapes with a module's parameters, by the files' headers alone."""
        names = {name: parameter for name, parameter in module.named_parameters()}
        aliases = {name for name, _ in module.named_parameters(remove_duplicate=False)} - {*names}
        missing = sorted({*names} - {*self._part_of})
        extra = sorted(
            name for name in {*self._part_of} - {*names} - aliases if not name.endswith(_COMPUTED)
        )
        if missing or extra:
            said = [f"it lacks {_some(missing)}"] if missing else []
            said += [f"it has {_some(extra)}, which the model has not"] if extra else []
            hint = "the model's shape must be that of the folder's config.json"
            if missing == ["lm_head.weight"]:
                hint = "its output matrix is the embedding: set model.tie_embeddings to true"
            raise ConfigError(f"{self.folder} holds another model: {'; '.join(said)} ({hint})")
        wrong = []
        for name, parameter in names.items():
            shape = tuple(self._slice_of(name).get_shape())
            if shape != tuple(parameter.shape):
                wrong.append(f"{name} is {shape} there and {tuple(parameter.shape)} in the model")
        if wrong:
            raise ConfigError(
                f"{self.folder} holds tensors of other shapes: {_some(wrong)} (vocabulary and "
                "model.* must be the folder's)"
            )

    @torch.no_grad()
    def fill(self, name: str, parameter: Tensor) -> None:
        """Read this rank's part of one tensor into a parameter, in the parameter's dtype."""
        found = self._slice_of(name)
        spans = local_span(parameter) if isinstance(parameter, DTensor) else []
        here = [slice(None)] * len(parameter.shape)
        for dim, start, length in spans:
            here[dim] = slice(start, start + length)
        target = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if target.numel() == 0:
            return
        piece = found[tuple(here)]
        self.bytes_read += piece.numel() * piece.element_size()
        self._check_finite(name, piece)
        target.copy_(piece)

    def check_values(self) -> None:
        """Read every tensor; ConfigError for one that `fill` would refuse."""
        for name in sorted(self._part_of):
            self._check_finite(name, self._slice_of(name)[:])

    def _check_finite(self, name: str, piece: Tensor) -> None:
        if not bool(piece.isfinite().all()):
            what = "NaN" if bool(piece.isnan().any()) else "infinite values"
            raise ConfigError(f"{self.folder}: {name} holds {what}; the file is damaged")

    def _slice_of(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        part = self._part_of[name]
        try:
            if part not in self._files:
                self._files[part] = safe_open(self.folder / part, framework="pt", device="cpu")
            return self._files[part].get_slice(name)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{self.folder / part}: {name} cannot be read: {error}") from error


def _parts(folder: Path) -> dict[str, str]:
    """File of each tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        if (folder / INDEX).exists():
            parts = dict(json.loads((folder / INDEX).read_bytes())["weight_map"])
        elif (folder / SINGLE).exists():
            with safe_open(folder / SINGLE, framework="pt", device="cpu") as file:
                parts = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise ConfigError(
                f"{folder} has neither {INDEX} nor {SINGLE}; give a local folder as "
                "save_pretrained or `leyden export` writes it"
            )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: its list of tensors cannot be read: {error}") from error
    gone = sorted({part for part in parts.values() if not (folder / part).is_file()})
    if gone:
        raise ConfigError(f"{folder} is incomplete: {_some(gone)} is named in {INDEX} but missing")
    return parts


def check_config(folder: Path, theirs: Any, ours: Any, keys: tuple[str, ...]) -> None:
    """ConfigError naming settings that change what a model computes but no tensor's shape."""
    differ = [
        f"{key} is {getattr(theirs, key, None)!r} there and {getattr(ours, key, None)!r} here"
        for key in keys
        if getattr(theirs, key, None) != getattr(ours, key, None)
    ]
    if differ:
        raise ConfigError(f"{folder / 'config.json'} describes another model: {_some(differ)}")


def _some(items: list[str], most: int = 4) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
