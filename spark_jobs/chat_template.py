"""Chat templates: messages to the text that a model sees, and which of it each turn wrote.

A template is rendered as Hugging Face's `apply_chat_template` does (transformers 5,
utils/chat_template_utils.py): a sandboxed Jinja environment with the same options, filters and
globals. Only `strftime_now` differs: it tells a date of the config, since a dataset must not depend
on the day it was made. What an assistant wrote comes from `{% generation %}` tags, or, in a
template without them, from what a turn adds to the text before it.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dist.errors import ConfigError

Message = dict[str, Any]
# Private-use characters; they stand round what a generation block renders until it is stripped.
MARKS = "\U000f0002\U000f0003"
_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_REASONING = ("reasoning_content", "thinking", "reasoning")


def _chatml(start: str, stop: str) -> str:
    return (
        "{%- for message in messages -%}\n"
        f"{{{{- '{start}' + message['role'] + '\\n' -}}}}\n"
        "{%- if message['role'] == 'assistant' -%}\n"
        f"{{% generation %}}{{{{- message['content'] + '{stop}' -}}}}{{% endgeneration %}}\n"
        f"{{%- else -%}}{{{{- message['content'] + '{stop}' -}}}}{{%- endif -%}}\n"
        "{{- '\\n' -}}\n"
        "{%- endfor -%}\n"
        f"{{%- if add_generation_prompt -%}}{{{{- '{start}assistant\\n' -}}}}{{%- endif -%}}\n"
    )


BUILT_IN = {
    "chatml": _chatml("<|im_start|>", "<|im_end|>"),
    # With tokens that `leyden prep train-tokenizer` reserves.
    "leyden": _chatml("<|reserved_3|>", "<|end_of_text|>"),
}


class TemplateError(Exception):
    """A row that the template cannot render, or whose turns it does not tell; `reason` is its
    name in the quarantine."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Turn:
    """What one turn wrote: characters [start, stop) of the rendered text."""

    role: str
    start: int
    stop: int


