"""Rows/s of litData's shuffled loader on an array of rows; runs in litData's environment.

usage: litdata_rows.py ROWS.npy FOLDER BATCH SECONDS WORKERS
"""

import json
import sys

import numpy as np
from measure import measure


def main() -> None:
    source, folder, batch, seconds, workers = sys.argv[1:]
    import torch
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader
    from litdata.streaming.cache import Cache

    torch.set_num_threads(1)
    rows = np.load(source, mmap_mode="r")
    block = rows.shape[1]
    # The writer behind optimize(), without its process pool.
    cache = Cache(folder, chunk_bytes="64MB", item_loader=TokensLoader(block_size=block))
    for number, row in enumerate(rows):
        cache._add_item(number, torch.from_numpy(row.astype(np.int32)))
    cache.done()
    cache.merge()
    dataset = StreamingDataset(
        folder, item_loader=TokensLoader(block_size=block), shuffle=True, drop_last=True, seed=1
    )
    loader = StreamingDataLoader(dataset, batch_size=int(batch), num_workers=int(workers))
    print(json.dumps({"rows_s": measure(loader, float(seconds))}))


if __name__ == "__main__":
    main()
