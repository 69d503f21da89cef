"""torchrun, with two things kept that it loses: how the ranks ended, and time to drain.

`python -m launch.agent ARGS` is `python -m torch.distributed.run ARGS`: the same parser, the same
elastic agent. Torchrun turns every failure into exit code 1 behind a page of text; here the first
failing rank's own code is passed on. Torchrun kills ranks 30 s after a signal; here the signal is
passed to the ranks once, and they end when their checkpoint is written.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from launch.failures import describe_ranks, oom_kills, write_failures

PREFIX_VARIABLE = "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"
# Torch takes an empty template for none: the prefix is the role's name, which is '' then.
NO_PREFIX = "${role_name}"


def rank_processes(agent_pid: int) -> list[int]:
    """Ids of the direct children of the agent: the ranks."""
    children = Path(f"/proc/{agent_pid}/task")
    found: list[int] = []
    for task in children.iterdir():
        try:
            found += [int(word) for word in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


_received: list[int] = []


def pass_on(number: int) -> None:
    """Give the ranks SIGTERM and let the agent wait for them; without ranks, end at once."""
    _received.append(number)
    ranks = rank_processes(os.getpid())
    if not ranks:
        os._exit(128 + number)  # still importing, or waiting for the rendezvous
    for pid in ranks:
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            pass


def watch_signals() -> None:
    """Call pass_on() for SIGINT and SIGTERM from a thread of its own.

    A handler in the main thread would not run while torch waits inside its C++ code. The signals
    are not blocked instead, because the ranks would inherit that.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)

    def watch() -> None:
        while data := os.read(reader, 1):
            if data[0] in (signal.SIGINT, signal.SIGTERM):
                pass_on(data[0])

    threading.Thread(target=watch, name="signals", daemon=True).start()


def exit_code(codes: list[int]) -> int:
    """One code for the launch: the one that says most; a death by signal is 128 + n."""
    told = [128 - code if code < 0 else code for code in codes if code != 0]
    # 1 says little, and SIGTERM nothing: the agent sends it when another rank has failed.
    weight = {128 + signal.SIGTERM: 2, 1: 1}
    return min(told, key=lambda code: weight.get(code, 0), default=0)


def keep_failures(
    failures: dict[int, Any], log_dir: str | None, node: str, out_of_memory: int
) -> list[dict[str, Any]]:
    """Records of the failed ranks, the first to fail in front; kept in the attempt's folder.

    failures: global rank -> torch's ProcessFailure, of this node's ranks.
    """
    logs: dict[int, Path] = {}
    for rank, failure in failures.items():
        found = sorted(Path(log_dir or os.devnull).glob(f"*/*/{failure.local_rank}/stderr.log"))
        if found:
            logs[rank] = found[-1]
    codes = {rank: one.exitcode for rank, one in failures.items()}
    records = describe_ranks(codes, logs, out_of_memory)
    run, attempt = os.environ.get("LEYDEN_RUN_DIR", ""), os.environ.get("LEYDEN_ATTEMPT", "")
    folder = Path(run) / "attempts" / attempt
    if run and attempt and folder.is_dir():
        try:
            write_failures(folder, node or socket.gethostname(), records)
        except OSError:
            pass  # a full disk; the exit code is what counts
    return records


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun's agent on `arguments`; returns the exit code for the whole launch."""
    words = sys.argv[1:] if arguments is None else arguments
    # With SIGQUIT alone in this list the agent leaves SIGINT and SIGTERM to us.
    words = ["--signals-to-handle=SIGQUIT", *words]
    if os.environ.get(PREFIX_VARIABLE) == NO_PREFIX:
        words = ["--role=", *words]
    watch_signals()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    # Its errors repeat, in a longer form, what the rank has said itself.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic") or name == "torch.distributed.run":
            logging.getLogger(name).setLevel(logging.CRITICAL)
    options = parse_args(words)
    if options.log_dir:
        # Ranks write into files that are copied to our output: at once, not in blocks.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True, errors="replace")
    killed_before = oom_kills()
    try:
        run(options)
    except ChildFailedError as error:
        ended = {rank: failure.exitcode for rank, failure in error.failures.items()}
        code = exit_code(list(ended.values()))
        node = os.environ.get("LEYDEN_NODE") or os.environ.get("SLURMD_NODENAME", "")
        if code not in (2, 3, 75, 130):
            keep_failures(error.failures, options.log_dir, node, oom_kills() - killed_before)
        if not _received and code not in (2, 3, 4, 75, 130):
            ranks = ", ".join(f"rank {rank}: {ended[rank]}" for rank in sorted(ended))
            print(f"error: the run failed (exit codes: {ranks}); see above", file=sys.stderr)
        return code
    except RendezvousError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[:1]
        print(
            f"error: this node cannot join the others, or lost them ({''.join(reason)}); every "
            "node must resolve and reach the first one (--rdzv-endpoint)",
            file=sys.stderr,
        )
        return 4
    return 0


if __name__ == "__main__":
    sys.exit(main())
