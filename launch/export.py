"""`leyden export RUN`: a run's model as a Hugging Face folder."""

from __future__ import annotations

from launch import take_home

VERB = take_home.Verb(
    name="export",
    recipe="export",
    what="RUN",
    summary=(
        "Writes a folder that transformers.AutoModelForCausalLM.from_pretrained loads: "
        "safetensors, tokenizer,\nmodel card, and leyden.json with every file's digest, which "
        "`leyden data verify FOLDER` checks."
    ),
    examples=(
        "quickstart",
        "quickstart --output model --dtype bf16",
        "quickstart --step 200 --max_shard_size 500MB",
    ),
)


def main(arguments: list[str]) -> int:
    """Export and return the exit code."""
    return take_home.main(VERB, arguments)
