"""What the tasks of the chat job do, and how its books are judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from dist.errors import DataRefused
from dist.example_file import Example
from spark_jobs.chat_tokens import FILTERED, ChatRules, ChatTokens, Left
from spark_jobs.example_writer import ExampleBucketWriter, ExamplePlan, payload_of
from spark_jobs.records import KEPT_RAW_BYTES, Chunk, Refused, read_chunks
from spark_jobs.shard_writer import counters_row, refused_rows, write_partition
from spark_jobs.sources import InputFile, Split
from spark_jobs.tokenize_tasks import Transform, placed_rows, speak_plainly

# Why a template could not be used on a row.
TEMPLATE_REASONS = ("template_error", "not_prefix", "turns_unclear")
_made: dict[tuple[str, int], ChatTokens] = {}


def read_and_encode(
    splits: list[Split], files: list[InputFile], plan: Transform, chat: ChatTokens
) -> Iterator[pa.RecordBatch]:
    """Examples of splits; then refused records and the counters."""
    counters: Counter[str] = Counter()
    for chunk in read_chunks(files, splits, plan.rules):
        counters["documents_in"] += len(chunk.texts) + len(chunk.refused)
        made = chat.examples(chunk.texts)
        refused = [*chunk.refused, *_refused(chunk, made, counters)]
        if refused:
            counters.update(f"quarantined.{one.reason}" for one in refused)
            yield refused_rows(refused, plan.num_buckets)
        kept = [i for i, one in enumerate(made) if isinstance(one, Example)]
        if kept:
            examples = [one for one in made if isinstance(one, Example)]
            lengths = np.array([len(one.tokens) for one in examples], np.int64)
            counters["documents_out"] += len(kept)
            counters["text_bytes"] += chunk.text_bytes
            counters["tokens"] += int(lengths.sum())
            chosen = Chunk(
                inputs=[chunk.inputs[i] for i in kept], offsets=[chunk.offsets[i] for i in kept]
            )
            payload = pa.array([payload_of(one) for one in examples], pa.binary())
            yield placed_rows(chosen, files, plan, lengths, payload)
    for name in ("targets", "truncated", "trained_turns", "trained_stops"):
        counters[name] += chat.counters.pop(name, 0)
    yield counters_row(counters, plan.num_buckets)


def _refused(chunk: Chunk, made: list[Example | Left], counters: Counter[str]) -> Iterator[Refused]:
    """Rows for the quarantine; those that the config leaves out are only counted."""
    for i, one in enumerate(made):
        if not isinstance(one, Left):
            continue
        if one.reason in FILTERED:
            counters.update(["filtered", f"filtered.{one.reason}"])
            continue
        raw = chunk.texts[i].encode()[:KEPT_RAW_BYTES]
        yield Refused(chunk.inputs[i], chunk.offsets[i], one.reason, raw)


def chat_tokens(rules: ChatRules, tokenizer_json: bytes) -> ChatTokens:
    """One tokenizer and compiled template a worker process, whatever the number of its tasks."""
    key = (repr(rules), hash(tokenizer_json))
    if key not in _made:
        _made.clear()
        _made[key] = ChatTokens(rules, tokenizer_json)
    _made[key].counters.clear()
    return _made[key]


def stage_1(
    tasks: Any, files: Any, tokenizer_json: Any, plan: Transform, rules: ChatRules
) -> Callable[..., Any]:
    """The function of stage 1's tasks; tasks, files and tokenizer_json are broadcast values."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in batch.column(0).to_pylist():
                chat = chat_tokens(rules, tokenizer_json.value)
                yield from read_and_encode(tasks.value[number], files.value, plan, chat)

    return speak_plainly(run)


def stage_2(plan: ExamplePlan, paths: Any) -> Callable[..., Any]:
    """The function of stage 2's tasks; paths (of the inputs) is a broadcast value."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return write_partition(batches, plan, paths.value, ExampleBucketWriter)

    return speak_plainly(run)


def judge_sample(texts: list[str], chat: ChatTokens) -> None:
    """Refuse a job whose template or policy cannot be meant, before Spark starts."""
    made = chat.examples(texts)
    left = [one for one in made if isinstance(one, Left)]
    said = next((one.said for one in left if one.reason in TEMPLATE_REASONS), "")
    unknown = next((one.said for one in left if one.reason == "unrecognised"), "")
    counters = Counter(one.reason for one in left)
    facts = {f"quarantined.{reason}": count for reason, count in counters.items()}
    facts |= {f"filtered.{reason}": counters[reason] for reason in FILTERED}
    facts |= {name: chat.counters[name] for name in ("targets", "trained_turns", "trained_stops")}
    facts["documents_in"], facts["documents_out"] = len(made), len(made) - len(left)
    facts["tokens"] = sum(len(one.tokens) for one in made if isinstance(one, Example))
    if texts:
        judge(facts, chat.rules, "sampled rows", said or unknown)
    chat.counters.clear()


def judge(counters: dict[str, int], rules: ChatRules, what: str = "rows", said: str = "") -> None:
    """DataRefused, by a name, where nobody can have meant what came out.

    said: what was said of the first row that the template could not do.
    """
    seen, kept = counters["documents_in"], counters["documents_out"]
    tokens, targets = counters["tokens"], counters["targets"]
    if kept == 0:
        _judge_none(counters, rules, what, said)
    elif targets >= tokens - kept and not rules.train.is_everything:
        raise DataRefused(
            f"mask_all_ones: all {targets:,} tokens that something precedes are trained in the "
            f"{kept:,} {what}; the template marks more than replies as generation, or the prompts "
            "are empty"
        )
    elif counters["trained_stops"] == 0:
        wanted = f"the token {rules.stop!r}" if rules.stop else "a special token"
        raise DataRefused(
            f"stop_token_never_trained: none of {counters['trained_turns']:,} trained turns of the "
            f"{what} ends with {wanted}, so the model would never learn to stop; put the token "
            "inside {% generation %}, use a tokenizer that knows it, or name it with --stop"
        )
    if kept and seen and counters.get("quarantined.truncated_away", 0) > kept:
        raise DataRefused(
            f"truncated_away: cutting to max_length {rules.max_length} took every trained token "
            f"of {counters['quarantined.truncated_away']:,} of {seen:,} {what}; raise "
            "--max_length, or cut the other side with --truncation"
        )


def _judge_none(counters: dict[str, int], rules: ChatRules, what: str, said: str) -> None:
    """Not one example came out: say for which reason most of the rows were left out."""
    reasons = {
        key.partition(".")[2]: count
        for key, count in counters.items()
        if count and key.partition(".")[0] in ("quarantined", "filtered") and "." in key
    }
    if not reasons:
        return
    reason = max(reasons, key=lambda one: (reasons[one], one))
    advice = {
        "nothing_trained": "mask_all_zeros: no turn is one that `train` chooses; check its roles",
        "truncated_away": f"truncated_away: cutting to max_length {rules.max_length} took every "
        "trained token; raise --max_length, or cut the other side with --truncation",
        "over_length": f"over_length: all are longer than max_length {rules.max_length}",
        "template_error": f"template_error: the template cannot render them ({said})",
        "not_prefix": f"not_prefix: {said}; a template needs {{% generation %}} tags there",
        "turns_unclear": f"turns_unclear: {said}; `train` needs one for each turn",
        "unrecognised": f"unrecognised: they are no chats ({said})",
        "special_text": "special_text: their texts hold special tokens; --special_text control "
        "takes them for tokens",
    }.get(reason, reason)
    raise DataRefused(f"none of {counters['documents_in']:,} {what} can be trained on: {advice}")
