"""A conversation to an example: its tokens, which of them are trained, and why it was left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dist.errors import ConfigError
from dist.example_file import Example
from dist.tokenizer import RenderedTokenizer
from spark_jobs.chat_records import Conversation, Unrecognised, recognise
from spark_jobs.chat_template import ChatTemplate, TemplateError, TemplateText, Turn

ROLES = ("assistant", "user", "system", "tool")
# What a row may be left out for; beside it, refused rows go to the quarantine.
FILTERED = ("over_length", "nothing_trained")
_POLICY = re.compile(r"all|last|none|min_length:\s*(?P<tokens>\d+)")


@dataclass(frozen=True, kw_only=True)
class TrainedTurns:
    """Which turns of a role are trained: all, last, none, or min_length:N (of N tokens or more)."""

    assistant: str = "all"
    """Replies, with the token that ends them."""
    user: str = "none"
    """What people ask. Needs a template that only ever appends; so do the two below."""
    system: str = "none"
    """System prompts."""
    tool: str = "none"
    """What tools answer."""

    def __post_init__(self) -> None:
        for role in ROLES:
            policy = getattr(self, role)
            if not _POLICY.fullmatch(policy):
                raise ConfigError(
                    f"train.{role} is {policy!r}; choose all, last, none or min_length:N"
                )
        if not self.roles:
            raise ConfigError("train: every role is none; nothing would be trained")

    @property
    def roles(self) -> frozenset[str]:
        """Roles of which something is trained."""
        return frozenset(role for role in ROLES if getattr(self, role) != "none")

    @property
    def is_everything(self) -> bool:
        """Whether a mask of all ones is what was asked for."""
        return all(getattr(self, role) == "all" for role in ROLES)

    def chooses(self, turn: Turn, is_last: bool, num_tokens: int) -> bool:
        """Whether a turn is trained; is_last: of its role."""
        policy = str(getattr(self, turn.role, "none"))
        if match := re.fullmatch(r"min_length:\s*(\d+)", policy):
            return num_tokens >= int(match[1])
        return policy == "all" or (policy == "last" and is_last)


@dataclass(frozen=True, kw_only=True)
class ChatRules:
    """What every task needs to turn rows into examples; small, and the same for all."""

    template: TemplateText
    train: TrainedTurns
    max_length: int
    """Tokens of an example at most."""
    truncation: Literal["drop", "left", "right"]
    special_text: Literal["refuse", "control"]
    stop: str
    """Text of the token that ends a turn; '' for any special token."""


@dataclass(frozen=True)
class Left:
    """A row that makes no example, and why."""

    reason: str
    said: str = ""


class ChatTokens:
    """Turns rows into examples; one a process."""

    def __init__(self, rules: ChatRules, tokenizer_json: bytes) -> None:
        self.rules = rules
        self.tokenizer = RenderedTokenizer(tokenizer_json)
        self.template = ChatTemplate(rules.template)
        self.counters: Counter[str] = Counter()
        special = self.tokenizer.special
        if rules.stop:
            special = {rules.stop: self.tokenizer.token_id(rules.stop)}
        self._stops = np.array(sorted(special.values()), np.int64)
        self._special_text = _any_of(self.tokenizer.special)
        self._after_stop = re.compile(rf"(?P<stop>{_any_of(special).pattern})\s*\Z")

    def examples(self, texts: list[str]) -> list[Example | Left]:
        """One example or reason a row; a row is the text of a JSON object."""
        rendered = [self._render(text) for text in texts]
        texts = [one[0] for one in rendered if not isinstance(one, Left)]
        encoded = iter(self.tokenizer.encode(texts))
        made: list[Example | Left] = []
        for one in rendered:
            example = one if isinstance(one, Left) else self._example(next(encoded), one[1])
            if isinstance(example, Left):
                self.counters[f"left.{example.reason}"] += 1
            made.append(example)
        return made

    def _render(self, text: str) -> tuple[str, list[Turn]] | Left:
        try:
            conversation = recognise(text)
        except Unrecognised as error:
            return Left("unrecognised", str(error))
        if self.rules.special_text == "refuse" and (found := self._special_in(conversation)):
            return Left("special_text", f"it holds the text of the special token {found}")
        try:
            return self.template.turns(
                conversation.messages, conversation.tools, self.rules.train.roles, self._after_stop
            )
        except TemplateError as error:
            return Left(error.reason, str(error))

    def _special_in(self, conversation: Conversation) -> str:
        for text in _texts_in([conversation.messages, conversation.tools]):
            if match := self._special_text.search(text):
                return match[0]
        return ""

    def _example(self, encoding: Any, turns: list[Turn]) -> Example | Left:
        """turns: in order, with characters of the encoded text."""
        tokens = np.array(encoding.ids, np.uint32)
        if not len(tokens):
            return Left("nothing_trained", "it has no token")
        ranges = [token_range(encoding, turn.start, turn.stop) for turn in turns]
        # The last of a role by its number.
        last = {turn.role: number for number, turn in enumerate(turns)}
        chosen = [
            here
            for number, (turn, here) in enumerate(zip(turns, ranges, strict=True))
            if self.rules.train.chooses(turn, last[turn.role] == number, here[1] - here[0])
        ]
        spans = joined([here for here in chosen if here[1] > max(here[0], 1)])
        if not len(spans):
            return Left("nothing_trained", "none of its turns is one that is trained")
        example = Example(
            tokens=tokens, spans=spans, segments=segments_of(ranges, len(tokens)), input=0, offset=0
        )
        if len(tokens) > self.rules.max_length:
            if self.rules.truncation == "drop":
                return Left("over_length", f"it has {len(tokens)} tokens")
            example = truncated(example, self.rules.max_length, self.rules.truncation)
            if not len(example.spans):
                return Left("truncated_away", f"it has {len(tokens)} tokens")
            self.counters["truncated"] += 1
        ends = [example.tokens[stop - 1] for stop in example.spans[:, 1]]
        self.counters["trained_turns"] += len(ends)
        self.counters["trained_stops"] += int(np.isin(ends, self._stops).sum())
        self.counters["targets"] += example.num_targets
        return example


def _texts_in(value: Any) -> Iterator[str]:
    """All texts of a value as JSON has them, at any depth: arguments of calls, and keys, too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        for one in inside:
            yield from _texts_in(one)


