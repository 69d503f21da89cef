"""Rows/s of Hugging Face datasets, map-style and shuffled, on an array of rows; runs in its
environment.

usage: datasets_rows.py ROWS.npy FOLDER BATCH SECONDS WORKERS

A memory-mapped Arrow dataset in torch format under torch's DataLoader with shuffle=True.
"""

import json
import os
import sys

import numpy as np
from measure import delivered, rate


class Tokens:
    """The one column of a loader's batches."""

    def __init__(self, loader) -> None:
        self.loader = loader

    def __iter__(self):
        return (batch["tokens"] for batch in self.loader)


def main() -> None:
    source, folder, batch, seconds, workers = sys.argv[1:]
    import datasets
    import pyarrow as pa
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    rows = np.load(source, mmap_mode="r")
    if not os.path.exists(folder):
        values = pa.array(np.asarray(rows).reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
        datasets.Dataset(pa.table({"tokens": column})).save_to_disk(folder)
    dataset = datasets.load_from_disk(folder).with_format("torch")
    loader = Tokens(
        DataLoader(dataset, batch_size=int(batch), shuffle=True, num_workers=int(workers))
    )
    found = delivered(loader, rows)
    print(json.dumps({**rate(loader, float(seconds)), **found}))


if __name__ == "__main__":
    main()
