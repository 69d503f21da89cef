"""Shards of random bytes in a folder, for tests of the cache: it never looks into a shard."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dist.manifest import Shard
from tests.run_ranks import _PRELOAD


def make_shards(folder: Path, count: int, size: int, seed: int = 0) -> list[Shard]:
    """Files under folder/shards named by their digests, sizes a few bytes apart."""
    rng = np.random.default_rng(seed)
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    shards = []
    for number in range(count):
        data = rng.bytes(size + number)
        digest = xxhash.xxh3_128_hexdigest(data)
        (folder / "shards" / f"{digest}.arrow").write_bytes(data)
        shards.append(
            Shard(name=f"{digest}.arrow", rows=1, bytes=len(data), xxh3_128=digest, split="train")
        )
    return shards


def process(target: Callable[..., Any], *args: Any) -> Any:
    """A process that runs `target` (of a module), started quickly."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    made = context.Process(target=target, args=args, daemon=True)
    made.start()
    return made
