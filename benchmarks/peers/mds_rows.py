"""Rows/s of MosaicML Streaming's shuffled loader on an array of rows; runs in its environment.

usage: mds_rows.py ROWS.npy FOLDER BATCH SECONDS WORKERS
"""

import importlib.machinery
import json
import os
import sys
import types

import numpy as np
from measure import delivered, rate


def main() -> None:
    source, folder, batch, seconds, workers = sys.argv[1:]
    # It imports torchvision for its image datasets, which has no CPU build to match.
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms.functional")
    for name in (*names, "torchvision.transforms"):
        stub = types.ModuleType(name)
        stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
        stub.VisionDataset, stub.to_tensor = object, None
        sys.modules[name] = stub
    import torch
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    rows = np.load(source, mmap_mode="r")
    columns = {"tokens": f"ndarray:uint16:{rows.shape[1]}"}
    if not os.path.exists(folder):
        with MDSWriter(out=folder, columns=columns, size_limit=1 << 26) as out:
            for row in rows:
                out.write({"tokens": np.asarray(row)})
    dataset = StreamingDataset(local=folder, shuffle=True, batch_size=int(batch), shuffle_seed=1)
    loader = DataLoader(
        dataset,
        batch_size=int(batch),
        num_workers=int(workers),
        collate_fn=lambda items: np.stack([item["tokens"] for item in items]),
    )
    found = delivered(loader, rows)
    print(json.dumps({**rate(loader, float(seconds)), **found}))


if __name__ == "__main__":
    main()
