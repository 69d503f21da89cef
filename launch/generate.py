"""`leyden generate RUN|FOLDER`: text from a trained model."""

from __future__ import annotations

import sys

from dist.errors import ConfigError
from launch import take_home

VERB = take_home.Verb(
    name="generate",
    recipe="generate",
    what="RUN|FOLDER",
    summary=(
        "Continues a prompt, a file of prompts, or, without either, what is typed on the "
        "terminal. A flag without a\nvalue (--greedy) means true; a prompt that begins with -- is "
        "given as --prompt=--x."
    ),
    examples=(
        'quickstart --prompt "def main(" --temperature 0.8 --top_p 0.95 --num_samples 3',
        "quickstart --prompts prompts.jsonl --output texts.jsonl --greedy",
        "model --device_map auto --offload_folder /scratch/offload",
    ),
)


def main(arguments: list[str]) -> int:
    """Generate and return the exit code; says what is wrong with the prompts before loading."""
    asked = take_home.value_of("--prompt", arguments)
    if asked == "":
        raise ConfigError("the prompt is empty; give at least one character")
    take_home.file_given("--prompts", arguments)
    without = asked is None and take_home.value_of("--prompts", arguments) is None
    helping = not arguments or {"-h", "--help", "--dry-run"} & {*arguments}
    if without and not helping and not sys.stdin.isatty():
        raise ConfigError("no prompt: pass --prompt TEXT or --prompts FILE, or use a terminal")
    return take_home.main(VERB, arguments, terminal=without)
