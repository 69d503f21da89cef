"""`leyden train --run`: attempts of a run, one after the other, by the rules of Slurm's jobs.

The front takes the attempt's number, keeps its logs in attempts/<n>/logs, and asks
launch/policy.py what follows: three attempts in a row without a newly committed step end the run
(93), --max-restarts bounds those with progress. Codes that a restart cannot mend are passed on.

Of several nodes the first one (the store's) leads: it writes control/launch.json before each
attempt and after the last, and the others follow it. Should it be killed its lease (front.json)
becomes void.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist.errors import SetupError
from dist.lease import Lease, holder_gone
from dist.local_files import LocalStore, write_atomic
from launch import policy
from launch.failures import failure_line, first_failure
from launch.leftovers import NODE, RUN, end_leftovers_of

# 0 done, 2 usage, 3 data, 4 environment, 75 stopped, 93 never again, 130 Ctrl-C.
FINAL = (0, 2, 3, 4, 75, 93, 130)
LOST = 4
"""Of an agent that cannot join the others: final where it leads, not where it follows."""
LOCK, STATE, DRAIN = "front.json", "control/launch.json", "control/drain"
MAX_RESTARTS = 3
POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A run that `leyden train` starts on this node, as often as it takes."""

    run: Path
    """Its folder, absolute."""
    node: str
    """Name of this node among the run's."""
    nproc: int
    max_restarts: int
    start: Callable[[list[str], dict[str, str]], tuple[int, bool]]
    """Runs the agent with more words of torchrun and more environment; its exit code, and whether
    this process was asked to stop meanwhile."""
    own_file: bool = False
    """A file of the user, which may not write what our recipes write."""
    several: bool = False
    join_timeout_s: float = 300.0


def lead(launch: Launch) -> int:
    """Run attempts until one is final; returns the exit code for `leyden train`."""
    run = launch.run
    run.mkdir(parents=True, exist_ok=True)
    try:
        with Lease(LocalStore(run), LOCK, what=f"the run {run}"):
            _end_leftovers(launch)
            code = _attempts(launch, uuid.uuid4().hex)
            _end_leftovers(launch)
            return code
    finally:
        for folder in (run / "control", run / "attempts", run):
            with suppress(OSError):
                folder.rmdir()  # only what is empty: a refused config leaves nothing behind


def _attempts(launch: Launch, launch_id: str) -> int:
    run = launch.run
    (run / DRAIN).unlink(missing_ok=True)
    restarts = 0
    while True:
        attempt = take_attempt(run)
        folder = run / "attempts" / str(attempt)
        (folder / "nodes").write_text(f"{launch.node}\n")
        policy.begin(run, attempt, launch=launch_id, NPROC=str(launch.nproc))
        if launch.several:
            _write_state(run, {"attempt": attempt, "id": launch_id})
        code, asked = _run(launch, attempt)
        final: int | None
        (folder / "ended").mkdir(exist_ok=True)
        (folder / "ended" / "0").write_text(f"{code}\n")
        if asked or code in FINAL:
            if not launch.own_file:
                _forget_unused(folder)
            final, why = code, ""
        else:
            final, why = _judge(launch, attempt, code, launch_id, restarts)
        if final is None and (run / DRAIN).exists():
            final, why = 75, "asked to stop; the same command goes on from the newest checkpoint"
        if final is not None:
            if launch.several:
                _write_state(run, {"attempt": attempt, "id": launch_id, "code": final})
            if why:
                _say(why)
            return final
        restarts += 1
        _say(f"restart {restarts} of at most {launch.max_restarts}: from the newest checkpoint")


def _judge(
    launch: Launch, attempt: int, code: int, launch_id: str, restarts: int
) -> tuple[int | None, str]:
    """(final exit code, why); None for another attempt."""
    failed = first_failure(launch.run / "attempts" / str(attempt))
    if failed:
        where = f" on {failed['node']}" if launch.several else ""
        _say(f"attempt {attempt}{where}: {failure_line(failed)}; its log: {failed['log']}")
        if launch.several and failed["node"] != launch.node:
            print("\n".join(failed["said"]), file=sys.stderr, flush=True)
    if launch.max_restarts == 0:
        return code, ""
    if restarts >= launch.max_restarts:
        return code, f"{restarts} restarts are used up (--max-restarts); the same command goes on"
    with redirect_stdout(sys.stderr):
        verdict = policy.end(launch.run, attempt, code, ending=False, launch=launch_id)
    return (None if verdict in (policy.AGAIN, policy.RETRY) else verdict), ""


def follow(launch: Launch) -> int:
    """Join attempt after attempt of the node that leads, until it says that the run is over."""
    joined: tuple[str, int] | None = None
    while True:
        state = _wait_for_state(launch, joined)
        if "code" in state:
            return int(state["code"])
        joined = (state["id"], state["attempt"])
        code, asked = _run(launch, state["attempt"])
        if asked or (code in FINAL and code != LOST):
            return code
        _say(f"attempt {state['attempt']} ended here ({code}); the first node decides what follows")


def _wait_for_state(launch: Launch, joined: tuple[str, int] | None) -> dict[str, Any]:
    """What the leading node says that is news; SetupError where it says nothing in time."""
    until = time.monotonic() + launch.join_timeout_s
    while time.monotonic() < until:
        state, lock = _read(launch.run / STATE), _read(launch.run / LOCK)
        if state and joined and state["id"] == joined[0] and "code" in state:
            return state
        alive = lock and not holder_gone(lock, time.time())
        if state and alive and "code" not in state and (state["id"], state["attempt"]) != joined:
            return state
        time.sleep(POLL_S)
    raise SetupError(
        f"no word of the first node in {launch.run} for {launch.join_timeout_s:.0f} s: start the "
        "same command there, and check that both see this folder (--run_root on a shared file "
        "system)"
    )


def _run(launch: Launch, attempt: int) -> tuple[int, bool]:
    logs = launch.run / "attempts" / str(attempt) / "logs"
    words = [f"--log-dir={logs / launch.node}", "--tee=3"]
    env = {
        RUN: str(launch.run), NODE: launch.node,
        "LEYDEN_RUN_DIR": str(launch.run), "LEYDEN_ATTEMPT": str(attempt),
        # Lines of the ranks come as they were written (launch/agent.py).
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "${role_name}",
    }  # fmt: skip
    return launch.start(words, env)


def take_attempt(run: Path) -> int:
    """The next free number, taken by mkdir."""
    attempts = run / "attempts"
    attempts.mkdir(exist_ok=True)
    (run / "control").mkdir(exist_ok=True)
    number = max((int(p.name) for p in attempts.iterdir() if p.name.isdigit()), default=-1) + 1
    while True:
        try:
            (attempts / str(number)).mkdir()
            return number
        except FileExistsError:
            number += 1


def _forget_unused(folder: Path) -> None:
    """Remove an attempt that no rank took: a refused config, or a run that was complete."""
    if (folder / "env.json").exists():
        return
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def _end_leftovers(launch: Launch) -> None:
    for line in end_leftovers_of(str(launch.run), launch.node if launch.several else ""):
        _say(f"ended what an earlier launch of this run left behind: {line}")


def _write_state(run: Path, record: dict[str, Any]) -> None:
    write_atomic(run / STATE, json.dumps(record).encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _say(text: str) -> None:
    print(f"leyden: {text}", file=sys.stderr, flush=True)


def is_own_folder(run: str) -> bool:
    """Whether `--run` names a folder that a front may write to: no URL, no file."""
    return bool(run) and "://" not in run and not os.path.isfile(run)
