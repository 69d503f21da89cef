"""Chat jobs that fail by name, since nobody can have meant their masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist.errors import DataRefused
from spark_jobs import chat as job
from spark_jobs.chat_tasks import judge
from tests.chat_templates import TAGGED, chat_tokenizer_json
from tests.test_spark_jobs_chat import LONG, REPLY, USER, chat, write_rows


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    return chat_tokenizer_json()


ALL = "{% generation %}{% for m in messages %}{{ m.content }}</s>{% endfor %}{% endgeneration %}"
NO_STOP = (
    "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
)
FORGETS = "{% for m in messages %}{{ m.content if loop.last else '-' }}</s>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "rows", "changes", "said"),
    [
        (ALL, [{"messages": [REPLY]}], {}, "mask_all_ones: all"),
        (TAGGED["qwen"], [{"messages": [USER]}], {}, "mask_all_zeros: no turn"),
        (NO_STOP, [LONG], {}, r"stop_token_never_trained: none of 2 trained turns"),
        (TAGGED["qwen"], [LONG], {"stop": "</s>"}, "ends with the token '</s>'"),
        (FORGETS, [LONG], {}, "not_prefix: with turn"),
        (ALL, [LONG], {}, "turns_unclear: 1 generation blocks for 2"),
        (TAGGED["mistral"], [LONG], {}, "template_error: the template cannot.*must alternate"),
        (
            TAGGED["qwen"],
            [LONG],
            {"max_length": 4, "truncation": "right"},
            "truncated_away: cutting",
        ),
        (TAGGED["qwen"], [LONG], {"max_length": 4}, "over_length: all are longer"),
        (TAGGED["qwen"], [{"text": "x"}], {}, "unrecognised: they are no chats"),
    ],
)
def test_masks_that_nobody_can_mean_fail_by_name(
    tmp_path: Path, tokenizer: bytes, template: str, rows: list[Any], changes: Any, said: str
) -> None:
    """Training on every token, on none, or never on the stop token shows in no loss curve. Each
    ends before Spark starts, with exit code 3."""
    folder = write_rows(tmp_path, rows * 3, tokenizer, template)
    config = job.Config(
        input=[str(folder / "data")], tokenizer=str(folder), output=str(tmp_path / "out"), **changes
    )
    with pytest.raises(DataRefused, match=said) as refused:
        job.run(config)
    assert refused.value.exit_code == 3 and not (tmp_path / "out" / "LATEST").exists()


def test_the_whole_is_judged_as_the_sample_is(tokenizer: bytes) -> None:
    """A sample that happens to be good must not let a job through."""
    rules = chat(tokenizer).rules
    good = {
        "documents_in": 10, "documents_out": 8, "tokens": 100, "targets": 50, "trained_turns": 9,
        "trained_stops": 9, "quarantined.truncated_away": 2,
    }  # fmt: skip
    judge(good, rules)
    for changes, said in (
        ({"targets": 92}, "mask_all_ones"),
        ({"trained_stops": 0}, "stop_token_never_trained"),
        ({"documents_out": 1, "quarantined.truncated_away": 9}, "truncated_away"),
        ({"documents_out": 0, "filtered": 10, "filtered.nothing_trained": 10}, "mask_all_zeros"),
    ):
        with pytest.raises(DataRefused, match=said):
            judge({**good, **changes}, rules)
