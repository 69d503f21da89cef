"""The batch script of a prep job: golden text, hostile values, ports, addresses, a bounded wait."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist.errors import ConfigError, SetupError
from launch import cli
from launch.cluster_config import Cluster
from launch.lint import check_script
from launch.prep_slurm import TEMPLATE, PrepRequest, output_of, prep_text, read_prep, split_cluster
from spark_jobs import standalone
from tests.fake_slurm import FakeSlurm
from tests.test_launch_slurm import CLUSTER, FOLDER, HOSTILE

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "sbatch_prep.txt"
REQUEST = PrepRequest(
    module="spark_jobs.tokenize_text",
    arguments=("--input", "/shared/raw", "--output", "/shared/data", "--seed=9"),
    prep_dir="/shared/runs/prep/one",
    work_dir="/shared/work",
    code="/shared/runs/prep/one/code/0123456789abcdef",
    python="/shared/venv/bin/python",
    nodes=4,
)
# Stands for the interpreter: `conf` answers, the daemons last, the driver writes down its words.
PYTHON = """#!/bin/bash
case "$2 ${3:-}" in
  "spark_jobs.standalone conf") mkdir -p "$4"; echo 127.0.0.1 20000 ;;
  "spark_jobs.standalone master"|"spark_jobs.standalone worker") exec sleep 30 ;;
  "spark_jobs.standalone wait") exit 0 ;;
  "spark_jobs.standalone sweep") printf '%s\\n' "$LEYDEN_SPARK" >> "$FAKE_SLURM/sweeps" ;;
  *) printf '%s\\0' "$@" > "$FAKE_SLURM/words"
     printf '%s\\0' "$PWD" "$LEYDEN_PREP_DIR" "$PYTHONPATH" "$TMPDIR" > "$FAKE_SLURM/seen"
     exit "${FAKE_CODE:-0}" ;;
esac
"""


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeSlurm:
    made = FakeSlurm(tmp_path_factory.mktemp("fake"))
    (made.bin / "python").write_text(PYTHON)
    (made.bin / "python").chmod(0o755)
    return made


def run_script(fake: FakeSlurm, text: str, cwd: Path, **env: str) -> int:
    done = subprocess.run(
        ["bash", "-c", text, "script"],
        cwd=cwd,
        env={
            "PATH": f"{fake.bin}:/usr/bin:/bin", "FAKE_SLURM": str(fake.state), "HOME": str(cwd),
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "r1", "SLURM_NNODES": "1", **env,
        },
        capture_output=True,
        timeout=60,
    )  # fmt: skip
    return done.returncode


def test_golden_script() -> None:
    """A change of what users submit, seen as a diff. LEYDEN_UPDATE_GOLDEN=1 if it was meant."""
    text = prep_text(REQUEST, replace(CLUSTER, scratch="/local/scratch"))
    if os.environ.get("LEYDEN_UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize("text", [TEMPLATE.read_text(), prep_text(REQUEST, CLUSTER)])
def test_bash_parses_it(text: str) -> None:
    """An unclosed quote in a script that nobody ran."""
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@settings(
    max_examples=12, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(words=st.lists(HOSTILE, max_size=4), folder=FOLDER)
def test_hostile_values_arrive_byte_for_byte(
    fake: FakeSlurm, words: list[str], folder: str
) -> None:
    """A blank splits, a quote ends, `$(...)` runs; and the job's own code must come through."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / folder
        (root / "scratch").mkdir(parents=True)
        request = replace(
            REQUEST, arguments=tuple(words), prep_dir=str(root / "prep"), work_dir=str(root),
            code=str(root / "code"), python=str(fake.bin / "python"), nodes=1,
        )  # fmt: skip
        text = prep_text(request, Cluster(scratch=str(root / "scratch")))
        assert run_script(fake, text, Path(place), FAKE_CODE="3") == 3
        given = (fake.state / "words").read_bytes().split(b"\0")[:-1]
        assert given[:3] == [b"-u", b"-m", b"spark_jobs.tokenize_text"]
        assert given[3:-2] == [word.encode() for word in words]
        assert given[-2:] == [b"--master", b"spark://127.0.0.1:20000"]
        seen = (fake.state / "seen").read_bytes().split(b"\0")[:-1]
        assert seen[:3] == [os.fsencode(root), os.fsencode(root / "prep"), request.code.encode()]
        assert seen[3] == os.fsencode(root / "scratch" / "leyden-spark-7.0-r1")
        assert (root / "prep" / "ended").read_text() == "3\n"
        assert not (root / "prep" / "conf").exists(), "the secret stays behind"
        assert not list(Path(place).rglob("canary")), "a value was executed"


def test_a_daemon_that_ends_ends_the_job(fake: FakeSlurm, tmp_path: Path) -> None:
    """A driver that waits for ever for workers which are gone."""
    python = tmp_path / "python"
    text = PYTHON.replace("exec sleep 30", "sleep 1; exit 1").replace(
        "*) printf", "*) exec sleep 50;"
    )
    python.write_text(text)
    python.chmod(0o755)
    request = replace(
        REQUEST, prep_dir=str(tmp_path / "prep"), work_dir=str(tmp_path), python=str(python)
    )
    assert run_script(fake, prep_text(request, Cluster()), tmp_path) == 4
    assert (tmp_path / "prep" / "ended").read_text() == "4\n"


