"""Small real datasets of examples for tests: written, published and committed as the job does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from dist.commit import commit_dataset, publish_lengths, publish_shard, publish_tokenizer
from dist.dataset import Dataset, open_dataset
from dist.example_file import Example, ExampleShardWriter
from dist.example_lengths import lengths_file
from dist.manifest import TOTALS, Manifest, Shard
from dist.storage import Storage
from tests.make_dataset import tokenizer_json

MAX_LENGTH = 24


def random_example(
    rng: np.random.Generator, vocab_size: int, number: int, longest: int = MAX_LENGTH
) -> Example:
    """Some tokens of a learnable kind, of which some turns are trained; each turn by a rule."""
    length = int(rng.integers(2, longest + 1))
    tokens = 16 + (rng.integers(vocab_size) + 7 * np.arange(length)) % (vocab_size - 16)
    cuts = np.unique(rng.integers(1, length, int(rng.integers(1, 4))))
    edges = [0, *cuts.tolist(), length]
    turns = list(zip(edges[1:-1], edges[2:], strict=True))[::2]  # the replies: every second one
    return Example(
        tokens=tokens.astype(np.uint32), spans=np.array(turns, np.int32).reshape(-1, 2),
        segments=np.diff(edges).astype(np.int32), input=number % 3, offset=100 * number,
    )  # fmt: skip


def write_examples(
    root: Path | str, *, vocab_size: int = 300, num_examples: int = 40, num_train_shards: int = 2,
    seed: int = 0, longest: int = MAX_LENGTH, with_lengths: bool = True,
) -> Dataset:  # fmt: skip
    """A dataset with its tokenizer; num_examples a shard. Without lengths, as it was once."""
    storage, rng = Storage(str(root)), np.random.default_rng(seed)
    shards: list[Shard] = []
    totals: dict[str, dict[str, int]] = {}
    scratch = Path(storage.local_path("") or "")
    scratch.mkdir(parents=True, exist_ok=True)
    number, lengths = 0, []
    for split in [*["train"] * num_train_shards, "validation"]:
        path = scratch / ".scratch"
        writer = ExampleShardWriter(path, metadata={}, rows_per_batch=8)
        sums = totals.setdefault(split, dict.fromkeys(TOTALS, 0))
        for _ in range(num_examples):
            example = random_example(rng, vocab_size, number, longest)
            writer.write(example)
            lengths.append(len(example.tokens))
            counts = (1, 1, len(example.tokens), example.num_targets)
            for name, count in zip(TOTALS, counts, strict=True):
                sums[name] += count
            number += 1
        made = writer.close()
        name = publish_shard(storage, path, made.xxh3_128, made.bytes)
        path.unlink()
        facts = {"rows": made.rows, "bytes": made.bytes, "xxh3_128": made.xxh3_128}
        shards.append(Shard(name=Path(name).name, split=split, **facts))
    manifest = Manifest(
        kind="examples",
        schema={
            "max_length": longest, "template_digest": None, "token_dtype": "uint32",
            "vocab_size": vocab_size, "bos_id": None, "eos_id": 1, "rows_per_batch": 8,
        },
        tokenizer_digest=publish_tokenizer(storage, tokenizer_json(vocab_size)),
        shards=tuple(shards),
        totals=totals,
    )  # fmt: skip
    if with_lengths:
        table = lengths_file([np.array(lengths)], longest)
        manifest = replace(manifest, lengths_digest=publish_lengths(storage, table))
    inputs = [{"path": f"input-{i}", "url": f"/x/input-{i}"} for i in range(3)]
    commit_dataset(storage, manifest, {"inputs": inputs}, f"{seed:064x}")
    return open_dataset(str(root))
