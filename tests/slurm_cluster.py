"""A real Slurm on this machine for tests: munged, slurmctld and four slurmd with host names r1-r4.

Each node lives in its own UTS and mount namespace, so `hostname` and /etc/hosts say what they
would on a cluster, and code that looks for the head node by name is really tested. Nothing of the
machine's own Slurm is touched: ports, key, spool and log lie in one temporary folder.

Traps (Slurm 22.05): `CgroupPlugin=disabled` is refused, so there is no cgroup.conf; a requeued job
waits for `cred_expire`, 120 s by default, 11 s as it is set here; and with ReturnToService=2 a node
that a test sets down is back after 40 ms, because its slurmd lives and answers.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
NODES = ("r1", "r2", "r3", "r4")
CPUS_PER_NODE = 2
TAG = "LEYDEN_TEST_SLURM"
PROGRAMS = ("slurmctld", "slurmd", "munged", "unshare", "sbatch", "srun", "scontrol", "squeue")
CONF = """\
ClusterName=leyden
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
SchedulerParameters=sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=5
MinJobAge=3600
ReturnToService=0
SlurmdTimeout=15
NodeName=DEFAULT CPUs={cpus} RealMemory=1500
NodeName=r[1-4] NodeHostname=localhost Port=[{node_port}-{last_node_port}]
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=30 State=UP
PartitionName=hi Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""
# Ends the daemon when the test process dies, however it dies.
_EXEC = (
    "import ctypes, os, sys\nctypes.CDLL(None).prctl(1, 9)\nos.execvp(sys.argv[1], sys.argv[1:])\n"
)


def missing() -> str:
    """Why no cluster can be started here; '' if one can."""
    absent = [name for name in PROGRAMS if _program(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: slurm-wlm, munge)"
    if os.geteuid() != 0:
        return "slurmd -N in namespaces of its own needs root"
    probe = subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True, text=True)
    return "" if probe.returncode == 0 else f"unshare: {probe.stderr.strip()}"


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_ports(count: int) -> int:
    """First of `count` free neighbouring ports, below those that runs take (20000 and up)."""
    for first in range(11000 + os.getpid() % 1000 * 8, 19990, count):
        sockets = []
        try:
            for port in range(first, first + count):
                one = socket.socket()
                sockets.append(one)
                one.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise RuntimeError("no free ports")


def wait_for(condition: Callable[[], T], timeout_s: float, what: str) -> T:
    """The first true value of `condition`; TimeoutError naming `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(0.1)
    return value


class Cluster:
    """The running daemons; `env` is what Slurm's commands need to find them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {"SLURM_CONF": str(folder / "slurm.conf"), TAG: folder.name}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def command(self, *words: str, check: bool = True) -> str:
        """Output of one of Slurm's commands."""
        done = subprocess.run(
            words, env={**os.environ, **self.env}, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{words}: {done.stderr.strip()}")
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        words = self.command("scontrol", "show", "job", "-o", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job_id: str) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, ..."""
        return self.job(job_id)["JobState"]

    def ended(self, job_id: str) -> bool:
        return self.state(job_id) in (
            *{"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"},
            "OUT_OF_MEMORY",
        )

    def resume_nodes(self) -> None:
        """All nodes usable again."""
        self.command(
            "scontrol", "update", f"nodename={','.join(NODES)}", "state=resume", check=False
        )
        wait_for(lambda: self._idle(0), 30, "nodes back")

    def _idle(self, at_least: int = len(NODES)) -> bool:
        said = self.command("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split()
        usable = [word for word in said if word in ("idle", "mixed", "allocated")]
        return len(usable) == len(NODES) if at_least else "down" not in " ".join(said)

    def start(self) -> None:
        for name in ("munge", "state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        first = _free_ports(1 + len(NODES))
        (self.folder / "slurm.conf").write_text(
            CONF.format(
                host=socket.gethostname(),
                folder=self.folder,
                cpus=CPUS_PER_NODE,
                controller_port=first,
                node_port=first + 1,
                last_node_port=first + len(NODES),
            )  # fmt: skip
        )
        hosts = "127.0.0.1 localhost\n" + f"127.0.0.1 {socket.gethostname()}\n"
        hosts += "".join(f"127.0.1.{i} {node}\n" for i, node in enumerate(NODES, 1))
        (self.folder / "hosts").write_text(hosts)
        munge = self.folder / "munge"
        self._spawn(
            "munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={key}",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        wait_for((munge / "socket").exists, 10, "munged")
        self._spawn("slurmctld", "-D", "-f", self.env["SLURM_CONF"])
        for node in NODES:
            inner = (
                f'hostname {node} && mount --bind "$0" /etc/hosts && '
                f'exec "$1" -D -N {node} -f "$SLURM_CONF"'
            )
            slurmd = _program("slurmd") or "slurmd"
            words = ("bash", "-c", inner, str(self.folder / "hosts"), slurmd)
            self._spawn("unshare", "--uts", "--mount", *words)
        wait_for(self._idle, 30, f"nodes idle (logs in {self.folder})")

    def _spawn(self, name: str, *words: str) -> None:
        argv = [sys.executable, "-I", "-S", "-c", _EXEC, _program(name) or name, *words]
        log = open(self.folder / f"{name}.out", "ab")  # noqa: SIM115
        self._daemons.append(
            subprocess.Popen(
                argv,
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
            )  # fmt: skip
        )

    def stop(self) -> None:
        """Cancel every job, then end the daemons and whatever carries this cluster's tag."""
        self.command("scancel", "--user=root", check=False)
        try:
            wait_for(lambda: not self.command("squeue", "-h", check=False).strip(), 15, "jobs")
        except TimeoutError:
            pass  # ended below
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in tagged(f"{TAG}={self.folder.name}"):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def tagged(setting: str) -> list[int]:
    """Live processes, zombies left out, whose environment holds `NAME=value`."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if setting.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue  # ended meanwhile
    return found


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster that is gone, with all its processes, when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="leyden-slurm-"))
    folder.chmod(0o755)
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