def test_a_master_where_the_others_find_it() -> None:
    """Debian names a machine 127.0.1.1 in its own /etc/hosts: its workers would call themselves."""
    names = {"r1": "127.0.1.1", "r2": "127.0.1.2", "n1": "127.0.1.1", "n2": "10.0.0.2"}
    names |= {"m1": "10.0.0.1"}
    calls: list[str] = []

    def towards(other: str) -> str:
        calls.append(other)
        return "10.0.0.1"

    def address(own: str, peer: str) -> str:
        return standalone.reachable_address(own, peer, names.__getitem__, towards)

    assert address("r1", "r2") == "127.0.1.1" and address("r1", "r1") == "127.0.1.1"
    assert address("m1", "n2") == "10.0.0.1" and calls == []
    assert address("n1", "n2") == "10.0.0.1" and calls == ["10.0.0.2"]
    with pytest.raises(SetupError, match="cannot resolve the node names no-such-node"):
        standalone.reachable_address("no-such-node.invalid", "r2")


def test_ports_are_free_and_not_ephemeral() -> None:
    """A client of another program that holds the master's port for an hour."""
    first = standalone.free_ports("127.0.0.1", 3)
    assert first % 16 == 20048 % 16 and 20000 <= first < 30000
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + 1))
        taken.listen()
        assert standalone.free_ports("127.0.0.1", 3) != first
    with pytest.raises(SetupError, match=r"192\.0\.2\.1 is no address of this node"):
        standalone.free_ports("192.0.2.1", 3)


def test_the_secret_is_for_its_owner(tmp_path: Path) -> None:
    """A Spark master without a secret runs any program of any user as the job's user."""
    address, port = standalone.write_conf(tmp_path / "conf", "localhost", "localhost")
    assert address == "127.0.0.1" and (tmp_path / "conf").stat().st_mode & 0o777 == 0o700
    text = (tmp_path / "conf" / "spark-defaults.conf").read_text()
    assert "spark.authenticate true" in text and f"spark.driver.port {port + 4}" in text
    again = standalone.write_conf(tmp_path / "conf", "localhost", "localhost")
    assert again and (tmp_path / "conf" / "spark-defaults.conf").read_text() != text


class _Master(BaseHTTPRequestHandler):
    """Says that one worker is alive and another is dead."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        workers = [{"host": "10.0.0.1", "state": "ALIVE"}, {"host": "10.0.0.2", "state": "DEAD"}]
        self.wfile.write(json.dumps({"workers": workers}).encode())

    def log_message(self, *_: object) -> None:
        return


def test_the_wait_for_workers_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node whose worker never comes: the allocation would idle until its limit."""
    server = HTTPServer(("127.0.0.1", 0), _Master)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    conf = tmp_path / "conf"
    (conf / "workers").mkdir(parents=True)
    master = {"address": "127.0.0.1", "port": server.server_port - 1}
    (conf / "master.json").write_text(json.dumps(master))
    (conf / "workers" / "n1").write_text("10.0.0.1")
    monkeypatch.setenv("LEYDEN_SPARK_NODES", "n1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    try:
        assert standalone.wait_for_workers(conf, 5, [os.getpid()]) == 0
        monkeypatch.setenv("LEYDEN_SPARK_NODES", "n1\nn2\nn3")
        (conf / "workers" / "n2").write_text("10.0.0.2")
        with pytest.raises(SetupError, match="no worker of n2, n3 has registered after 1 s"):
            standalone.wait_for_workers(conf, 1, [os.getpid()])
        with pytest.raises(SetupError, match="no worker of n2, n3 .* its step has ended"):
            standalone.wait_for_workers(conf, 60, [2**22 - 1])
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(SetupError, match="the master does not answer"):
        standalone.wait_for_workers(conf, 0.5, [os.getpid()])


def test_the_sweep_spares_its_parents_and_other_jobs(tmp_path: Path) -> None:
    """A sweep that ends the job's own shell, or another job of the same node."""
    env = {**os.environ, "LEYDEN_SPARK_SCRATCH": str(tmp_path / "scratch")}
    mine = subprocess.Popen(["sleep", "60"], env={**env, "LEYDEN_SPARK": "77.0.n1.worker"})
    other = subprocess.Popen(["sleep", "60"], env={**env, "LEYDEN_SPARK": "777.0.n1.worker"})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "spark_jobs.standalone", "sweep"], cwd=ROOT,
            env={**env, "LEYDEN_SPARK": "77.0.n1.sweep"}, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0
        assert mine.wait(5) == -15 and other.poll() is None
        assert not (tmp_path / "scratch").exists()
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()


def test_prep_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An option of ours that reaches the job, a record without its job id or its output."""
    assert split_cluster(["--a", "1", "--cluster=c", "--nodes", "3", "x"]) == (
        "c", 3, ["--a", "1", "x"],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="--nodes '0' is not a number of nodes"):
        split_cluster(["--nodes", "0"])
    fake = FakeSlurm(tmp_path)
    fake.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster.yaml").write_text("nodes: 2\n")
    (tmp_path / "job.yaml").write_text("output: from/yaml\n")
    assert output_of(["--config", "job.yaml"], tmp_path) == str(tmp_path / "from/yaml")
    words = ["prep", "tokenize-text", "--cluster", "cluster.yaml", "--output", "out"]
    assert cli.main([*words, "--master", "local[2]"]) == 2
    assert cli.main([*words, "--dry-run"]) == 0 and not (tmp_path / "runs").exists()
    assert cli.main(words) == 0
    assert "submitted tokenize_text as job 101" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs" / "prep").iterdir()
    record = read_prep(folder)
    assert (record["job_id"], record["output"]) == ("101", str(tmp_path / "out"))
    assert f"CODE={folder}/code/" in (folder / "job.sbatch").read_text()
    assert cli.main(["prep", "quarantine", "--cluster", "cluster.yaml"]) == 2
    assert "runs without Spark" in capsys.readouterr().err


def test_the_script_passes_our_own_checks() -> None:
    """A template of ours that `leyden check --static` refuses."""
    assert [finding.line() for finding in check_script(prep_text(REQUEST, CLUSTER))] == []
