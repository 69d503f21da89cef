"""The tokenizer job: a sample by hash, special tokens first, equal bytes everywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dist.errors import ConfigError
from dist.tokenizer import TextTokenizer, choose_engine
from spark_jobs.sources import key_hashes, record_keys
from spark_jobs.train_tokenizer import Config, special_tokens, train_bpe

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [
    f"def function_{i}(x): return 'some' + text + {i * 7919}\n" * (i % 5 + 1) for i in range(400)
]


def test_special_tokens_come_first() -> None:
    """Ids that move with the vocabulary would break every config that names them."""
    data = train_bpe(TEXTS, 400, special_tokens(16))
    tokenizer = TextTokenizer(data)
    assert tokenizer.vocab_size == 400
    assert [tokenizer.token_id(text) for text in special_tokens(16)] == list(range(16))
    assert special_tokens(5)[2:] == ["<|pad|>", "<|reserved_3|>", "<|reserved_4|>"]
    flat, _ = tokenizer.encode_batch(["naïve <|pad|>\n  '中文' 🙂"])
    assert tokenizer.decode(flat) == "naïve <|pad|>\n  '中文' 🙂" and flat.min() >= 16


def test_kitoken_agrees_with_it() -> None:
    """With GPT-2's splitting kitoken read "\\n'terminator'" otherwise: every job fell back."""
    data = train_bpe(TEXTS, 400, special_tokens(16))
    odd = ["the current\n'terminator' (us", "called\n'doctest_foo' it's", "\t\t'stdout' :", "I'LL"]
    assert choose_engine(data, odd)[0] == "kitoken"


@pytest.mark.spark
def test_the_job_trains_on_the_smallest_hashes(tmp_path: Path) -> None:
    """A sample in the order of Spark's partitions would give another tokenizer every time."""
    corpus = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text, "other": "o" * 300}).encode() + b"\n" for text in TEXTS]
    corpus.write_bytes(b"".join(lines))
    command = [sys.executable, "-m", "spark_jobs.train_tokenizer", "--input", str(corpus)]
    command += ["--output", str(tmp_path / "out"), "--vocab_size", "300", "--num_tasks", "5"]
    command += ["--sample_mib", "0.02", "--seed", "3", "--master", "local[2]"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    offsets = np.cumsum([0, *map(len, lines)])[:-1].tolist()
    h = key_hashes(record_keys("a.jsonl", offsets), 3)
    chosen: list[str] = []
    for i in np.argsort(h):
        chosen.append(TEXTS[i])
        if sum(map(len, chosen)) >= 0.02 * 2**20:
            break
    assert 10 < len(chosen) < len(TEXTS)
    made = (tmp_path / "out/tokenizer.json").read_bytes()
    assert made == train_bpe(chosen, 300, special_tokens(16))
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.stdout.startswith("already done") and not again.stderr


def test_bad_settings_are_named() -> None:
    """A vocabulary without room for all bytes fails deep in the trainer otherwise."""
    with pytest.raises(ConfigError, match="need 272"):
        Config(output="x", vocab_size=271)
    with pytest.raises(ConfigError, match="begin, end and pad"):
        Config(output="x", num_special_tokens=2)
    with pytest.raises(ConfigError, match="output"):
        Config()
