"""Tokenize a folder of JSONL files by datatrove's DocumentTokenizer; runs in its environment.

usage: datatrove_tokenize.py INPUT_FOLDER TOKENIZER.json EOS OUTPUT_FOLDER TASKS

Its local executor with one worker a task, its JSONL reader, documents shuffled inside each output
file (its default; our rows come shuffled too). 1,000 documents a batch, the default that its
docstring names: its signature's 10,000 are 150 MB of text here, held with all their offsets.
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    source, tokenizer, eos, output, tasks = sys.argv[1:]
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens.tokenizer import DocumentTokenizer

    executor = LocalPipelineExecutor(
        pipeline=[
            JsonlReader(source),
            DocumentTokenizer(
                output_folder=f"{output}/tokens",
                tokenizer_name_or_path=tokenizer,
                eos_token=eos,
                batch_size=1000,
                seed=1,
            ),
        ],
        tasks=int(tasks),
        workers=int(tasks),
        logging_dir=f"{output}/logs",
    )
    started = time.perf_counter()
    executor.run()
    seconds = time.perf_counter() - started
    # A .metadata file: tokenizer|bytes a token, tokens, tokens for people.
    counts = [int(path.read_text().split("\n")[1]) for path in Path(output).rglob("*.metadata")]
    if len(counts) != int(tasks):
        raise RuntimeError(f"{len(counts)} of {tasks} tasks wrote tokens")
    print(json.dumps({"seconds": seconds, "tokens": sum(counts)}))


if __name__ == "__main__":
    main()
