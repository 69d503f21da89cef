"""Text to token ids: kitoken for speed, Hugging Face `tokenizers` as the reference.

Special-token text that stands in raw data is data, not control: both engines encode it as plain
text, and a text that holds it always goes to the reference (that is where the two differed).
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist.errors import ConfigError, DataRefused

ENGINES = ("auto", "kitoken", "hf")


class TextTokenizer:
    """A tokenizer.json with one of two engines; equal ids are checked by choose_engine."""

    def __init__(self, tokenizer_json: bytes, engine: str = "hf") -> None:
        import tokenizers

        if engine not in ("kitoken", "hf"):
            raise ConfigError(f"tokenizer engine {engine!r} is not kitoken or hf")
        try:
            self._reference = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the Rust side raises bare Exception
            raise DataRefused(
                f"not a Hugging Face tokenizer.json ({error}); pass the file that "
                "`leyden prep train-tokenizer` or `save_pretrained` wrote"
            ) from None
        # Truncation and padding are a model's business; here they would lose data.
        self._reference.no_truncation()
        self._reference.no_padding()
        self._reference.encode_special_tokens = True
        self.engine = engine
        self.digest = tokenizer_digest(tokenizer_json)
        self.vocab_size = self._reference.get_vocab_size(with_added_tokens=True)
        self._special = _special_pattern(tokenizer_json)
        self._kitoken: Any = None
        if engine == "kitoken":
            import kitoken

            plain = {**json.loads(tokenizer_json), "truncation": None, "padding": None}
            self._kitoken = kitoken.Kitoken.from_tokenizers(json.dumps(plain).encode())

    def token_id(self, token: str) -> int:
        """Id of a token by its text; ConfigError if the vocabulary lacks it."""
        number = self._reference.token_to_id(token)
        if number is None:
            raise ConfigError(f"the tokenizer has no token {token!r}")
        return int(number)

    def encode_batch(self, texts: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Ids of all texts one after the other (tokens,) and tokens of each text (texts,)."""
        if self._kitoken is None:
            ids = self._encode_reference(texts)
        else:
            ids = self._encode_fast(texts)
        lengths = np.fromiter((len(one) for one in ids), np.int64, len(ids))
        flat = np.concatenate(ids) if ids else np.empty(0, np.uint32)
        return flat, lengths

    def decode(self, ids: NDArray[np.integer] | list[int]) -> str:
        """Text of ids, special tokens written out."""
        return str(self._reference.decode([int(i) for i in ids], skip_special_tokens=False))

    def _encode_reference(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        encoded = self._reference.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, np.uint32) for one in encoded]

    def _encode_fast(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        encode, special = self._kitoken.encode, self._special
        ids: list[Any] = []
        odd: list[int] = []
        for number, text in enumerate(texts):
            if special is not None and special.search(text):
                odd.append(number)
                ids.append(None)
            else:
                ids.append(np.array(encode(text, False), np.uint32))
        if odd:
            exact = self._encode_reference([texts[i] for i in odd])
            for number, one in zip(odd, exact, strict=True):
                ids[number] = one
        return ids


class RenderedTokenizer:
    """Tokens of text that a chat template made: special tokens in it are tokens, and each token
    knows its characters. The reference engine alone does that."""

    def __init__(self, tokenizer_json: bytes) -> None:
        self._plain = TextTokenizer(tokenizer_json, "hf")
        self._tokenizer = self._plain._reference
        self._tokenizer.encode_special_tokens = False
        self.vocab_size = self._plain.vocab_size
        added = json.loads(tokenizer_json).get("added_tokens") or []
        self.special = {one["content"]: int(one["id"]) for one in added if one.get("special")}
        """Text -> id of the special tokens."""

    def token_id(self, token: str) -> int:
        """Id of a token by its text; ConfigError if the vocabulary lacks it."""
        return self._plain.token_id(token)

    def encode(self, texts: list[str]) -> list[Any]:
        """One tokenizers.Encoding a text: ids, and characters of each token."""
        return list(self._tokenizer.encode_batch(texts, add_special_tokens=False))

    def decode(self, ids: NDArray[np.integer] | list[int]) -> str:
        """Text of ids, special tokens written out."""
        return self._plain.decode(ids)


def tokenizer_digest(tokenizer_json: bytes) -> str:
    """SHA-256 (hex) of a tokenizer.json: the tokenizer's identity in manifests."""
    return hashlib.sha256(tokenizer_json).hexdigest()


def choose_engine(tokenizer_json: bytes, sample: list[str]) -> tuple[str, str]:
    """The engine for a job and the reason: kitoken only if its ids equal the reference's."""
    reference = TextTokenizer(tokenizer_json, "hf")
    try:
        fast = TextTokenizer(tokenizer_json, "kitoken")
        for number, text in enumerate(sample):
            ours, _ = fast.encode_batch([text])
            theirs, _ = reference.encode_batch([text])
            if not np.array_equal(ours, theirs):
                return "hf", f"kitoken differs from tokenizers on sampled document {number}"
    except ImportError as error:
        return "hf", f"kitoken is not installed ({error})"
    except Exception as error:  # kitoken raises its own types for tokenizers that it cannot read
        return "hf", f"kitoken cannot run this tokenizer ({type(error).__name__}: {error})"
    return "kitoken", f"equal to tokenizers on {len(sample)} sampled documents"


def token_dtype(vocab_size: int) -> str:
    """The narrowest of uint16 and uint32 that holds every id."""
    if vocab_size > 1 << 32:
        raise ConfigError(f"a vocabulary of {vocab_size} does not fit 32 bits")
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _special_pattern(tokenizer_json: bytes) -> re.Pattern[str] | None:
    added = json.loads(tokenizer_json).get("added_tokens") or []
    texts = [token["content"] for token in added if token.get("content")]
    return re.compile("|".join(map(re.escape, texts))) if texts else None
