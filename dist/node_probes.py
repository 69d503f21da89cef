"""What one node measures for `leyden check`: its disks, its shared memory, the data it sees."""

from __future__ import annotations

import os
import platform
import time
import uuid
from pathlib import Path
from typing import Any

from dist.dataset import open_dataset
from dist.errors import LeydenError
from dist.verify import check_presence


def probe_folder(what: str, folder: Path, mib: int) -> dict[str, Any]:
    """Free space, and the speed of a durable write and a read of `mib` MiB; never raises."""
    found: dict[str, Any] = {"what": what, "path": str(folder), "error": "", "free_bytes": 0,
                             "write_bytes_per_s": 0.0, "fsync_s": 0.0,
                             "read_bytes_per_s": 0.0}  # fmt: skip
    path = folder / f".leyden-check-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        space = os.statvfs(folder)
        found["free_bytes"] = space.f_bavail * space.f_frsize
        block = os.urandom(1 << 20)
        started = time.perf_counter()
        with open(path, "wb", buffering=0) as file:
            for _ in range(mib):
                if file.write(block) != len(block):
                    raise OSError(28, "No space left on device", str(path))
            written = time.perf_counter()
            os.fsync(file.fileno())
            durable = time.perf_counter()
            # Else the read would come from this machine's memory.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found["fsync_s"] = durable - written
        found["write_bytes_per_s"] = mib * len(block) / (durable - started)
        started = time.perf_counter()
        if path.read_bytes() != block * mib:
            raise OSError(5, "what was read is not what was written", str(path))
        found["read_bytes_per_s"] = mib * len(block) / (time.perf_counter() - started)
    except OSError as error:
        found["error"] = f"{error.strerror or error} ({folder})"
    finally:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            pass  # said above
    return found


def free_shared_memory() -> dict[str, int]:
    """Bytes free in /dev/shm; nothing where there is none."""
    try:
        space = os.statvfs("/dev/shm")
    except OSError:
        return {}
    return {"shm_free_bytes": space.f_bavail * space.f_frsize}


def data_facts(reference: str) -> dict[str, Any]:
    """The dataset as this node sees it: identity, presence and size of every shard, tokenizer."""
    found: dict[str, Any] = {"error": "", "data_digest": "", "tokenizer_digest": "", "shards": 0}
    try:
        dataset = open_dataset(reference)
        found["data_digest"] = dataset.data_digest
        found["tokenizer_digest"] = dataset.manifest.tokenizer_digest or ""
        found["shards"] = len(dataset.manifest.shards)
        check_presence(dataset)
    except (LeydenError, OSError) as error:
        found["error"] = str(error)
    return found


def sees_file(path: Path, patience_s: float = 10.0) -> bool:
    """Whether a file that another node wrote is here; NFS may take a few seconds to tell."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            os.listdir(path.parent)  # asks the server anew
        except OSError:
            pass
        if path.exists():
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def node_name() -> str:
    """What Slurm calls this node, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()
