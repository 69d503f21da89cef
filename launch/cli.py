"""The `leyden` command: plain argparse, nothing heavy imported, the work done in other processes.

    leyden quickstart | prep JOB | data ACTION ... | train RECIPE
    leyden eval | generate | export RUN

`leyden --help` must answer in 0.3 s on a login node, so this file and the verbs' files import the
standard library only, and everything else inside the function that needs it.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from launch.rooms import shadowed_room

VERBS = {
    "quickstart": "the whole path on this machine: text -> Spark -> shards -> training on 2 ranks",
    "prep": "run a Spark job that turns raw data into shards (prep alone lists the jobs)",
    "data": "datasets: inspect, verify, diff, gc, pin, export, import; who-saw and replay of runs",
    "train": "run a recipe under torchrun (train alone lists the recipes)",
    "plan": "memory and time of a run on N ranks of a device, before any is taken",
    "submit": "the same run as a Slurm job that drains, is requeued and goes on until it is done",
    "status": "where runs stand: job, step, attempts; status alone lists the runs",
    "logs": "what the ranks of a run's newest attempt said: logs RUN [--rank R] [--follow]",
    "cancel": "end a run's jobs, at once or after a checkpoint: cancel RUN [--drain]",
    "check": "is a machine or a cluster fit to train on? check --static SCRIPT reads a script",
    "eval": "loss and perplexity of a trained model, in all and by source",
    "generate": "text from a trained model: a prompt, a file of prompts, or interactive",
    "report": "one HTML file on a run: loss, throughput, attempts, data, environment",
    "export": "a run's model as a Hugging Face folder, with its lineage and digests",
}
EXIT_CODES = (
    "exit codes: 0 done, 1 failed, 2 usage or config, 3 data refused, 4 environment,\n"
    "            75 stopped and resumable, 93 do not restart, 130 interrupted"
)


def usage_text() -> str:
    """What `leyden --help` prints."""
    verbs = "\n".join(f"  {name:<12} {what}" for name, what in VERBS.items())
    return (
        "usage: leyden VERB ...\n\n"
        "Spark jobs turn raw data into verified shards; Lightning recipes train on them.\n\n"
        f"verbs:\n{verbs}\n\n"
        "start with:  leyden quickstart\n"
        "more:        leyden VERB --help\n\n"
        f"{EXIT_CODES}\n"
    )


def nearest(word: str, choices: Sequence[str]) -> str:
    """`; did you mean X?` for the choice that looks most like `word`, else nothing."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def dispatch(arguments: Sequence[str]) -> int:
    """Run one verb; raises LeydenError for what the user can mend."""
    from dist.errors import ConfigError, SetupError

    hidden = shadowed_room()
    if hidden:
        raise SetupError(hidden)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage_text(), end="")
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"leyden {version('leyden')}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise ConfigError(
            f"{verb!r} is not a verb of leyden{nearest(verb, list(VERBS))} "
            f"(verbs: {', '.join(VERBS)}; leyden --help says what they do)"
        )
    return int(importlib.import_module(f"launch.{verb}").main(list(rest)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        from dist.errors import describe
    except ImportError:
        # Another `dist` stands in front of ours: the one error that cannot use our own class.
        print(f"error: {shadowed_room() or 'the package dist cannot be imported'}", file=sys.stderr)
        return 4
    try:
        return dispatch(words)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # `leyden ... | head`: nobody reads on, and nobody reads a complaint
        return 0
    except Exception as error:
        said = describe(error)
        if said is None:
            raise
        print(f"error: {said[0]}", file=sys.stderr)
        return said[1]


if __name__ == "__main__":
    sys.exit(main())
