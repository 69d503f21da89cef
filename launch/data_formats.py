"""`leyden data export` and `import`: datasets of tokens in the formats of others."""

from __future__ import annotations

import argparse
from pathlib import Path

EXPORT = "its documents as Megatron .bin/.idx, WebDataset tar or Hugging Face Parquet files"
IMPORT = "tokens in Megatron, MDS, Hugging Face or WebDataset files as packed rows or examples"


def export(arguments: list[str]) -> int:
    """Write a dataset's documents to a new folder."""
    parser = argparse.ArgumentParser(
        prog="leyden data export",
        description=f"Write {EXPORT}. The folder appears whole, with origin.json, or not at all.",
        epilog="examples: leyden data export data/corpus --to megatron out/megatron    "
        "leyden data export data/corpus --to hf out/hf",
    )
    parser.add_argument("reference", metavar="REF", help="folder, URL@DIGEST or pin file")
    parser.add_argument("--to", required=True, choices=["megatron", "webdataset", "hf"])
    parser.add_argument("output", metavar="OUT", help="folder to make")
    options = parser.parse_args(arguments)
    from dist.data_export import export_dataset
    from dist.dataset import open_one

    done = export_dataset(open_one(options.reference), options.to, Path(options.output))
    counts = ", ".join(f"{count:,} of {split}" for split, count in done.documents.items())
    size = sum(facts["bytes"] for facts in done.files.values())
    print(
        f"{'already exported' if done.already else 'exported'}: {counts} documents, "
        f"{len(done.files)} files, {size / 1e6:,.1f} MB in {done.folder}"
    )
    return 0


def import_(arguments: list[str]) -> int:
    """Turn a token dataset of another format into one of packed rows, or of examples."""
    parser = argparse.ArgumentParser(
        prog="leyden data import",
        description=f"Commit {IMPORT}. Ids are checked against the tokenizer; a rerun on the same "
        "source does nothing. Hugging Face rows with a column of labels become examples, trained "
        "where a label is not -100; what attention_mask leaves out is left out. Text is for "
        "`leyden prep tokenize-text`, chats for `leyden prep chat`.",
        epilog="example: leyden data import --from megatron out/megatron data/imported "
        "--tokenizer out/megatron/tokenizer.json --seq_len 2048",
    )
    add = parser.add_argument
    add("--from", dest="format", required=True, choices=["megatron", "mds", "hf", "webdataset"])
    add("source", metavar="SRC", help="file, folder or prefix, on a disk of this machine")
    add("output", metavar="OUTPUT", help="folder or URL of the dataset")
    add("--tokenizer", required=True, metavar="FILE", help="tokenizer.json that made the tokens")
    add("--kind", default="", choices=["packed_tokens", "examples"], help="(examples with labels)")
    add("--seq_len", type=int, default=1024, help="input tokens of a packed row (1024)")
    add("--max_length", type=int, default=0, help="tokens of an example (of the longest)")
    add("--column", default="", help="column of the tokens (input_ids or tokens)")
    add("--bytes_dtype", default="", help="type of an MDS column of bytes, as int64")
    add("--eos", default="", metavar="TOKEN", help="cut documents after this token of theirs")
    add("--validation_fraction", type=float, default=0.0, help="share for validation (0)")
    add("--shard_size_mib", type=float, default=256.0, help="largest shard (256)")
    options = parser.parse_args(arguments)
    from dist.data_import import ImportPlan, import_tokens
    from dist.dataset import open_one

    plan = ImportPlan(**{**vars(options), "source": Path(options.source)})
    digest, before = import_tokens(plan)
    dataset = open_one(f"{options.output}@{digest}")
    if before:
        print(f"already done: {dataset.reference} was made from the same source")
        return 0
    is_packed = dataset.manifest.kind == "packed_tokens"
    for split, sums in dataset.manifest.totals.items():
        print(
            f"{split}: {sums['documents']:,} {'documents' if is_packed else 'examples'}, "
            f"{sums['tokens']:,} tokens, "
            + (f"{sums['rows']:,} rows" if is_packed else f"{sums['targets']:,} of them trained")
        )
    counters = (dataset.read_provenance() or {}).get("counters", {})
    if counters.get("filtered"):
        print(
            f"left out: {counters['filtered']:,} without a {'' if is_packed else 'trained '}token"
        )
    print(f"dataset: {dataset.reference}")
    return 0
