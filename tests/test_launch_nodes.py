"""Several nodes by `leyden train`: what is refused before it starts, and two nodes at work."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dist.config import to_yaml
from dist.errors import LeydenError, SetupError
from dist.ranks import Ranks
from launch import cli, nodes
from launch.nodes import NodeOptions, find_nodes
from tests.make_dataset import write_dataset
from tests.rank_processes import config, kill, processes_of, train, watches
from tests.test_exact_resume import assert_same_run

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVE_EVERY = 40, 5


def find(nnodes: str, rdzv: str, **more: str) -> nodes.Nodes | None:
    return find_nodes(NodeOptions(nnodes=nnodes, rdzv=rdzv, **more), run="/r/first", target="x")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("2", ""), "needs --rdzv HOST:PORT"),
        (("two", "n1:29500"), "--nnodes 'two' is not a number of nodes"),
        (("0", "n1:29500"), "--nnodes '0'"),
        (("3:2", "n1:29500"), "--nnodes '3:2'"),
        (("2", "n1"), "is not HOST:PORT, such as node1:29500"),
        (("2", "localhost:29500"), "every node would take itself for the first one"),
        (("2", "127.0.0.1:29500"), "every node would take itself for the first one"),
        (("2", "[::1]:29500"), "every node would take itself for the first one"),
        (("2", "127.0.1.1:80"), "port 80: give one from 1024 to"),
        (("2", "127.0.1.1:45000"), "given to any program that opens a connection"),
        (("2", "no-such-host.invalid:29500"), "cannot be resolved on"),
    ],
)
def test_what_cannot_become_one_world_is_refused(words: tuple[str, str], said: str) -> None:
    """N nodes that each wait for minutes, or N worlds of one that each train the whole run."""
    began = time.monotonic()
    with pytest.raises(LeydenError, match=said.replace("[", r"\[")):
        find(*words)
    assert time.monotonic() - began < 15


def test_a_name_that_means_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian writes `127.0.1.1 NAME` into /etc/hosts: every node resolves its own name so."""
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    with pytest.raises(SetupError, match="which no other node reaches"):
        find("2", "mybox:29500")


def test_a_busy_port_is_said_so() -> None:
    """Torchrun would wait for minutes, or join the rendezvous of another run."""
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.1.1", port))
        taken.listen()
        with pytest.raises(SetupError, match=f"port {port} of 127.0.1.1 cannot be opened"):
            find("2", f"127.0.1.1:{port}")
        # A node that is not the first does not open it.
        other = find("2", f"127.0.1.1:{port}", node_rank="1")
    assert other is not None and not other.is_host and other.local_addr.startswith("127.")


def test_the_first_node_must_have_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """--node-rank 0 on another machine than HOST: nobody opens the store."""
    monkeypatch.setattr(nodes, "is_mine", lambda _: False)
    with pytest.raises(LeydenError, match="is no address of this node"):
        find("2", "127.0.1.1:29500", node_rank="0")
    with pytest.raises(LeydenError, match="--node-rank '2' is not one of 0 to 1"):
        find("2", "127.0.1.1:29500", node_rank="2")


