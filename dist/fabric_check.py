"""Is this allocation fit to train on? Every rank measures, rank 0 judges and prints one table.

    torchrun --nproc-per-node 2 -m dist.fabric_check --run-root runs --scratch /tmp
    srun ... python -m dist.fabric_check ...     as `leyden check --cluster FILE` does it

Exit code 0: fit, 1: a row says fail, 4: the ranks did not find each other.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import re
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dist.errors import SetupError, run_main
from dist.fabric_probes import (
    clock_offset,
    device_facts,
    measure_pairs,
    members_of_pairs,
    reduce_check,
    version_facts,
)
from dist.fabric_rows import Row, record_of, table_text
from dist.fabric_verdicts import judge
from dist.node_probes import data_facts, free_shared_memory, node_name, probe_folder, sees_file
from dist.ranks import Ranks

MARK = "leyden-check "
"""Begins the one line of --json, which `module load` or srun may surround by others."""
_FIRST_PORT, _PORTS = 20000, 10000


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to look at."""

    run_root: str = "runs"
    scratch: str = ""
    """A folder on the node's own disk; empty: the temporary folder."""
    data: str = ""
    """Dataset reference; empty for none."""
    expected: Mapping[str, str] = field(default_factory=dict)
    """data_digest and tokenizer_digest of the run that is to go on."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    """needed_gib, checkpoint_bytes, ranks, strategy, keep; or error."""
    disk_mib: int = 64
    pair_mib: float = 4.0


def gather_facts(
    options: Options, ranks: Ranks, device: torch.device, clock: Callable[[], float] = time.time
) -> list[dict[str, Any]]:
    """Every rank's measurements, in the order of ranks, on every rank. A collective."""
    control = torch.distributed.new_group(backend="gloo")
    first_of_node = ranks.local_rank == 0
    facts: dict[str, Any] = {
        "rank": ranks.rank, "node": node_name(), "local_rank": ranks.local_rank,
        "local_world_size": ranks.local_world_size,
        "device": device_facts(ranks.local_rank, ranks.local_world_size),
        "versions": version_facts(),
    }  # fmt: skip
    local_ranks: list[Any] = [None] * ranks.world_size
    torch.distributed.all_gather_object(local_ranks, ranks.local_rank, group=control)
    facts["all_reduce"] = reduce_check(device)
    # gloo's messages are smaller: a laptop's loopback is no network.
    elements = int(options.pair_mib * (16 if device.type == "cuda" else 1) * (1 << 17))
    facts["pairs"] = measure_pairs(device, members_of_pairs(local_ranks), elements)
    facts["clock"] = clock_offset(control, clock)
    torch.distributed.barrier(group=control)
    facts["disks"] = []
    if first_of_node:
        places = [("run_root", Path(options.run_root))]
        places.append(("scratch", Path(options.scratch or tempfile.gettempdir())))
        facts["disks"] = [probe_folder(what, path, options.disk_mib) for what, path in places]
        facts |= free_shared_memory()
        if options.data:
            facts["data"] = data_facts(options.data)
    facts["sees_run_root"] = _sees_run_root(Path(options.run_root), ranks, control)
    gathered: list[Any] = [None] * ranks.world_size
    torch.distributed.all_gather_object(gathered, facts, group=control)
    return gathered


def _sees_run_root(run_root: Path, ranks: Ranks, control: Any) -> bool | None:
    """Whether this node sees a file that rank 0 wrote; None where that is not asked."""
    token: list[Any] = [None]
    if ranks.is_first:
        path = run_root / f".leyden-check-{uuid.uuid4().hex}"
        try:
            path.write_text(node_name())
            token = [str(path)]
        except OSError:
            token = [""]  # the row of the disk says why
    torch.distributed.broadcast_object_list(token, 0, group=control)
    seen = None
    if token[0] and ranks.local_rank == 0:
        seen = sees_file(Path(token[0]))
    torch.distributed.barrier(group=control)
    if token[0] and ranks.is_first:
        Path(token[0]).unlink(missing_ok=True)
    return seen


def judged(options: Options, facts: list[dict[str, Any]]) -> list[Row]:
    """The rows of the table."""
    return judge(facts, run_root=options.run_root, expected=options.expected, plan=options.plan)


