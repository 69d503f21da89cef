"""What a model must beat: unigram and bigram losses, counted from the same shards.

Both are trained on one split and scored on the valid targets of another, in nats a token. The
unigram has add-one smoothing; the bigram backs off to it by Dirichlet smoothing with a
pseudo-count of 200 (MacKay and Peto, "A hierarchical Dirichlet language model", 1995).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dist.checked_shards import checked_path
from dist.dataset import Dataset
from dist.shard_file import PackedShard

ROWS_AT_ONCE = 1024
MAX_BIGRAM_VOCAB = 1 << 13
BIGRAM_PSEUDO_COUNT = 200.0


def unigram_bigram(
    dataset: Dataset, train: str = "train", validation: str = "validation"
) -> dict[str, float]:
    """Losses by name; `bigram` only up to a vocabulary of 8,192 (its table is vocabulary^2)."""
    vocab = int(dataset.manifest.schema["vocab_size"])
    with_bigram = vocab <= MAX_BIGRAM_VOCAB
    ones = np.zeros(vocab, np.int64)
    pairs = np.zeros(vocab * vocab if with_bigram else 0, np.int64)
    for left, right in _valid_pairs(dataset, train):
        ones += np.bincount(right, minlength=vocab)
        if with_bigram:
            pairs += np.bincount(left * vocab + right, minlength=vocab * vocab)
    unigram = (ones + 1.0) / (ones.sum() + vocab)
    table = pairs.reshape(vocab, vocab) if with_bigram else None
    row_sums = table.sum(axis=1) if table is not None else None
    sums, count = {"unigram": 0.0, "bigram": 0.0}, 0
    for left, right in _valid_pairs(dataset, validation):
        count += len(right)
        sums["unigram"] -= float(np.log(unigram[right]).sum())
        if table is not None and row_sums is not None:
            mass = table[left, right] + BIGRAM_PSEUDO_COUNT * unigram[right]
            sums["bigram"] -= float(np.log(mass / (row_sums[left] + BIGRAM_PSEUDO_COUNT)).sum())
    losses = {"unigram": sums["unigram"] / max(count, 1), "targets": float(count)}
    if with_bigram:
        losses["bigram"] = sums["bigram"] / max(count, 1)
    return losses


def _valid_pairs(
    dataset: Dataset, split: str
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(input token, target token) of valid targets, two (k,) arrays at a time."""
    for entry in dataset.split(split).shards:
        shard = PackedShard(checked_path(dataset, entry))
        for start in range(0, shard.num_rows, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, shard.num_rows)
            tokens = shard.tokens(start, stop).astype(np.int64)
            lens, splits = shard.doc_lens(np.arange(start, stop))
            valid = valid_targets(lens, splits, shard.seq_len)
            yield tokens[:, :-1][valid], tokens[:, 1:][valid]
        shard.close()


def valid_targets(
    doc_lens: NDArray[np.int32], row_splits: NDArray[np.int64], seq_len: int
) -> NDArray[np.bool_]:
    """Which of (rows, seq_len) targets continue their input's document."""
    rows = len(row_splits) - 1
    valid = np.zeros((rows, seq_len + 1), bool)
    row = np.repeat(np.arange(rows), np.diff(row_splits))
    ends = np.cumsum(doc_lens, dtype=np.int64)
    before = np.concatenate(([0], ends))[row_splits[:-1]]
    end = ends - before[row]
    # Position p is a valid target's input unless it is the last of its piece or padding.
    used = np.zeros(rows, np.int64)
    np.maximum.at(used, row, end)
    valid[np.arange(seq_len + 1) < used[:, None]] = True
    valid[row, end - 1] = False
    return valid[:, :-1]
