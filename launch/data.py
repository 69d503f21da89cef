"""`leyden data ACTION`: look at datasets, check, compare, clean, pin, export and import them."""

from __future__ import annotations

import argparse
import sys
from os.path import isfile
from pathlib import Path

from dist.errors import ConfigError
from launch import audit, data_formats, data_inspect, data_tools
from launch.cli import nearest
from launch.data_inspect import REFERENCE_HELP

ACTIONS = {
    "inspect": data_inspect.INSPECT,
    "verify": "read and hash every byte of it, or of an exported model; exit 3 names the damage",
    "diff": data_tools.DIFF,
    "gc": data_tools.GC,
    "pin": data_tools.PIN,
    "export": data_formats.EXPORT,
    "import": data_formats.IMPORT,
    "who-saw": audit.WHO_SAW,
    "replay": audit.REPLAY,
}


def help_text() -> str:
    """What `leyden data --help` prints."""
    lines = "\n".join(f"  {name:<9} {what}" for name, what in ACTIONS.items())
    return (
        "usage: leyden data inspect|verify|pin REF\n       leyden data diff REF REF\n"
        "       leyden data gc URL\n       leyden data export REF --to FORMAT OUT\n"
        "       leyden data import --from FORMAT SRC OUTPUT --tokenizer FILE\n"
        "       leyden data who-saw|replay RUN ...\n\n"
        f"actions:\n{lines}\n\nREF: {REFERENCE_HELP}\nRUN: {audit.RUN_HELP}\n\nexamples:\n"
        "  leyden data inspect data/quickstart/dataset\n"
        "  leyden data verify data/quickstart/dataset@3f9a12c4\n"
        "  leyden data gc data/quickstart/dataset --dry-run\n"
        "  leyden data pin data/quickstart/dataset -o quickstart.pin\n"
        "  leyden data export data/quickstart/dataset --to megatron data/megatron\n"
        "  leyden data who-saw quickstart train:17\n"
        "  leyden data replay quickstart --step 12\n"
    )


def verify(arguments: list[str]) -> int:
    """Hash every byte of a dataset or an exported model; DataRefused (exit 3) names the damage."""
    parser = argparse.ArgumentParser(
        prog="leyden data verify",
        description="Check a dataset, or a folder that `leyden export` wrote: "
        + ACTIONS["verify"]
        + ".",
        epilog="example: leyden data verify data/quickstart/dataset",
    )
    parser.add_argument(
        "reference", metavar="REF", help=f"{REFERENCE_HELP}; or the folder of an exported model"
    )
    parser.add_argument(
        "--presence", action="store_true", help="names, sizes, tokenizer and lengths only; fast"
    )
    options = parser.parse_args(arguments)
    from dist.dataset import open_dataset
    from dist.model_folder import LEYDEN_JSON, check_folder
    from dist.verify import check_presence, verify_full

    folder = Path(options.reference)
    if isfile(folder / LEYDEN_JSON) or isfile(folder / "config.json"):  # False without permission
        model = check_folder(folder)
        print(
            f"verified: {model.files} files, {model.bytes / 1e6:,.1f} MB, every byte as exported "
            f"from step {model.record['step']} of {model.record['run_id']}, trained on "
            f"{model.record['data_digest']}"
        )
        return 0
    dataset = open_dataset(options.reference)
    if options.presence:
        check_presence(dataset)
        print(f"present: {len(dataset.manifest.shards)} shards of {dataset.reference}")
        return 0
    report = verify_full(dataset)
    print(
        f"verified: {report.shards} shards, {report.bytes / 1e6:,.1f} MB in {report.seconds:.1f} s "
        f"({report.bytes / 1e9 / max(report.seconds, 1e-9):.2f} GB/s), every byte as "
        f"{dataset.reference} says"
    )
    return 0


def main(arguments: list[str]) -> int:
    """Run one action on a dataset."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text(), end="")
        return 0 if arguments else 2
    action, rest = arguments[0], arguments[1:]
    actions = {
        "inspect": data_inspect.inspect,
        "verify": verify,
        "diff": data_tools.diff,
        "gc": data_tools.gc,
        "pin": data_tools.pin,
        "export": data_formats.export,
        "import": data_formats.import_,
        "who-saw": audit.who_saw,
        "replay": audit.replay,
    }
    if action in actions:
        return actions[action](rest)
    raise ConfigError(
        f"{action!r} is not an action of leyden data{nearest(action, list(ACTIONS))} "
        f"(actions: {', '.join(ACTIONS)})"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