def first_host(nodelist: str) -> str:
    """First node of Slurm's list, as in `n[01-04,7],m3`, without asking scontrol for it."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodelist)
    return (found[1] + (found[2] or "") + (found[3] or "")) if found else ""


def join(ranks: Ranks, timeout_s: float, environ: Mapping[str, str] = os.environ) -> torch.device:
    """Make the default process group; SetupError names the ranks that did not come."""
    backend, device = "gloo", torch.device("cpu")
    if torch.cuda.is_available():
        backend, device = "nccl", torch.device("cuda", ranks.local_rank)
        if ranks.local_rank >= torch.cuda.device_count():
            raise SetupError(
                f"rank {ranks.rank} on {node_name()} has no device: {ranks.local_world_size} ranks "
                f"a node, {torch.cuda.device_count()} devices; set gpus_per_node or --nproc"
            )
        torch.cuda.set_device(device)
    timeout = dt.timedelta(seconds=timeout_s)
    if "TORCHELASTIC_RUN_ID" in environ:
        torch.distributed.init_process_group(backend, timeout=timeout)
        return device
    head = environ.get("MASTER_ADDR") or first_host(
        environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    )
    numbers = (int(environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = int(environ.get("MASTER_PORT") or _FIRST_PORT + sum(7 * n for n in numbers) % _PORTS)
    if not head and ranks.world_size > 1:
        raise SetupError("no MASTER_ADDR and no Slurm step: start it by torchrun or srun")
    try:
        store = torch.distributed.TCPStore(
            head or "127.0.0.1", port, ranks.world_size, ranks.is_first, timeout,
            wait_for_workers=False,
        )  # fmt: skip
        store.set(f"here/{ranks.rank}", f"{node_name()} as {socket.gethostname()}")
    except (RuntimeError, ValueError) as error:
        raise SetupError(
            f"rank {ranks.rank} on {node_name()} does not reach {head}:{port} ({_short(error)}); "
            "do the nodes resolve each other's names, and may they open ports from 20000?"
        ) from None
    if ranks.is_first:
        _await_all(store, ranks.world_size, timeout_s)
    torch.distributed.init_process_group(
        backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout
    )
    return device


def _await_all(store: Any, world_size: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    absent = list(range(world_size))
    while absent:
        absent = [rank for rank in absent if not store.check([f"here/{rank}"])]
        if absent and time.monotonic() > deadline:
            raise SetupError(
                f"ranks {absent[:8]} of {world_size} did not come within {timeout_s:.0f} s: their "
                "nodes did not start them, or cannot reach this one; raise join_timeout_s?"
            )
        time.sleep(0.05)


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else repr(error)


def parse(words: list[str] | None = None) -> tuple[Options, argparse.Namespace]:
    """The command line, which launch/check_live.py writes."""
    parser = argparse.ArgumentParser(prog="python -m dist.fabric_check", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)  # fmt: skip
    parser.add_argument("--run-root", default="runs")
    parser.add_argument("--scratch", default="")
    parser.add_argument("--data", default="")
    parser.add_argument("--expected", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--plan", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--disk-mib", type=int, default=64)
    parser.add_argument("--join-timeout-s", type=float, default=300.0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(words)
    options = Options(
        run_root=given.run_root, scratch=given.scratch, data=given.data,
        expected=given.expected, plan=given.plan, disk_mib=given.disk_mib,
    )  # fmt: skip
    return options, given


def main() -> int:
    """Check, print on rank 0, and end with the same code on every rank."""
    options, given = parse()
    ranks = Ranks.from_environment()
    device = join(ranks, given.join_timeout_s)
    try:
        facts = gather_facts(options, ranks, device)
    except RuntimeError as error:
        raise SetupError(
            f"rank {ranks.rank} on {node_name()}: a collective failed ({_short(error)}); another "
            "rank has ended, or the network lets ranks meet but not talk"
        ) from error
    rows = judged(options, facts)
    record = record_of(rows, facts)
    if ranks.is_first:
        print(MARK + json.dumps(record) if given.json else table_text(rows), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # The reader of --json judges by the record, and a launcher would report a 1 as a crash.
    return 0 if record["ok"] or given.json else 1


if __name__ == "__main__":
    run_main(main)
