"""Several nodes without Slurm: `leyden train --nnodes N --rdzv HOST:PORT` on each of them.

The nodes meet at HOST:PORT, where the first one (--node-rank 0, or the one that HOST is an address
of) opens torchrun's store. Whatever would make N worlds of one out of N nodes is refused here: a
head that each node takes for itself, or a name that some node cannot resolve. LEYDEN_NUM_RANKS
tells the ranks how many they must be (dist/ranks.py).
"""

from __future__ import annotations

import hashlib
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from dist.errors import ConfigError, SetupError

EPHEMERAL_RANGE = "/proc/sys/net/ipv4/ip_local_port_range"
JOIN_TIMEOUT_S = 300
LAST_CALL_S = 30
"""How long MIN nodes wait for more of them."""
_OWN_NAMES = ("localhost", "ip6-localhost", "127.0.0.1", "::1", "0.0.0.0", "::")


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Where this node meets the others, and how many there must be."""

    least: int
    most: int
    host: str
    port: int
    is_host: bool
    local_addr: str
    """Under which the other nodes reach this one."""
    rdzv_id: str
    """The same on all nodes of a run, and of no other run."""
    join_timeout_s: int = JOIN_TIMEOUT_S

    def options(self) -> list[str]:
        """Words of torchrun."""
        nnodes = str(self.most) if self.least == self.most else f"{self.least}:{self.most}"
        endpoint = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        conf = {
            "is_host": int(self.is_host),
            "join_timeout": self.join_timeout_s,
            "read_timeout": self.join_timeout_s,
        }
        if self.least != self.most:
            conf["last_call_timeout"] = LAST_CALL_S
        return [
            f"--nnodes={nnodes}", "--rdzv-backend=c10d", f"--rdzv-id={self.rdzv_id}",
            f"--rdzv-endpoint={endpoint}",
            "--rdzv-conf=" + ",".join(f"{name}={value}" for name, value in conf.items()),
            f"--local-addr={self.local_addr}",
        ]  # fmt: skip

    def num_ranks(self, nproc: int) -> str:
        """For LEYDEN_NUM_RANKS."""
        few, many = self.least * nproc, self.most * nproc
        return str(many) if few == many else f"{few}:{many}"


@dataclass
class NodeOptions:
    """What the command line says of nodes, as typed."""

    nnodes: str = "1"
    rdzv: str = ""
    rdzv_id: str = ""
    node_rank: str = ""
    local_addr: str = ""
    join_timeout: str = str(JOIN_TIMEOUT_S)


def find_nodes(
    asked: NodeOptions, *, run: str, target: str, only_text: bool = False
) -> Nodes | None:  # fmt: skip
    """Check the options; None for a single node. ConfigError and SetupError say what to give.

    only_text: for a dry run, whatever this machine's ports and routes are.
    """
    least, most = parse_nnodes(asked.nnodes)
    if most == 1:
        return None
    if not asked.rdzv:
        raise ConfigError(
            f"--nnodes {asked.nnodes} needs --rdzv HOST:PORT: a name or address of the first node "
            "that all nodes reach, and a free port below 32768, the same on every node"
        )
    host, port = parse_rdzv(asked.rdzv)
    addresses = resolve(host)
    if not asked.join_timeout.isdigit() or int(asked.join_timeout) < 1:
        raise ConfigError(f"--join-timeout {asked.join_timeout!r} is not a number of seconds")
    if asked.node_rank and not (asked.node_rank.isdigit() and int(asked.node_rank) < most):
        raise ConfigError(f"--node-rank {asked.node_rank!r} is not one of 0 to {most - 1}")
    mine = any(is_mine(address) for address in addresses)
    is_host = asked.node_rank == "0" if asked.node_rank else mine
    if is_host and not mine:
        raise ConfigError(
            f"--node-rank 0 on {socket.gethostname()}, but {host} ({addresses[0]}) is no address "
            "of this node; give --rdzv this node's name, on every node"
        )
    if is_host and not only_text:
        refuse_busy(addresses[0], port)
    local_addr = asked.local_addr or (host if is_host else "")
    if not local_addr:
        try:
            local_addr = outgoing_address(addresses[0], port)
        except SetupError:
            if not only_text:
                raise
            local_addr = socket.gethostname()
    return Nodes(
        least=least, most=most, host=host, port=port, is_host=is_host, local_addr=local_addr,
        rdzv_id=asked.rdzv_id or default_id(run, target, port),
        join_timeout_s=int(asked.join_timeout),
    )  # fmt: skip


def parse_nnodes(text: str) -> tuple[int, int]:
    """(MIN, MAX) of N or MIN:MAX."""
    match = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if least > most:
        raise ConfigError(f"--nnodes {text!r} is not a number of nodes: give N, or MIN:MAX")
    return least, most


def parse_rdzv(text: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT or [IPV6]:PORT, refused where it cannot be a meeting point."""
    match = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]]+)):(\d{1,5})", text)
    if not match:
        raise ConfigError(f"--rdzv {text!r} is not HOST:PORT, such as node1:29500")
    host, port = match[1] or match[2], int(match[3])
    first, last = ephemeral_ports()
    if not 1024 <= port <= 65535 or first <= port <= last:
        raise ConfigError(
            f"--rdzv port {port}: give one from 1024 to {min(first, 32768) - 1}; those from "
            f"{first} to {last} are given to any program that opens a connection"
        )
    if host.lower() in _OWN_NAMES:
        raise ConfigError(
            f"--rdzv {host}: every node would take itself for the first one; give the first "
            "node's name or address as the other nodes know it (`hostname -f`, `ip address`)"
        )
    return host, port


def ephemeral_ports() -> tuple[int, int]:
    """First and last port that this machine gives to outgoing connections."""
    try:
        first, last = Path(EPHEMERAL_RANGE).read_text().split()
        return int(first), int(last)
    except (OSError, ValueError):
        return 32768, 60999


def resolve(host: str) -> list[str]:
    """Addresses of a host. A *name* that means this machine alone is refused; an address in
    127.0.0.0/8 is not (several nodes on one machine, for a test)."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SetupError(
            f"--rdzv {host} cannot be resolved on {socket.gethostname()} ({error.strerror}); give "
            "the first node's address instead (`ip address` there shows it)"
        ) from None
    addresses = [str(one[4][0]) for one in found]
    if host not in addresses and all(_is_loopback(address) for address in addresses):
        raise SetupError(
            f"--rdzv {host} is {addresses[0]} on {socket.gethostname()}, which no other node "
            "reaches (see /etc/hosts); give the address by which they do (`ip address`)"
        )
    return addresses


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def is_mine(address: str) -> bool:
    """Whether this machine has the address: only then may a socket be bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as one:
        try:
            one.bind((address, 0))
        except OSError:
            return False
    return True


def refuse_busy(address: str, port: int) -> None:
    """SetupError if the port of this node is taken; torchrun would wait for minutes."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((address, port))
        except OSError as error:
            raise SetupError(
                f"--rdzv port {port} of {address} cannot be opened ({error.strerror}): another "
                "program, or another run, has it; give another port on every node"
            ) from None


def outgoing_address(address: str, port: int) -> str:
    """This node's own address on the way to the first node; nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as one:
        try:
            one.connect((address, port))
        except OSError as error:
            raise SetupError(f"no way from this node to {address} ({error.strerror})") from None
        return str(one.getsockname()[0])


def default_id(run: str, target: str, port: int) -> str:
    """Of the run's folder; without one, of what is started and where it meets."""
    key = run or f"{target}:{port}"
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(key).name).strip("-.")[:40] or "run"
    return f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
