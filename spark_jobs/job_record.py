"""What a job was made of: its identity, for reruns, and its provenance, for people."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec

from dist.commit import find_job, make_latest
from dist.errors import ConfigError
from dist.local_files import write_atomic
from dist.manifest import digest_of
from dist.storage import Storage
from spark_jobs.sources import InputFile

LIBRARIES = ("pyspark", "pyarrow", "numpy", "tokenizers", "kitoken", "xxhash", "fsspec")


def job_digest(
    job: str,
    transform_version: int,
    files: Sequence[InputFile],
    semantic: dict[str, Any],
) -> str:
    """Identity of a job: inputs as they are now, and all that decides the output's bytes."""
    inputs = [[file.url, file.path, file.size, file.stamp, file.format] for file in files]
    record = {"job": job, "version": transform_version, "inputs": inputs, "config": semantic}
    return digest_of(record)


def announce(job: str, output: str) -> None:
    """Say which entry of jobs/ a Slurm prep will write, so that a training can wait for that one.

    Only under `leyden prep --cluster`, which names the folder by LEYDEN_PREP_DIR.
    """
    folder = os.environ.get("LEYDEN_PREP_DIR")
    if folder:
        record = {"job_digest": job, "output": output}
        write_atomic(Path(folder) / "job.json", (json.dumps(record, indent=1) + "\n").encode())


def already_done(storage: Storage, job: str) -> str | None:
    """The data_digest of an earlier run of the same job, made LATEST; None if there is none."""
    digest = find_job(storage, job)
    if digest is not None:
        print(
            f"already done: {storage.url}@{digest[:12]} was made by the same job from the same "
            "inputs, and all its shards are there"
        )
        make_latest(storage, digest)
    return digest


def read_tokenizer(given: str) -> bytes:
    """Bytes of a tokenizer.json named by its file, its folder or a URL of either."""
    tried = [given] if given.endswith(".json") else [given.rstrip("/") + "/tokenizer.json", given]
    for url in tried:
        try:
            with fsspec.open(url, "rb") as file:
                return bytes(file.read())
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            continue
        except (ImportError, ValueError) as error:
            raise ConfigError(f"tokenizer {given}: {error}") from None
    raise ConfigError(
        f"no tokenizer at {given!r}; pass a tokenizer.json or its folder, or make one with "
        "`leyden prep train-tokenizer`"
    )


def utc(seconds: float) -> str:
    """A moment as ISO 8601 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
