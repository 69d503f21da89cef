"""Tokenizers: two engines, one result, and special-token text in data is data."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist.errors import ConfigError, DataRefused
from dist.tokenizer import TextTokenizer, choose_engine, token_dtype, tokenizer_digest
from tests.make_dataset import tokenizer_json

JSON = tokenizer_json()
REFERENCE, FAST = TextTokenizer(JSON, "hf"), TextTokenizer(JSON, "kitoken")
SPECIAL = "x = '<|end_of_text|>' # <|reserved_7|>"


def encode(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer.encode_batch([text])[0].tolist()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80) | st.text(alphabet="def spark(jar):\n <|>_", max_size=80))
def test_engines_agree_and_nothing_is_lost(text: str) -> None:
    """An engine that normalises, or splits otherwise, would give other data on other machines."""
    ids = encode(REFERENCE, text)
    assert encode(FAST, text) == ids
    assert REFERENCE.decode(ids) == text


def test_special_text_in_data_is_plain_text() -> None:
    """A document that could end itself (or start a chat turn) is an injection."""
    for tokenizer in (REFERENCE, FAST):
        ids = encode(tokenizer, SPECIAL)
        assert not set(ids) & set(range(16))
        assert tokenizer.decode(ids) == SPECIAL
    assert encode(FAST, SPECIAL) == encode(REFERENCE, SPECIAL)


def test_batches_keep_their_texts_apart() -> None:
    """Lengths out of step with ids would move document borders."""
    texts = ["def", "", SPECIAL, "return jar"]
    flat, lengths = FAST.encode_batch(texts)
    ends = np.cumsum(lengths)
    parts = [flat[e - n : e].tolist() for e, n in zip(ends, lengths, strict=True)]
    assert parts == [encode(REFERENCE, text) for text in texts]
    assert flat.dtype == np.uint32 and FAST.encode_batch([])[0].size == 0


def test_the_engine_is_chosen_by_the_jobs_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast engine that differs on this data must not be used, and the reason must be said."""
    assert choose_engine(JSON, ["def spark", SPECIAL])[0] == "kitoken"
    real = TextTokenizer._encode_fast

    def wrong(self: TextTokenizer, texts: list[str]) -> list[np.ndarray]:
        return [
            ids[::-1] if "odd" in text else ids
            for ids, text in zip(real(self, texts), texts, strict=True)
        ]

    monkeypatch.setattr(TextTokenizer, "_encode_fast", wrong)
    engine, reason = choose_engine(JSON, ["def", "an odd one"])
    assert engine == "hf" and "sampled document 1" in reason


def test_truncation_in_the_file_does_not_cut_data() -> None:
    """tokenizer.json of many models truncates to 512 tokens; here that would lose text."""
    record = json.loads(JSON)
    record["truncation"] = {
        "max_length": 2,
        "stride": 0,
        "strategy": "LongestFirst",
        "direction": "Right",
    }
    short = json.dumps(record).encode()
    for engine in ("hf", "kitoken"):
        assert encode(TextTokenizer(short, engine), "def spark(jar)") == encode(
            REFERENCE, "def spark(jar)"
        )


def test_wrong_files_and_names_are_said() -> None:
    """A config.json in the tokenizer's place must be named as such."""
    with pytest.raises(DataRefused, match=r"not a Hugging Face tokenizer\.json"):
        TextTokenizer(b"{}")
    with pytest.raises(ConfigError, match="no token '<eos>'"):
        REFERENCE.token_id("<eos>")
    with pytest.raises(ConfigError, match="engine 'rust'"):
        TextTokenizer(JSON, "rust")
    assert REFERENCE.token_id("<|end_of_text|>") == 1
    assert REFERENCE.digest == tokenizer_digest(JSON) and len(REFERENCE.digest) == 64


def test_ids_fit_their_type() -> None:
    """Ids of a 128k vocabulary in 16 bits wrap without a sound."""
    assert token_dtype(1 << 16) == "uint16" and token_dtype((1 << 16) + 1) == "uint32"
