"""Rows/s of litData's shuffled loader on an array of rows; runs in litData's environment.

usage: litdata_rows.py ROWS.npy FOLDER BATCH SECONDS WORKERS DTYPE WINDOW

The dataset is made by its optimize() and read by its StreamingDataset, TokensLoader and
StreamingDataLoader, as its README does for language models. It permutes chunks and then rows
inside a chunk, by default in windows of 256 (WINDOW `auto`); `full` permutes a whole chunk.
"""

import json
import os
import sys

import numpy as np
from measure import delivered, rate

CHUNK_BYTES = 64_000_000


def part(arguments):
    """One input of optimize(): the rows of a part of the array, a tensor each."""
    import torch

    source, start, stop, dtype = arguments
    for row in np.load(source, mmap_mode="r")[start:stop]:
        yield torch.from_numpy(row.astype(dtype))


def main() -> None:
    source, folder, batch, seconds, workers, dtype, window = sys.argv[1:]
    import torch
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    torch.set_num_threads(1)
    rows = np.load(source, mmap_mode="r")
    block = rows.shape[1]
    if not os.path.exists(f"{folder}/index.json"):
        per_chunk = max(1, CHUNK_BYTES // (block * np.dtype(dtype).itemsize))
        optimize(
            fn=part,
            inputs=[(source, start, start + 8192, dtype) for start in range(0, len(rows), 8192)],
            output_dir=folder,
            chunk_size=per_chunk * block,
            item_loader=TokensLoader(block_size=block),
            num_workers=1,
            verbose=False,
        )
    dataset = StreamingDataset(
        folder,
        item_loader=TokensLoader(block_size=block),
        shuffle=True,
        seed=1,
        item_shuffle_window=window,
    )
    loader = StreamingDataLoader(dataset, batch_size=int(batch), num_workers=int(workers))
    found = delivered(loader, rows)
    print(json.dumps({**rate(loader, float(seconds)), **found}))


if __name__ == "__main__":
    main()