@dataclass(frozen=True)
class TemplateText:
    """A template before it is compiled; travels to the tasks."""

    text: str
    tokens: dict[str, str] = field(default_factory=dict)
    """bos_token, eos_token, ... as the template's variables."""
    today: str = "2024-07-26"
    """What strftime_now tells; an ISO date."""


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: TemplateText) -> None:
        self.tokens = source.tokens
        self.has_tags = _TAG.search(source.text) is not None
        try:
            self._template = _environment(source.today).from_string(source.text)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template is no Jinja template: {error.message} (line {error.lineno})"
            ) from None

    def render(
        self, messages: Sequence[Message], tools: Any = None, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the (start, stop) of what stands in generation blocks.

        prompt: end with what calls for an answer. Raises TemplateError.
        """
        try:
            marked = self._template.render(
                messages=[_as_hugging_face(message) for message in messages], tools=tools,
                documents=None, add_generation_prompt=prompt, **self.tokens,
            )  # fmt: skip
        except Exception as error:  # a template may raise anything on a row that it does not expect
            said = f"{type(error).__name__}: {error}"
            raise TemplateError("template_error", said) from None
        parts = re.split(f"[{MARKS}]", marked)
        text = "".join(parts)
        ends = [0]
        for part in parts:
            ends.append(ends[-1] + len(part))
        # Marks come in pairs, so the text between them is every second part.
        blocks = [(ends[i], ends[i + 1]) for i in range(1, len(parts), 2)]
        return text, [block for block in blocks if block[0] < block[1]]

    def turns(
        self, messages: Sequence[Message], tools: Any, roles: frozenset[str], after_stop: Any
    ) -> tuple[str, list[Turn]]:
        """The text and the turns of the roles in it, in order.

        after_stop: a pattern of a stop token and the space that follows it up to the end; that
        space is no part of a turn. Raises TemplateError where the template does not tell a turn.
        """
        text, blocks = self.render(messages, tools)
        turns = []
        if self.has_tags and "assistant" in roles:
            turns = [Turn("assistant", start, stop) for start, stop in blocks]
            num_replies = sum(message["role"] == "assistant" for message in messages)
            if len(turns) != num_replies:
                raise TemplateError(
                    "turns_unclear",
                    f"{len(turns)} generation blocks for {num_replies} assistant turns",
                )
        for number, message in enumerate(messages):
            role = message["role"]
            if role in roles and not (role == "assistant" and self.has_tags):
                start, stop = self._added(messages, number, tools, text)
                if match := after_stop.search(text[start:stop]):
                    stop = start + match.end("stop")
                turns.append(Turn(role, start, stop))
        return text, sorted(turns, key=lambda turn: turn.start)

    def _added(
        self, messages: Sequence[Message], number: int, tools: Any, text: str
    ) -> tuple[int, int]:
        """Where message `number` stands: what it adds to the text before it."""
        reply = messages[number]["role"] == "assistant"
        before = ""
        if number or reply:
            before = self.render(messages[:number], tools, prompt=reply)[0]
        after = self.render(messages[: number + 1], tools)[0]
        if not (after.startswith(before) and text.startswith(after)):
            raise TemplateError(
                "not_prefix",
                f"with turn {number} the template changes the text of the turns before it",
            )
        return len(before), len(after)


def _as_hugging_face(message: Message) -> Message:
    """Keys without a value left out, reasoning under each of its names."""
    message = {key: value for key, value in message.items() if value is not None}
    said = next((message[key] for key in _REASONING if key in message), None)
    if said is None:
        return message
    return {"thinking": said, **message, "reasoning_content": said}


def _environment(today: str) -> Any:
    date = dt.date.fromisoformat(today)
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals |= {
        "raise_exception": _raise, "strftime_now": date.strftime, "dict": _Dict(),
        "namespace": _Namespace,
    }  # fmt: skip
    return made


class _Generation(jinja2.ext.Extension):
    """The block tag `generation`: what the model writes."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return MARKS[0] + str(caller()) + MARKS[1]


class _Dict:
    """`dict` without the attributes of the class, by which a template could break out."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that takes no underscored names, for the same reason."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name like {name!r}")


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    # Jinja's own escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def load_template(given: str, tokenizer: str, today: str) -> TemplateText:
    """A template by name, file or URL; '' is the tokenizer's own.

    tokenizer: tokenizer.json or its folder, whose tokenizer_config.json names the special tokens.
    """
    folder = tokenizer.rstrip("/")
    folder = folder.rpartition("/")[0] if folder.endswith(".json") else folder
    settings = _read_json(f"{folder}/tokenizer_config.json" if folder else "tokenizer_config.json")
    tokens = {f"{name}_token": _text_of(settings.get(f"{name}_token")) for name in _TOKENS}
    if given in BUILT_IN:
        text = BUILT_IN[given]
    elif given:
        text = _read(given) or ""
        if given.endswith(".json"):
            text = _template_in(_read_json(given))
    else:
        text = _read(f"{folder}/chat_template.jinja") or _template_in(settings)
    if not text:
        raise ConfigError(
            f"no chat template at {given or folder!r}; set --template to a Jinja file, to a "
            f"tokenizer_config.json, or to one of {', '.join(BUILT_IN)}"
        )
    return TemplateText(text, {key: value for key, value in tokens.items() if value}, today)


def _template_in(settings: dict[str, Any]) -> str:
    found = settings.get("chat_template")
    if isinstance(found, list):  # several by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else ""


def _text_of(token: Any) -> str:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _read_json(url: str) -> dict[str, Any]:
    try:
        record = json.loads(_read(url) or "{}")
    except ValueError as error:
        raise ConfigError(f"{url} is not JSON: {error}") from None
    return record if isinstance(record, dict) else {}


def _read(url: str) -> str | None:
    try:
        with fsspec.open(url, "rb") as file:
            return bytes(file.read()).decode()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    except (ImportError, ValueError) as error:
        raise ConfigError(f"chat template {url}: {error}") from None
