"""Rows of chat datasets, in the shapes that are common, as messages of role and content.

OpenAI       {"messages": [{"role", "content", "tool_calls"?}, ...], "tools"?}
ShareGPT     {"conversations": [{"from", "value"}, ...], "system"?, "tools"?}
Alpaca       {"instruction", "input"?, "output", "system"?, "history"?: [[user, reply], ...]}
prompt       {"prompt", "completion" or "response"}: texts, or messages each
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from spark_jobs.chat_template import MARKS, Message

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
    **dict.fromkeys(("system",), "system"),
}


@dataclass(frozen=True)
class Conversation:
    """What a template is given."""

    messages: list[Message]
    tools: list[Any] | None = None


class Unrecognised(ValueError):
    """The row is no conversation; the message says why."""


def recognise(text: str) -> Conversation:
    """The conversation of a row, given as the text of a JSON object. Raises Unrecognised."""
    if any(mark in text for mark in MARKS):
        raise Unrecognised("it holds a private-use character that marks turns")
    row = json.loads(text)
    keys = set(row)
    if "messages" in keys:
        found = _messages(row["messages"])
    elif "conversations" in keys:
        found = _messages(row["conversations"])
    elif {"instruction", "output"} <= keys:
        found = _alpaca(row)
    elif "prompt" in keys and keys & {"completion", "response"}:
        reply = row["completion"] if "completion" in keys else row["response"]
        found = [*_side(row["prompt"], "user"), *_side(reply, "assistant")]
    else:
        raise Unrecognised(
            f"none of messages, conversations, instruction + output, prompt + completion is among "
            f"its keys {sorted(keys)[:8]}"
        )
    system = row.get("system")
    if isinstance(system, str) and system and found and found[0]["role"] != "system":
        found = [{"role": "system", "content": system}, *found]
    if not found:
        raise Unrecognised("it has no message")
    # MARKS may also be written as JSON escapes.
    if any(mark in str(one.get("content", "")) for one in found for mark in MARKS):
        raise Unrecognised("it holds a private-use character that marks turns")
    return Conversation(found, _tools(row.get("tools")))


def _messages(given: Any) -> list[Message]:
    if isinstance(given, str):  # some Parquet files keep JSON in a column
        given = _parsed(given)
    if not isinstance(given, list):
        raise Unrecognised(f"its messages are a {type(given).__name__}, not a list")
    return [_message(one) for one in given]


def _message(given: Any) -> Message:
    if not isinstance(given, dict):
        raise Unrecognised(f"a message is a {type(given).__name__}, not an object")
    role = given.get("role", given.get("from"))
    if role is None:
        raise Unrecognised("a message has neither role nor from")
    if not isinstance(role, str):
        raise Unrecognised(f"the role of a message is {role!r}")
    if "role" in given:
        message = {**given, "content": _content(given.get("content"))}
    elif role in _ROLES:
        message = {"role": _ROLES[role], "content": _content(given.get("value"))}
    else:
        raise Unrecognised(f"a message is from {role!r}")
    if message["content"] is None and not message.get("tool_calls"):
        raise Unrecognised(f"a message of {role!r} has neither content nor tool_calls")
    return message


def _content(given: Any) -> str | None:
    """Text, or the texts of its parts; images and the like are refused."""
    if given is None or isinstance(given, str):
        return given
    if isinstance(given, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in given
    ):
        return "".join(part["text"] for part in given)
    raise Unrecognised("the content of a message is not text")


def _alpaca(row: dict[str, Any]) -> list[Message]:
    found: list[Message] = []
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise Unrecognised("its history is not a list of pairs")
        found += [*_side(pair[0], "user"), *_side(pair[1], "assistant")]
    asked, more = row["instruction"], row.get("input")
    if not isinstance(asked, str) or not isinstance(row["output"], str):
        raise Unrecognised("its instruction or output is not text")
    if isinstance(more, str) and more.strip():
        asked = f"{asked}\n\n{more}"
    return [*found, *_side(asked, "user"), *_side(row["output"], "assistant")]


def _side(given: Any, role: str) -> list[Message]:
    if isinstance(given, str):
        return [{"role": role, "content": given}]
    return _messages(given)


def _tools(given: Any) -> list[Any] | None:
    if isinstance(given, str) and given.strip():
        given = _parsed(given)
    if given is None or given == "" or given == []:
        return None
    if not isinstance(given, list):
        raise Unrecognised(f"its tools are a {type(given).__name__}, not a list")
    return given


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise Unrecognised("a field that should hold JSON does not") from None
