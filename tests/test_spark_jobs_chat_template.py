"""Chat templates against Hugging Face's own renderer: the same text, tokens and masks."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist.errors import ConfigError
from dist.example_file import Example
from spark_jobs.chat_template import BUILT_IN, TemplateText, load_template
from spark_jobs.chat_tokens import ChatRules, ChatTokens, Left, TrainedTurns
from tests.chat_templates import CHATS, PLAIN, REPLY, TAGGED, USER, chat_tokenizer_json

ROOT = Path(__file__).parent.parent
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
NAMES = ["qwen", "llama-2", "llama-3", "mistral", "gemma", "zephyr"]


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    return chat_tokenizer_json()


@pytest.fixture(scope="module")
def oracle(tokenizer: bytes) -> Any:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_buffer(tokenizer), **TOKENS
    )


def chat(text: str, tokenizer: bytes, **changes: Any) -> ChatTokens:
    settings: dict[str, Any] = {
        "template": TemplateText(text, TOKENS), "train": TrainedTurns(), "max_length": 4096,
        "truncation": "drop", "special_text": "refuse", "stop": "",
    }  # fmt: skip
    return ChatTokens(ChatRules(**{**settings, **changes}), tokenizer)


def one(made: ChatTokens, messages: list[Any], tools: Any = None) -> Example | Left:
    return made.examples([json.dumps({"messages": messages, "tools": tools})])[0]


def mask(example: Example) -> list[int]:
    found = np.zeros(len(example.tokens), int)
    for start, stop in example.spans:
        found[start:stop] = 1
    return found.tolist()


def expected(oracle: Any, template: str, messages: list[Any], tools: Any) -> Any:
    """Hugging Face's ids and mask; None where the template refuses the roles."""
    import jinja2

    try:
        return oracle.apply_chat_template(
            messages, tools=tools, chat_template=template, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
    except jinja2.TemplateError:
        return None


@pytest.mark.parametrize("case", CHATS)
@pytest.mark.parametrize("name", NAMES)
def test_tagged_templates_give_hugging_faces_tokens_and_masks(
    name: str, case: str, oracle: Any, tokenizer: bytes
) -> None:
    """A filter, a whitespace rule or a mask border that differs trains another text."""
    messages, tools = CHATS[case]
    theirs = expected(oracle, TAGGED[name], messages, tools)
    ours = one(chat(TAGGED[name], tokenizer), messages, tools)
    if theirs is None:
        assert isinstance(ours, Left) and ours.reason == "template_error"
        return
    assert isinstance(ours, Example), ours
    assert ours.tokens.tolist() == theirs["input_ids"]
    assert mask(ours) == theirs["assistant_masks"] and 0 < ours.num_targets < len(ours.tokens)
    ours.check()


@pytest.mark.parametrize("case", CHATS)
@pytest.mark.parametrize("name", NAMES)
def test_without_tags_prefixes_give_the_same_masks(
    name: str, case: str, oracle: Any, tokenizer: bytes
) -> None:
    """Masks by prefix difference that train headers, or the newline after the stop token."""
    messages, tools = CHATS[case]
    theirs = expected(oracle, TAGGED[name], messages, tools)
    plain = expected(oracle, PLAIN[name], messages, tools)
    ours = one(chat(PLAIN[name], tokenizer), messages, tools)
    if theirs is None:
        assert isinstance(ours, Left) and ours.reason == "template_error"
        return
    assert isinstance(ours, Example), ours
    assert ours.tokens.tolist() == plain["input_ids"] == theirs["input_ids"]
    assert not any(plain["assistant_masks"]), "the oracle's own silent mask of zeros"
    assert mask(ours) == theirs["assistant_masks"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates(name: str, oracle: Any, tokenizer: bytes) -> None:
    """A template of our own that Hugging Face would read otherwise."""
    theirs = expected(oracle, BUILT_IN[name], *CHATS["system"])
    made = chat(BUILT_IN[name], tokenizer, special_text="control")
    ours = one(made, CHATS["system"][0])
    assert isinstance(ours, Example)
    assert ours.tokens.tolist() == theirs["input_ids"] and mask(ours) == theirs["assistant_masks"]
    text = made.tokenizer.decode(ours.tokens)
    assert text.count("assistant\n") == 2 and text.endswith("\n")


def test_a_template_that_rewrites_earlier_turns_is_named(tokenizer: bytes) -> None:
    """Qwen 3 drops the thinking of earlier turns: prefixes would mask the wrong characters."""
    forgets = (
        "{% for m in messages %}{{ m.role + ':' }}"
        "{{ m.content if loop.last else m.content[:2] }}{{ '</s>' }}{% endfor %}"
    )
    found = one(chat(forgets, tokenizer), CHATS["multi"][0])
    assert isinstance(found, Left) and found.reason == "not_prefix"


def test_generation_blocks_that_are_no_turns_are_named(tokenizer: bytes) -> None:
    """`last` over blocks that do not match turns would train the wrong one."""
    both = (
        "{% for m in messages %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endfor %}"
    )
    found = one(chat(both, tokenizer), CHATS["multi"][0])
    assert isinstance(found, Left) and found.reason == "turns_unclear"


def test_generation_blocks_inside_macros_are_found(oracle: Any, tokenizer: bytes) -> None:
    """Positions counted while the template streams are wrong inside a macro or a set block."""
    template = (
        "{% macro say(m) %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{{ m.role }}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{% set text %}{{ say(m) }}{% endset %}{{ text }}{% endif %}{% endfor %}"
    )
    found = one(chat(template, tokenizer), [USER, REPLY])
    assert isinstance(found, Example)
    made = chat(template, tokenizer)
    trained = found.tokens[np.array(mask(found), bool)]
    assert made.tokenizer.decode(trained) == REPLY["content"] + "</s>"


def test_a_last_character_of_several_tokens_is_trained_whole(tokenizer: bytes) -> None:
    """An emoji is several byte tokens with one character's place: transformers trains the first
    of them only when a reply ends there."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    found = one(
        chat(template, tokenizer), [USER, {"role": "assistant", "content": "ok \U0001f600"}]
    )
    assert isinstance(found, Example)
    assert found.spans[-1, 1] == len(found.tokens)


def test_the_clock_is_never_in_the_data(oracle: Any, tokenizer: bytes) -> None:
    """Llama 3 templates write today's date: a rerun tomorrow would give another digest."""
    template = "{{ strftime_now('%d %b %Y') }}" + TAGGED["llama-3"]
    fixed = one(chat(template, tokenizer), [USER, REPLY])
    assert isinstance(fixed, Example)
    assert "26 Jul 2024" in chat(template, tokenizer).tokenizer.decode(fixed.tokens)
    today = TemplateText(template, TOKENS, dt.date.today().isoformat())
    now = one(chat(template, tokenizer, template=today), [USER, REPLY])
    theirs = expected(oracle, template, [USER, REPLY], None)
    assert isinstance(now, Example) and now.tokens.tolist() == theirs["input_ids"]


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(__x=1) %}{{ ns.__x }}",
    ],
)
def test_templates_are_sandboxed(text: str, tokenizer: bytes) -> None:
    """A template comes with a downloaded tokenizer; it must not run code or change messages."""
    found = one(chat(text, tokenizer), [USER, REPLY])
    assert isinstance(found, Left) and found.reason in ("template_error", "nothing_trained")
    assert "Security" in found.said or found.reason == "nothing_trained"


