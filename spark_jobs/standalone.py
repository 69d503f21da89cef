"""Spark's own cluster inside one Slurm allocation. Called by launch/templates/prep.sbatch.

    python -m spark_jobs.standalone conf FOLDER HEAD PEER    settings for all; prints ADDRESS PORT
    python -m spark_jobs.standalone master|worker FOLDER     in the foreground, until ended
    python -m spark_jobs.standalone wait FOLDER TIMEOUT_S PID...  until every node's worker is there
    python -m spark_jobs.standalone sweep                    end what is left on this node

FOLDER is shared by the nodes and holds a secret, so only its owner may read it: whoever speaks to
a Spark master without one can run any program as its user.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from dist.errors import SetupError, run_main
from dist.local_files import write_atomic
from spark_jobs.java import java_home

TAG = "LEYDEN_SPARK"
"""In the environment of everything that one prep job starts, executors and their Python too."""
END_S = 5.0
_MIB = 1 << 20
# Of a node's memory; the Python workers, which hold the records, need most of it.
_JVM_SHARE, _JVM_LEAST_MIB, _JVM_MOST_MIB = 4, 512, 8192
_FIRST_PORT, _PORTS, _PORTS_OF_A_JOB = 20000, 10000, 16
_LOG = """status = error
appenders = console
appender.console.type = Console
appender.console.name = console
appender.console.target = SYSTEM_ERR
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{HH:mm:ss} %p %c{1}: %m%n
rootLogger.level = warn
rootLogger.appenderRef.console.ref = console
"""


def reachable_address(
    own: str,
    peer: str,
    resolve: Callable[[str], str] = socket.gethostbyname,
    towards: Callable[[str], str] | None = None,
) -> str:
    """IPv4 address at which `peer` can reach `own`, the name of this node.

    Debian's /etc/hosts names a machine itself 127.0.1.1: a master that listens there is alone.
    Where the peer's address is no loopback one, ours is that from which it would be called.
    """
    try:
        address = resolve(own)
        other = resolve(peer) if peer != own else address
    except OSError as error:
        raise SetupError(
            f"cannot resolve the node names {own} and {peer} ({error}); Spark's nodes must find "
            "each other by name"
        ) from None
    if address.startswith("127.") and not other.startswith("127."):
        return (towards or _address_towards)(other)
    return address


def _address_towards(other: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))  # sends nothing
        return str(probe.getsockname()[0])


def free_ports(address: str, job_id: int) -> int:
    """First of a job's ports, below the ephemeral range, whose first two are free here."""
    start = job_id * _PORTS_OF_A_JOB % _PORTS
    for offset in range(0, _PORTS, _PORTS_OF_A_JOB):
        first = _FIRST_PORT + (start + offset) % _PORTS
        try:
            for port in (first, first + 1):
                with socket.socket() as one:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    one.bind((address, port))
        except OSError as error:
            if error.errno == 99:  # EADDRNOTAVAIL
                raise SetupError(f"{address} is no address of this node ({error})") from None
            continue
        return first
    raise SetupError(f"no free port from {_FIRST_PORT} to {_FIRST_PORT + _PORTS} on {address}")


def heap_mib(node_mib: int) -> int:
    """Memory of one executor's JVM on a node of `node_mib`."""
    return max(_JVM_LEAST_MIB, min(_JVM_MOST_MIB, node_mib // _JVM_SHARE))


def node_mib() -> int:
    """Memory of this node that the job may use, MiB."""
    given = os.environ.get("SLURM_MEM_PER_NODE", "0")
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _MIB
    return min(physical, int(given) if given.isdigit() and int(given) else physical)


def settings_text(address: str, first_port: int, memory_mib: int, secret: str) -> str:
    """spark-defaults.conf for master, workers and driver."""
    settings = {
        "spark.authenticate": "true",
        "spark.authenticate.secret": secret,
        "spark.driver.host": address,
        "spark.driver.bindAddress": address,
        "spark.driver.port": first_port + 4,
        "spark.blockManager.port": first_port + 5,
        "spark.port.maxRetries": 64,
        "spark.executor.memory": f"{memory_mib}m",
        "spark.ui.killEnabled": "false",
        "spark.worker.cleanup.enabled": "true",
    }
    return "".join(f"{name} {value}\n" for name, value in settings.items())


def write_conf(folder: Path, head: str, peer: str) -> tuple[str, int]:
    """Write FOLDER (mode 700); returns the master's address and port."""
    address = reachable_address(head, peer)
    port = free_ports(address, int(os.environ.get("SLURM_JOB_ID", "0")))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    (folder / "workers").mkdir()
    text = settings_text(address, port, heap_mib(node_mib()), secrets.token_hex(32))
    write_atomic(folder / "spark-defaults.conf", text.encode())
    write_atomic(folder / "log4j2.properties", _LOG.encode())
    write_atomic(folder / "master.json", json.dumps({"address": address, "port": port}).encode())
    return address, port


def daemon(kind: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """(command, environment) of the master or of this node's worker."""
    import pyspark

    master = json.loads((folder / "master.json").read_bytes())
    address, port = master["address"], master["port"]
    home = Path(os.environ.get("SPARK_HOME") or Path(pyspark.__file__).parent)
    scratch = scratch_folder()
    for name in ("local", "work"):
        (scratch / name).mkdir(exist_ok=True)
    env = {
        **os.environ,
        "JAVA_HOME": str(java_home()),
        "SPARK_HOME": str(home),
        "SPARK_CONF_DIR": str(folder),
        "SPARK_DAEMON_MEMORY": "512m",
        "SPARK_DAEMON_JAVA_OPTS": "-XX:TieredStopAtLevel=1",
        "SPARK_LOCAL_DIRS": str(scratch / "local"),
        "SPARK_WORKER_DIR": str(scratch / "work"),
        "PYSPARK_PYTHON": sys.executable,
        # Of the Python workers, which hash a shard before they publish it.
        "TMPDIR": str(scratch),
    }
    command = ["bash", str(home / "bin" / "spark-class"), f"org.apache.spark.deploy.{kind}."]
    command[-1] += kind.capitalize()
    if kind == "master":
        env["SPARK_LOCAL_IP"] = address
        return [*command, "--host", address, "--port", str(port), "--webui-port",
                str(port + 1)], env  # fmt: skip
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    own = reachable_address(node, address)
    env["SPARK_LOCAL_IP"] = own
    write_atomic(folder / "workers" / node, own.encode())
    cores = os.environ.get("SLURM_CPUS_PER_TASK") or str(len(os.sched_getaffinity(0)))
    return [*command, "--host", own, "--port", str(port + 2), "--webui-port", str(port + 3),
            "--cores", cores, "--memory", f"{max(node_mib(), heap_mib(0))}m",
            f"spark://{address}:{port}"], env  # fmt: skip


def scratch_folder() -> Path:
    """This job's folder on the node's own disk; prep.sbatch names and removes it."""
    folder = Path(os.environ["LEYDEN_SPARK_SCRATCH"])
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"cannot make {folder} on {socket.gethostname()} ({error.strerror}); set `scratch:` of "
            "the cluster file to a folder on the nodes' own disks"
        ) from None
    return folder


def run_daemon(kind: str, folder: Path) -> int:
    """Run a daemon until it ends or this process gets SIGTERM; nothing of it is left then."""
    command, env = daemon(kind, folder)
    ended: list[int] = []

    def end(number: int, _frame: object) -> None:
        ended.append(number)
        child.terminate()

    # No threads yet, so preexec_fn is safe; by it the kernel ends the JVM if we are killed.
    child = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, cwd=scratch_folder(),
        preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGTERM),
    )  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    code = child.wait()
    if kind == "worker":
        sweep(os.environ[TAG])
    return 0 if ended else code if code >= 0 else 128 - code


