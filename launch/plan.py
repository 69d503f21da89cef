"""`leyden plan RECIPE`: memory and time of one rank on N pretended ranks of a device."""

from __future__ import annotations

import sys

from launch.processes import command_text, run_child
from launch.train import find_target


def help_text() -> str:
    """What `leyden plan --help` prints."""
    return (
        "usage: leyden plan RECIPE --ranks N --device NAME [--config NAME] [--key value ...]\n\n"
        "What one rank would need of memory and time: the recipe's own module takes one step on\n"
        "tensors without memory, as one of N ranks; no GPU is touched. Where it does not fit,\n"
        "the changes that would make it fit are tried and shown.\n\n"
        "  --ranks N           ranks in all, 1 to 4096 (1)\n"
        "  --device NAME       h100 (default), h100-pcie, h200, a100-80, a100-40, b200, l40s,\n"
        "                      l4, a10g, v100, t4, rtx4090, mi300x; cpu: this machine, measured\n"
        "  --memory-gib X      memory of a device, instead of the table's\n"
        "  --ranks-per-node N  devices of a node\n"
        "  --vocab_size N      of the tokenizer, and\n"
        "  --seq_len N         tokens of a row, where there is no --data.url yet\n"
        "  --sweep             a table of micro-batch x checkpointing x strategy instead\n"
        "  --json              one JSON object\n"
        "  --dry-run           print the command and start nothing\n\n"
        "All other options are the recipe's (`leyden train RECIPE --help`).\n"
        "exit codes: 0 fits, 1 does not fit, 2 usage or config\n\n"
        "examples:\n"
        "  leyden plan pretrain --config 1b --ranks 8 --vocab_size 128256 --seq_len 2048\n"
        "  leyden plan pretrain --config tiny --data.url data/quickstart/dataset --device cpu\n"
    )


def main(arguments: list[str]) -> int:
    """Plan in a process of its own; returns its exit code."""
    if not arguments or any(word in ("-h", "--help") for word in arguments):
        print(help_text(), end="")
        return 0 if arguments else 2
    find_target(arguments[0])
    words = [word for word in arguments if word != "--dry-run"]
    argv = [sys.executable, "-m", "recipes.plan", *words]
    # Fake tensors are on the CPU; a visible GPU would only be opened and held.
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    if "--dry-run" in arguments:
        print(command_text(argv, hidden))
        return 0
    return run_child(argv, env=hidden)
