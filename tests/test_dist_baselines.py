"""Baselines: what they say must be what a plain count over the documents says."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np

from dist.baselines import BIGRAM_PSEUDO_COUNT, unigram_bigram
from dist.dataset import Dataset
from dist.shard_file import PackedShard
from tests.make_dataset import write_dataset


def pairs(dataset: Dataset, split: str) -> list[tuple[int, int]]:
    """(input, target) pairs inside each piece, by the simplest loop."""
    found = []
    for entry in dataset.split(split).shards:
        shard = PackedShard(dataset.shard_path(entry))
        for row in range(shard.num_rows):
            tokens, start = shard.tokens(row, row + 1)[0].tolist(), 0
            for _, _, length in shard.lineage(row):
                piece = tokens[start : start + length]
                found += list(zip(piece[:-1], piece[1:], strict=True))
                start += length
    return found


def test_losses_equal_a_plain_count(tmp_path: Path) -> None:
    """Padding or targets across documents in the counts would make the gate easier to pass."""
    dataset = write_dataset(tmp_path, seq_len=8, documents=30, longest=20)
    vocab = dataset.manifest.schema["vocab_size"]
    train, validation = pairs(dataset, "train"), pairs(dataset, "validation")
    ones, twos = Counter(b for _, b in train), Counter(train)
    lefts = Counter(a for a, _ in train)
    p = {b: (ones[b] + 1) / (len(train) + vocab) for b in range(vocab)}
    unigram = -np.mean([math.log(p[b]) for _, b in validation])
    k = BIGRAM_PSEUDO_COUNT
    bigram = -np.mean([math.log((twos[a, b] + k * p[b]) / (lefts[a] + k)) for a, b in validation])
    found = unigram_bigram(dataset)
    assert found["targets"] == len(validation) == dataset.manifest.totals["validation"]["targets"]
    assert math.isclose(found["unigram"], unigram, rel_tol=1e-12)
    assert math.isclose(found["bigram"], bigram, rel_tol=1e-12)
    assert found["bigram"] < found["unigram"]