def sweep(tag: str) -> int:
    """End every other process on this node whose tag begins so; how many it were."""
    deadline = time.monotonic() + END_S
    count = 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = _tagged(tag)
        count = max(count, len(left))
        for pid in left:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        while _tagged(tag) and time.monotonic() < deadline:
            time.sleep(0.1)
        deadline += END_S
    return count


def _tagged(tag: str) -> list[int]:
    """Processes with the tag, but not this one and those that it runs under."""
    above, pid = set(), os.getpid()
    while pid > 1:
        above.add(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            break
    wanted = f"{TAG}={tag}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in above:
            continue
        try:
            words = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # ended meanwhile, or another user's
        if any(word.startswith(wanted) for word in words):
            found.append(int(entry.name))
    return found


def wait_for_workers(folder: Path, timeout_s: float, pids: Sequence[int]) -> int:
    """Return when every node's worker has registered; SetupError names those that have not."""
    master = json.loads((folder / "master.json").read_bytes())
    url = f"http://{master['address']}:{master['port'] + 1}/json/"
    nodes = [node for node in os.environ["LEYDEN_SPARK_NODES"].split() if node]
    deadline = time.monotonic() + timeout_s
    problem = "the master does not answer"
    while time.monotonic() < deadline:
        alive = _alive_workers(url)
        if alive is not None:
            started = {one.name: one.read_text() for one in (folder / "workers").iterdir()}
            lacking = [node for node in nodes if started.get(node) not in alive]
            if not lacking and len(alive) >= len(set(started.values())):
                print(f"Spark: {len(nodes)} workers at {url.removesuffix('/json/')}", flush=True)
                return 0
            problem = f"no worker of {', '.join(lacking)} has registered"
        gone = [pid for pid in pids if not Path(f"/proc/{pid}").exists()]
        if gone:
            raise SetupError(
                f"Spark did not start: {problem}, and its step has ended; see the logs in "
                f"{folder.parent / 'logs'}"
            )
        time.sleep(0.2)
    raise SetupError(
        f"Spark did not start: {problem} after {timeout_s:.0f} s; see the logs in "
        f"{folder.parent / 'logs'}, and raise join_timeout_s of the cluster file if nodes are slow"
    )


def _alive_workers(url: str) -> set[str] | None:
    """Hosts of registered workers; None while the master does not answer."""
    # A cluster's http_proxy must not be asked for a node of it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            said = json.load(answer)
    except (OSError, ValueError, urllib.error.URLError):
        return None
    return {one["host"] for one in said.get("workers", []) if one.get("state") == "ALIVE"}


def command_line(words: Sequence[str]) -> int:
    """What prep.sbatch asks for."""
    verb, *rest = words
    if verb == "conf":
        address, port = write_conf(Path(rest[0]), rest[1], rest[2])
        print(address, port)
        return 0
    if verb in ("master", "worker"):
        return run_daemon(verb, Path(rest[0]))
    if verb == "wait":
        return wait_for_workers(Path(rest[0]), float(rest[1]), [int(pid) for pid in rest[2:]])
    if verb == "sweep":
        # JOB.NODE.sweep: everything of the job on this node.
        sweep(os.environ[TAG].rpartition(".")[0] + ".")
        shutil.rmtree(scratch_folder(), ignore_errors=True)
        return 0
    raise ValueError(f"not a command of spark_jobs.standalone: {verb!r}")


if __name__ == "__main__":
    run_main(lambda: command_line(sys.argv[1:]))
