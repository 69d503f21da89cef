"""submit.json: every `leyden submit` of a run, newest last, and one submit at a time.

{"submits": [{"id", "time", "job_ids", "script", "arguments", "cwd", "code", "commit", "dirty",
"user", "host"}]}; the scripts lie beside it in submits/<id>.sbatch.
"""

from __future__ import annotations

import getpass
import json
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist.errors import SetupError
from dist.lease import Lease
from dist.local_files import LocalStore, write_atomic
from launch.snapshot import Code

RECORD = "submit.json"


@dataclass(frozen=True, kw_only=True)
class Submit:
    """One `leyden submit`."""

    id: str
    time: float
    arguments: tuple[str, ...]
    cwd: str
    code: str
    commit: str
    dirty: bool
    user: str
    host: str
    job_ids: tuple[str, ...] = ()
    job_name: str = ""
    """Of an array, whose tasks share it; '' for the name that the run's folder gives."""
    values: tuple[str, ...] = ()
    """KEY=VALUE that a sweep gives this run."""

    @classmethod
    def new(
        cls, *, words: list[str], cwd: str, code: Code, text: str, job_name: str = ""
    ) -> Submit:  # fmt: skip
        """A record of this moment."""
        return cls(
            job_name=job_name, id=time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:6],
            time=time.time(), arguments=tuple(words), cwd=cwd, code=code.path,
            commit=code.commit, dirty=code.dirty, user=getpass.getuser(),
            host=socket.gethostname(),
        )  # fmt: skip


def read_submits(run: Path) -> list[dict[str, Any]]:
    """All submits of a run, oldest first; [] for a run that was never submitted."""
    try:
        record = json.loads((run / RECORD).read_bytes())
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise SetupError(f"{run / RECORD} is not JSON ({error}); was it edited?") from None
    return [one for one in record.get("submits", []) if isinstance(one, dict)]


def add_submit(run: Path, submit: Submit, text: str) -> Path:
    """Write or rewrite one submit's record and script; returns the script's path."""
    script = run / "submits" / f"{submit.id}.sbatch"
    if not script.exists():
        write_atomic(script, text.encode())
    others = [one for one in read_submits(run) if one.get("id") != submit.id]
    record = {"submits": [*others, {**asdict(submit), "script": str(script)}]}
    write_atomic(run / RECORD, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
    return script


def submitting(run: Path) -> Lease:
    """One `leyden submit` to a run at a time; SetupError names the other one."""
    return Lease(LocalStore(run), "submit.lock", what=f"submitting {run}")