def test_where_templates_come_from(tmp_path: Path) -> None:
    """The tokenizer's own template must be found where models keep it, and a wrong path named."""
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "in config"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    given = str(tmp_path / "tokenizer.json")
    found = load_template("", given, "2024-07-26")
    assert (found.text, found.tokens) == ("in config", TOKENS)
    config["chat_template"] = [
        {"name": "x", "template": "no"},
        {"name": "default", "template": "d"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_template("", str(tmp_path), "2024-07-26").text == "d"
    (tmp_path / "chat_template.jinja").write_text("in a file")
    assert load_template("", given, "2024-07-26").text == "in a file"
    other = str(tmp_path / "tokenizer_config.json")
    assert load_template(other, given, "2024-07-26").text == "d"
    assert load_template("chatml", given, "2024-07-26").text == BUILT_IN["chatml"]
    with pytest.raises(ConfigError, match=r"no chat template at '/nowhere\.jinja'"):
        load_template("/nowhere.jinja", given, "2024-07-26")
    with pytest.raises(ConfigError, match="no Jinja template"):
        chat("{% for %}", chat_tokenizer_json())


def test_neither_torch_nor_transformers_is_needed() -> None:
    """transformers costs each executor seconds, and may bring torch."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers'): sys.modules[name] = None\n"
        "from tests.test_spark_jobs_chat_template import *\n"
        "made = one(chat(TAGGED['qwen'], chat_tokenizer_json()), *CHATS['tools'])\n"
        "assert made.num_targets > 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
