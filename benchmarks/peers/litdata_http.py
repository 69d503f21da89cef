"""MB/s of one cold epoch of litData from a web server; runs in litData's environment.

usage: litdata_http.py ROWS.npy FOLDER URL BATCH WORKERS

litData has no downloader for http: it gets one by its own register_downloader, and the cache and
URL as its Dir, since it takes a path that begins with http for a local one. FOLDER is
made by optimize() once and lies under the server's root by its own name.
"""

import json
import os
import shutil
import sys
import tempfile
import time
import urllib.request

import numpy as np
from litdata_rows import CHUNK_BYTES, part


def main() -> None:
    source, folder, url, batch, workers = sys.argv[1:]
    import torch
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize
    from litdata.streaming import downloader as downloaders
    from litdata.streaming.resolver import Dir

    class HttpDownloader(downloaders.Downloader):
        """Streams a chunk to a temporary file and renames it."""

        def download_file(self, remote_filepath: str, local_filepath: str) -> None:
            if os.path.exists(local_filepath):
                return
            fresh = f"{local_filepath}.{os.getpid()}.tmp"
            with urllib.request.urlopen(remote_filepath) as answer, open(fresh, "wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
            os.replace(fresh, local_filepath)

    downloaders.register_downloader("http://", HttpDownloader)
    torch.set_num_threads(1)
    rows = np.load(source, mmap_mode="r")
    block = rows.shape[1]
    if not os.path.exists(f"{folder}/index.json"):
        optimize(
            fn=part,
            inputs=[(source, at, at + 8192, "uint16") for at in range(0, len(rows), 8192)],
            output_dir=folder,
            chunk_size=max(1, CHUNK_BYTES // (block * 2)) * block,
            item_loader=TokensLoader(block_size=block),
            num_workers=1,
            verbose=False,
        )
    cache = tempfile.mkdtemp(prefix="litdata-cold-")
    try:
        remote = f"{url.rpartition('/')[0]}/{os.path.basename(folder)}"
        started = time.perf_counter()
        dataset = StreamingDataset(
            Dir(path=cache, url=remote),
            item_loader=TokensLoader(block_size=block),
            shuffle=True,
            seed=1,
        )
        loader = StreamingDataLoader(dataset, batch_size=int(batch), num_workers=int(workers))
        count, first_s = 0, 0.0
        for one in loader:
            first_s = first_s or time.perf_counter() - started
            count += len(one)
        spent_s = time.perf_counter() - started
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    if count != len(rows):
        raise RuntimeError(f"{count} rows came of {len(rows)}")
    print(json.dumps({"mb_s": count * block * 2 / spent_s / 1e6, "first_s": first_s}))


if __name__ == "__main__":
    main()
