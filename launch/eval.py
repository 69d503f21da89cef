"""`leyden eval RUN|FOLDER`: loss and perplexity of a trained model, in all and by source."""

from __future__ import annotations

from launch import take_home

VERB = take_home.Verb(
    name="eval",
    recipe="evaluate",
    what="RUN|FOLDER",
    summary=(
        "Loss and perplexity on a split of a dataset, in all and by source (the first folder of "
        "the input files).\nA run keeps the result as eval.json."
    ),
    examples=(
        "quickstart",
        "quickstart --rows 200 --json",
        "runs/quickstart/exported/step-300 --data.url data/quickstart/dataset",
    ),
)


def main(arguments: list[str]) -> int:
    """Evaluate and return the exit code."""
    return take_home.main(VERB, arguments)
