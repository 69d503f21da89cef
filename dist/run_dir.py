"""The run directory: the run's identity across restarts, jobs and machines.

run.json        run id, recipe, dataset pinned by digest, config digest; written once
config.yaml     the resolved config of the newest attempt
attempts/<n>/   env.json, config.yaml, outcome.json of one start (n by atomic mkdir)
checkpoints/    step-<n>-a<attempt>/, or elsewhere: <checkpoint_url>/<run id>/
outcome.json    outcome of the newest attempt that ended
*.jsonl         consumed, metrics, ledger: one line an event
lease.json      who writes here now
"""

from __future__ import annotations

import os
import platform
import re
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist import strict_json
from dist.errors import ConfigError, SetupError
from dist.lease import Lease
from dist.local_files import LocalStore, append_line, write_atomic
from dist.url_path import Place, place_of
from dist.versions import code_version, library_versions

STATUSES = ("completed", "stopped", "failed", "data_refused", "hung", "no_restart")
# Only what tells how a run was started; an environment may hold secrets.
_ENV_PREFIXES = ("SLURM_", "TORCH", "NCCL_", "GLOO_", "CUDA_", "OMP_", "MASTER_", "LEYDEN_")
_ENV_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
LIBRARIES = ("torch", "pytorch-lightning", "transformers", "numpy", "pyarrow", "fsspec")
MAX_WAITING_LINES = 1_000_000
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # a Path has lost the second slash


