"""cluster.yaml: what one cluster wants to hear in every job, checked key by key."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist.errors import ConfigError, SetupError
from launch.cli import nearest


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One cluster, or one partition of it, as cluster.yaml describes it."""

    partition: str = ""
    """--partition; empty: the cluster's default."""
    account: str = ""
    """--account; empty: the user's default."""
    nodes: int = 1
    """Nodes of a job (`submit --nodes` goes before)."""
    gpus_per_node: int = 0
    """GPUs of a node, and its ranks unless `submit --nproc` says otherwise; 0: a CPU cluster."""
    cpus_per_task: int = 1
    """CPU cores of one rank."""
    mem_gib: int = 0
    """Memory of a node in GiB; 0: as the partition gives."""
    time_limit_min: int = 60
    """Wall time of one job in minutes; the run goes on in the next."""
    exclusive: bool = False
    """Whole nodes."""
    setup: tuple[str, ...] = ()
    """Shell lines run on the first node before anything else; srun passes their exports on."""
    run_root: str = ""
    """Where runs lie, seen by every node; empty: runs/ of the current folder."""
    exclude: tuple[str, ...] = ()
    """Nodes never to be used."""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, such as --qos=high."""
    python: str = ""
    """The interpreter on the nodes; empty: the one that runs `leyden submit`."""
    join_timeout_s: int = 300
    """How long the nodes wait for each other at the start."""
    lead_s: int = 0
    """Seconds before the time limit at which a job is told to stop; 0: from measured saves."""
    scratch: str = ""
    """Folder on the nodes' own disks for prep jobs and checks; empty: a node's $TMPDIR or /tmp."""
    chain_jobs: int = 4
    """Jobs of one submit with --chain singleton."""


def load_cluster(path: Path) -> Cluster:
    """Parse a cluster.yaml; ConfigError names the key, its nearest and the type it must have.

    Nodes that `leyden check` found at fault lie beside it, in cluster.exclude, one a line.
    """
    try:
        import yaml
    except ImportError:
        raise SetupError("reading cluster.yaml needs PyYAML; run `make setup`") from None
    try:
        record = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no cluster file {path}; pass --cluster FILE.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if record is None:
        record = {}
    if not isinstance(record, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, not a {type(record).__name__}")
    cluster = parse_cluster(record, str(path))
    failed = path.with_suffix(".exclude")
    if failed.is_file():
        new = tuple(node for node in failed.read_text().split() if node not in cluster.exclude)
        cluster = dataclasses.replace(cluster, exclude=cluster.exclude + new)
    return cluster


def parse_cluster(record: dict[str, Any], where: str) -> Cluster:
    """Build a Cluster of parsed YAML; `where` names the file in errors."""
    hints = typing.get_type_hints(Cluster)
    values: dict[str, Any] = {}
    for key, value in record.items():
        if key not in hints:
            raise ConfigError(
                f"{where}: unknown key {key!r}{nearest(str(key), list(hints))} "
                f"(keys: {', '.join(hints)})"
            )
        values[key] = _value(f"{where}: {key}", value, hints[key])
    cluster = Cluster(**values)
    for name in ("nodes", "cpus_per_task", "time_limit_min", "join_timeout_s", "chain_jobs"):
        if getattr(cluster, name) < 1:
            raise ConfigError(f"{where}: {name} is {getattr(cluster, name)}; it must be 1 or more")
    for field in dataclasses.fields(cluster):
        value = getattr(cluster, field.name)
        if isinstance(value, int) and value < 0:
            raise ConfigError(f"{where}: {field.name} is {value}; it must not be negative")
    return cluster


def _value(what: str, value: Any, kind: Any) -> Any:
    """`value` as the type of its field; a list may be given as one string."""
    if kind is bool or kind is int:
        if type(value) is not kind:
            raise ConfigError(f"{what} is {value!r}; it must be a {_NAMES[kind]}")
        return value
    if kind is str:
        if not isinstance(value, str):
            raise ConfigError(f"{what} is {value!r}; it must be text (in quotes)")
        return value
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise ConfigError(f"{what} is {value!r}; it must be a list of texts")
    return tuple(listed)


_NAMES = {int: "whole number", bool: "true or false"}
