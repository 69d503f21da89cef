"""Rows/s of any loader of batches; imported by the peers' scripts, in the peers' environments."""

import time

import numpy as np

WARM_UP = 8


def rate(loader, seconds: float) -> dict:
    """Rows/s and rows per second of this process's CPU time, over as many epochs as it takes.

    The first eight batches of each epoch and what comes before them do not count: starting
    workers again is no part of a long epoch, and an epoch of these small datasets is short.
    CPU time leaves out worker processes, so it says something of a loader without them only.
    """
    count, spent, cpu = 0, 0.0, 0.0
    while spent < seconds:
        started, cpu_started, in_epoch = time.perf_counter(), time.process_time(), 0
        for number, batch in enumerate(loader):
            if number < WARM_UP:
                started, cpu_started = time.perf_counter(), time.process_time()
                continue
            in_epoch += len(batch)
            if time.perf_counter() - started > seconds:
                break
        if not in_epoch:
            raise RuntimeError(f"an epoch has no batch after the first {WARM_UP}")
        count += in_epoch
        spent += time.perf_counter() - started
        cpu += time.process_time() - cpu_started
    return {"rows_s": count / spent, "rows_cpu_s": count / cpu}


def delivered(loader, rows: np.ndarray) -> dict:
    """What one epoch brings, against the rows that were stored.

    The first two tokens of a row are its number, low and high 16 bits. `spread` is the standard
    deviation of the row numbers in a batch over that of rows drawn from all of the data: 1 is a
    shuffle over everything, 0 is rows as they lie.
    """
    seen = np.zeros(len(rows), np.int64)
    deviations = []
    for batch in loader:
        batch = np.asarray(batch)
        low, high = batch[:, 0].astype(np.int64), batch[:, 1].astype(np.int64)
        numbers = (high << 16) + low
        if not np.array_equal(batch, rows[numbers]):
            raise RuntimeError("a row came out with other tokens than were stored")
        seen[numbers] += 1
        deviations.append(numbers.std())
    return {
        "rows_missing": int((seen == 0).sum()),
        "rows_twice": int((seen > 1).sum()),
        "dtype": str(batch.dtype),
        "spread": round(float(np.mean(deviations) / (len(rows) / np.sqrt(12))), 3),
    }