def test_the_exact_command_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A line that another node cannot be given, or that differs from what is started."""
    port = free_port()
    words = ["train", "pretrain", "--nproc", "4", "--run", str(tmp_path / "first"), "--dry-run"]
    words += ["--nnodes", "2:3", "--rdzv", f"127.0.1.1:{port}", "--node-rank=0"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out.split()
    assert "--nnodes=2:3" in shown and f"--rdzv-endpoint=127.0.1.1:{port}" in shown
    (conf,) = [word for word in shown if word.startswith("--rdzv-conf=")]
    assert conf == ("--rdzv-conf=is_host=1,join_timeout=300,read_timeout=300,last_call_timeout=30")
    assert "--local-addr=127.0.1.1" in shown and "--standalone" not in shown
    (first,) = [word for word in shown if word.startswith("--rdzv-id=first-")]
    run = pytest.importorskip("torch.distributed.run")
    parsed = run.parse_args(shown[shown.index("torch.distributed.run") + 1 :])
    assert parsed.rdzv_id == first.partition("=")[2] and parsed.nnodes == "2:3"
    assert cli.main([*words, "--nnodes", "1"]) == 0
    assert "--standalone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("expected", "world", "fits"),
    [("4", 4, True), ("4", 2, False), ("2:8", 6, True), ("2:8", 9, False), ("", 2, True)],
)
def test_a_world_of_another_size_is_refused(expected: str, world: int, fits: bool) -> None:
    """Two nodes that did not find each other: two worlds that write one run."""
    env = {"RANK": "0", "WORLD_SIZE": str(world), "LEYDEN_NUM_RANKS": expected}
    if fits:
        assert Ranks.from_environment(env).world_size == world
    else:
        with pytest.raises(SetupError, match="the nodes did not find each other"):
            Ranks.from_environment(env)
    if expected:
        with pytest.raises(SetupError, match="this world has 1 ranks"):
            Ranks.from_environment({"LEYDEN_NUM_RANKS": expected})


def free_port() -> int:
    """A port below the ephemeral range that nobody listens on."""
    for port in range(20000 + os.getpid() % 9000, 32000):
        with socket.socket() as one:
            try:
                one.bind(("0.0.0.0", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port")


def start_node(work: Path, rank: int, port: int, log: Any, nnodes: str) -> subprocess.Popen[bytes]:
    """`leyden train` as one of two nodes; both are on this machine, with addresses of their own."""
    return subprocess.Popen(
        [
            sys.executable, "-m", "launch.cli", "train", "pretrain", "--config", "small.yaml",
            "--run", "first", "--nproc", "1", "--nnodes", nnodes, "--rdzv", f"127.0.1.1:{port}",
            "--node-rank", str(rank), "--local-addr", f"127.0.1.{rank + 1}",
            "--join-timeout", "120",
        ],
        cwd=work, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


@contextmanager
def two_nodes(
    work: Path, changes: dict[str, Any], ranks: tuple[int, int], nnodes: str
) -> Iterator[tuple[str, Path, list[subprocess.Popen[bytes]], Callable[[], str]]]:
    """Both nodes, started in the order `ranks`, once they have trained past a checkpoint: the
    dataset's URL, the run's folder, the fronts as started, what both said last. Ends all of it."""
    data = write_dataset(
        work / "data", documents=40, num_train_shards=2, with_tokenizer=False
    ).storage.url
    (work / "small.yaml").write_text(to_yaml(config(data, Path("x"), **changes)))
    run, port = work / "runs" / "first", free_port()
    logs = [open(work / f"node{rank}.log", "wb") for rank in (0, 1)]  # noqa: SIM115
    fronts = [start_node(work, rank, port, logs[rank], nnodes) for rank in ranks]

    def said() -> str:
        return "\n".join((work / f"node{rank}.log").read_text()[-3000:] for rank in (0, 1))

    try:
        until = time.monotonic() + 240
        while not (len(lines(run / "consumed.jsonl")) >= SAVE_EVERY + 2):
            assert time.monotonic() < until and fronts[0].poll() is None, said()
            time.sleep(0.02)
        yield data, run, fronts, said
    finally:
        for front in fronts:
            front.kill()
            front.wait()
        for pid in processes_of(str(run)):
            kill(pid)
        for log in logs:
            log.close()


@pytest.mark.timeout(600)
def test_two_nodes_go_on_after_a_killed_rank(tmp_path: Path) -> None:
    """Two worlds of one; a node that waits for ever when the other's rank dies; attempts that
    each node counts for itself; a resumed run that is not the uninterrupted one."""
    changes = {"max_steps": STEPS, "save_every_steps": SAVE_EVERY, "keep": 3}
    # The second node first: it has to wait for the first one's word.
    with two_nodes(tmp_path, changes, (1, 0), "2") as (data, run, fronts, said):
        (victim,) = [
            pid
            for pid in processes_of(str(run))
            if environ(pid).get("RANK") == "1" and not watches(pid)
        ]
        node = environ(victim)["LEYDEN_NODE"]
        os.kill(victim, signal.SIGKILL)
        codes = [front.wait(timeout=240) for front in fronts]
        assert codes == [0, 0], said()
    assert {line["ranks"] for line in lines(run / "order.jsonl")} == {2}, "one world of two ranks"
    assert sorted(os.listdir(run / "attempts")) == ["0", "1"]
    assert sorted(os.listdir(run / "attempts" / "0" / "logs")) == ["127.0.1.1", "127.0.1.2"]
    assert f"attempt 0 on {node}: rank 1 failed first (killed by SIGKILL" in said(), said()
    assert "restart 1 of at most 3" in said()
    end = json.loads((run / "attempts" / "0" / "end.json").read_text())
    assert end["verdict"] == 76 and end["committed_end"] >= SAVE_EVERY
    untouched = tmp_path / "untouched"
    assert train(data, untouched, 2, changes, timeout_s=200) == [0, 0]
    assert_same_run(run, untouched)


@pytest.mark.timeout(600)
def test_a_lost_node_of_one_to_two_is_gone_on_without(tmp_path: Path) -> None:
    """MIN:MAX that needs MAX again after a node is lost, or batches that depend on the nodes."""
    changes = {"max_steps": 200, "save_every_steps": SAVE_EVERY, "keep": 3, "val_every_steps": 0}

    def ranks_since(attempt: int) -> set[int]:
        found = lines(run / "order.jsonl")
        return {line["ranks"] for line in found if line["attempt"] >= attempt}

    with two_nodes(tmp_path, changes, (0, 1), "1:2") as (_, run, fronts, said):
        assert ranks_since(0) == {2}, said()
        # The whole node: its front, its agent, its rank, what watches it.
        for pid in processes_of(str(run)):
            if environ(pid).get("LEYDEN_NODE") == "127.0.1.2" or pid == fronts[1].pid:
                kill(pid)
        fronts[1].kill()
        until = time.monotonic() + 240
        while not [one for one in lines(run / "consumed.jsonl") if one["attempt"] >= 1]:
            assert time.monotonic() < until and fronts[0].poll() is None, said()
            time.sleep(0.1)
        assert ranks_since(1) == {1}
        fronts[0].send_signal(signal.SIGINT)
        assert fronts[0].wait(timeout=120) == 75, said()
    # Attempts overlap by what was not saved; each step has its own rows, whoever took it.
    rows = {(one["step"], one["t0"], one["t1"]) for one in lines(run / "consumed.jsonl")}
    assert rows == {(step, 8 * step, 8 * step + 8) for step in range(len(rows))}


def lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]


def environ(pid: int) -> dict[str, str]:
    try:
        items = Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in items if "=" in item)