class RunDir:
    """A run's folder; every write is atomic or one appended line.

    Lines that the disk refuses wait in memory, for flush() or the next append. Threads may share
    it, and a copy in another process (pickled) has lines of its own.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._waiting: list[tuple[str, str]] = []
        self._unsynced: set[str] = set()

    def __reduce__(self) -> tuple[type[RunDir], tuple[Path]]:
        return RunDir, (self.path,)

    @classmethod
    def open(cls, path: Path | str) -> RunDir:
        """The run at `path`, created if absent. It has a lease and appends, so no object store."""
        if match := _SCHEME.match(str(path)):
            url = f"{match[1]}://{str(path)[match.end() :].lstrip('/')}"
            raise ConfigError(
                f"the run {url} is a URL; a run's folder needs a file system that all ranks see. "
                "Give --run and --run_root a folder; checkpoints alone can go to an object store: "
                f"--checkpoint_url {url}"
            )
        run = cls(path)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ConfigError(f"the run {path} is a file, not a folder") from None
        return run

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Place:
        """The folder of this run's checkpoints, as run.json says."""
        identity = self.read_run() or {}
        url = identity.get("checkpoint_url")
        # Several runs may name the same folder in one YAML: each has its own in it.
        return place_of(url) / identity["run_id"] if url else self.path / "checkpoints"

    def read_run(self) -> dict[str, Any] | None:
        """The run's identity, or None for a new run."""
        return self._read("run.json")

    def write_run(self, record: dict[str, Any], config_yaml: str) -> None:
        """Write the identity of a new run; `run_id` and `created` are added."""
        identity = {"run_id": f"{self.name}-{uuid.uuid4().hex[:8]}", "created": time.time()}
        self.write("config.yaml", config_yaml.encode())
        self.write("run.json", _json({**identity, **record}))

    def new_attempt(self, config_yaml: str = "") -> int:
        """Take the next free attempt number (from 0) by an atomic mkdir; writes its env.json.

        A Slurm job has taken its number already (launch/templates/train.sbatch).
        """
        attempts = self.path / "attempts"
        attempts.mkdir(parents=True, exist_ok=True)
        taken = launched_attempt(self.path)
        if taken is not None and (attempts / str(taken) / "env.json").exists():
            taken = None
        number = max((int(p.name) for p in attempts.iterdir() if p.name.isdigit()), default=-1) + 1
        while taken is None:
            try:
                (attempts / str(number)).mkdir()
                break
            except FileExistsError:
                number += 1
        number = number if taken is None else taken
        self.write(f"attempts/{number}/env.json", _json(_environment()))
        if config_yaml:
            self.write(f"attempts/{number}/config.yaml", config_yaml.encode())
            self.write("config.yaml", config_yaml.encode())
        return number

    def attempt_dir(self, attempt: int) -> Path:
        return self.path / "attempts" / str(attempt)

    def lease(self, attempt: int, job_id: str = "") -> Lease:
        """One writer of a run at a time; a second one raises SetupError naming the first."""
        job_id = job_id or os.environ.get("SLURM_JOB_ID", "")
        what = f"the run {self.path}"
        return Lease(LocalStore(self.path), "lease.json", what=what, job_id=job_id, attempt=attempt)

    def write_outcome(self, attempt: int, status: str, **facts: Any) -> None:
        """Say how an attempt ended, in its folder and at the top of the run."""
        if status not in STATUSES:
            raise ValueError(f"outcome {status!r} is none of {STATUSES}")
        job_id = os.environ.get("SLURM_JOB_ID", "")
        record = {"status": status, "attempt": attempt, "job_id": job_id, "time": time.time()}
        data = _json({**record, **facts})
        self.write(f"attempts/{attempt}/outcome.json", data)
        self.write("outcome.json", data)

    def read_outcome(self) -> dict[str, Any] | None:
        """How the newest ended attempt ended; None while none has."""
        return self._read("outcome.json")

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Append one JSON line to a log of the run; where the disk refuses, it waits in memory.

        Raises SetupError when too many wait.
        """
        with self._lock:
            told = bool(self._waiting)
            self._waiting.append((name, strict_json.dumps(record)))
            try:
                self._write_waiting()
            except OSError as error:
                if len(self._waiting) > MAX_WAITING_LINES:
                    raise SetupError(
                        f"{len(self._waiting)} lines wait to be written to {self.path}: "
                        f"{error.strerror}; make room, then give the same command again"
                    ) from error
                if not told:
                    print(
                        f"warning: {self.path / name}: {error.strerror}; its lines wait in memory, "
                        "at most until max_failed_saves saves have failed by that",
                        file=sys.stderr,
                    )

    def flush(self) -> None:
        """Make all appended lines durable; OSError if the disk refuses, and they go on waiting."""
        with self._lock:
            self._write_waiting()
            names, self._unsynced = self._unsynced, set()
        # Without the lock: a step's append must not wait for a slow disk.
        for name in sorted(names):
            with suppress(FileNotFoundError), open(self.path / name, "rb") as file:
                os.fsync(file.fileno())

    def _write_waiting(self) -> None:
        while self._waiting:
            name, line = self._waiting[0]
            append_line(self.path / name, line)
            self._unsynced.add(name)
            del self._waiting[0]

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """All records of a log; lines torn by a kill are left out."""
        try:
            lines = (self.path / name).read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        records = []
        for line in filter(None, lines):
            try:
                records.append(strict_json.loads(line))
            except ValueError:
                continue  # torn by a kill; append() starts the next record on a new line
        return records

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the run atomically; a full disk or a read-only folder is said so."""
        try:
            write_atomic(self.path / name, data)
        except OSError as error:
            raise SetupError(f"cannot write {self.path / name}: {error.strerror}") from error

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            record = strict_json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise SetupError(f"{self.path / name} is not JSON ({error}); was it edited?") from None
        return record if isinstance(record, dict) else None


def launched_attempt(run: Path) -> int | None:
    """The attempt of `run` that the job has taken for its ranks; None outside of such a job."""
    number = os.environ.get("LEYDEN_ATTEMPT", "")
    folder = os.environ.get("LEYDEN_RUN_DIR", "")
    if not number.isdigit() or not folder or Path(folder).resolve() != run.resolve():
        return None
    return int(number) if (run / "attempts" / number).is_dir() else None


def _json(record: dict[str, Any]) -> bytes:
    return (strict_json.dumps(record, indent=1, sort_keys=True) + "\n").encode()


def _environment() -> dict[str, Any]:
    chosen = {
        name: value
        for name, value in sorted(os.environ.items())
        if name in _ENV_NAMES or name.startswith(_ENV_PREFIXES)
    }
    return {
        "time": time.time(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "argv": sys.argv,
        "code": code_version(),
        "libraries": library_versions(LIBRARIES),
        "cwd": os.getcwd(),
        "environment": chosen,
    }