def _any_of(texts: dict[str, int]) -> re.Pattern[str]:
    longest_first = sorted((text for text in texts if text), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def token_range(encoding: Any, start: int, stop: int) -> tuple[int, int]:
    """Tokens [first, last) that hold characters [start, stop) of an encoding; empty if none does.

    Unlike transformers' assistant masks a character that no token covers (a trimmed space) does
    not end the mask, and all tokens of a last character of several tokens are in.
    """
    while start < stop and encoding.char_to_token(start) is None:
        start += 1
    while start < stop and encoding.char_to_token(stop - 1) is None:
        stop -= 1
    if start >= stop:
        return 0, 0
    first, last = encoding.char_to_token(start), encoding.char_to_token(stop - 1)
    while last + 1 < len(encoding) and encoding.token_to_chars(last + 1) is not None:
        begin, end = encoding.token_to_chars(last + 1)
        if not begin <= stop - 1 < end:
            break
        last += 1
    return first, last + 1


def joined(ranges: list[tuple[int, int]]) -> NDArray[np.int32]:
    """(spans, 2) of ascending ranges: those that touch made one, and token 0 left out."""
    spans: list[list[int]] = []
    for start, stop in sorted(ranges):
        start = max(start, 1)
        if spans and start <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], stop)
        else:
            spans.append([start, stop])
    return np.array(spans, np.int32).reshape(-1, 2)


def segments_of(ranges: list[tuple[int, int]], num_tokens: int) -> NDArray[np.int32]:
    """(segments,) lengths of the turns and of what stands between them."""
    edges = {edge for here in ranges for edge in here}
    return np.diff(sorted(edges | {0, num_tokens})).astype(np.int32)


def truncated(example: Example, length: int, keep: Literal["left", "right"]) -> Example:
    """`length` tokens of an example: truncation on the `left` keeps its end, `right` its start."""
    first = len(example.tokens) - length if keep == "left" else 0
    spans = np.clip(example.spans - first, [[1, 0]], length)
    ends = np.clip(np.cumsum(example.segments) - first, 0, length)
    segments = np.diff(ends, prepend=0)
    return replace(
        example,
        tokens=example.tokens[first : first + length],
        spans=spans[spans[:, 1] > spans[:, 0]].astype(np.int32),
        segments=segments[segments > 0].astype(np.int32),
    )
