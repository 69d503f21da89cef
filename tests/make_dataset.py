"""Small real datasets for tests: packed, published and committed as the jobs do it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dist.commit import commit_dataset, publish_shard, publish_tokenizer
from dist.dataset import Dataset, open_dataset
from dist.manifest import Manifest, Shard
from dist.packing import Packer, num_targets
from dist.shard_file import PackedShardWriter
from dist.storage import Storage


def tokenizer_json(vocab_size: int = 300) -> bytes:
    """A byte-level tokenizer: 16 special tokens, 256 bytes, then merges of frequent pairs."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"]
    special += [f"<|reserved_{i}|>" for i in range(3, 16)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = ["def spark(jar):\n    return jar.store(spark) + 1\n"] * 3
    made.train_from_iterator(text, trainer)
    return made.to_str().encode()


def write_dataset(
    root: Path | str,
    *,
    seq_len: int = 16,
    vocab_size: int = 300,
    documents: int = 60,
    longest: int = 40,
    shortest: int = 1,
    num_train_shards: int = 3,
    rows_per_batch: int = 4,
    seed: int = 0,
    with_tokenizer: bool = True,
) -> Dataset:
    """Random documents of a learnable kind (each token follows the last by a fixed rule)."""
    storage = Storage(str(root))
    rng = np.random.default_rng(seed)
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    plan = [("train", k) for k in range(num_train_shards)] + [("validation", 0)]
    shards: list[Shard] = []
    totals: dict[str, dict[str, int]] = {}
    scratch = Path(storage.local_path("") or Path("/tmp"))
    scratch.mkdir(parents=True, exist_ok=True)
    for split, _ in plan:
        lengths = rng.integers(shortest, longest + 1, documents)
        first = rng.integers(16, vocab_size, documents)
        docs = [
            16 + (f + 7 * np.arange(k)) % (vocab_size - 16)
            for f, k in zip(first, lengths, strict=True)
        ]
        packer = Packer(seq_len, np.dtype(dtype))
        path = scratch / f".scratch-{rng.integers(1 << 60):x}"
        writer = PackedShardWriter(
            path,
            seq_len=seq_len,
            token_dtype=dtype,
            metadata={"kind": "packed_tokens"},
            rows_per_batch=rows_per_batch,
        )
        counts = totals.setdefault(
            split, dict.fromkeys(("rows", "documents", "tokens", "targets"), 0)
        )
        inputs = np.arange(documents) % 5
        for rows in (
            packer.add(np.concatenate(docs), lengths, inputs, inputs * 100),
            packer.flush(),
        ):
            if rows is not None:
                writer.write(rows)
                counts["targets"] += int(num_targets(rows.doc_lens, rows.row_splits).sum())
        made = writer.close()
        name = publish_shard(storage, path, made.xxh3_128, made.bytes)
        path.unlink()
        shards.append(
            Shard(
                name=Path(name).name,
                rows=made.rows,
                bytes=made.bytes,
                xxh3_128=made.xxh3_128,
                split=split,
            )
        )
        counts["rows"] += made.rows
        counts["documents"] += documents
        counts["tokens"] += int(lengths.sum())
    digest = publish_tokenizer(storage, tokenizer_json(vocab_size)) if with_tokenizer else None
    manifest = Manifest(
        kind="packed_tokens",
        schema={
            "seq_len": seq_len,
            "token_dtype": dtype,
            "vocab_size": vocab_size,
            "bos_id": None,
            "eos_id": 1,
            "rows_per_batch": rows_per_batch,
        },
        tokenizer_digest=digest,
        shards=tuple(shards),
        totals=totals,
    )
    commit_dataset(storage, manifest, {"inputs": [f"input-{i}" for i in range(5)]}, f"{seed:064x}")
    return open_dataset(str(root))


def flip_byte(path: Path, offset: int) -> None:
    """Damage one byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.write_bytes(bytes(data))


def edit_manifest(dataset: Dataset, **changes: object) -> None:
    """Rewrite the manifest file in place with changed keys, as a careless editor would."""
    path = dataset.storage.local_path(f"manifests/{dataset.data_digest}.json")
    assert path is not None
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
