"""Starting a command: its exit code, signals, and that nothing of it stays behind."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.processes import command_text, run_child

ROOT = Path(__file__).resolve().parent.parent
# A parent that starts a grandchild in another session: a process group would not catch it.
FAMILY = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'],"
    " start_new_session=True)\n"
    "open(sys.argv[1], 'w').write(str(child.pid))\n"
    "time.sleep(float(sys.argv[2]))\n"
)


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: object, timeout_s: float = 30.0) -> None:
    """Poll `condition()` until it is true."""
    until = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def start(script: str, *words: str) -> subprocess.Popen[str]:
    """run_child(python -c script words) in a process that can be signalled."""
    code = (
        "import sys\nfrom launch.processes import run_child\n"
        "sys.exit(run_child([sys.executable, '-c', *sys.argv[1:]]))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, script, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 75, 93])
def test_exit_codes_pass_through(code: int) -> None:
    """A wrapper that says 1 for everything."""
    assert run_child([sys.executable, "-c", f"import sys; sys.exit({code})"]) == code


def test_death_by_signal_is_128_plus_n() -> None:
    """A killed child must not look like a negative, or a zero, exit code."""
    assert run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 137


def test_a_child_that_leaves_processes_behind(tmp_path: Path) -> None:
    """A rank or JVM that outlives its launcher holds GPUs and ports."""
    file = tmp_path / "pid"
    assert run_child([sys.executable, "-c", FAMILY, str(file), "0"]) == 0
    pid = int(file.read_text())
    wait_for(lambda: not alive(pid))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_the_whole_family(number: int, code: int, tmp_path: Path) -> None:
    """Ctrl-C that ends the front and leaves the work running."""
    file = tmp_path / "pid"
    front = start(FAMILY, str(file), "300")
    wait_for(lambda: file.exists() and file.read_text())
    front.send_signal(number)
    _, err = front.communicate(timeout=30)
    assert front.returncode == code, err
    assert not alive(int(file.read_text()))
    assert "Traceback" not in err


def test_a_drained_child_keeps_its_code() -> None:
    """75 (stopped, resumable) reported as 130 would look like lost work."""
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('ready', flush=True)\n"
        "time.sleep(300)\n"
    )
    front = start(script)
    assert front.stdout is not None and front.stdout.readline() == "ready\n"
    front.send_signal(signal.SIGINT)
    assert front.wait(timeout=30) == 75


def test_a_second_ctrl_c_ends_a_child_that_will_not(tmp_path: Path) -> None:
    """A child that ignores SIGTERM would hold the terminal for ever."""
    script = (
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True)\n"
        "time.sleep(300)\n"
    )
    front = start(script)
    assert front.stdout is not None and front.stdout.readline() == "ready\n"
    front.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert front.poll() is None
    front.send_signal(signal.SIGINT)
    assert front.wait(timeout=30) == 130


def test_a_killed_front_takes_the_child_along(tmp_path: Path) -> None:
    """kill -9 of leyden (the OOM killer, a closed container) must not leave training running."""
    file = tmp_path / "pid"
    script = f"import os, time\nopen({str(file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(300)\n"
    front = start(script)
    wait_for(lambda: file.exists() and file.read_text())
    front.kill()
    front.wait()
    wait_for(lambda: not alive(int(file.read_text())))


def test_a_silent_child_shows_that_it_lives(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Spark's start is silent for longer than the 10 s that a log promises."""
    monkeypatch.setattr("launch.processes.SILENCE_S", 0.5)
    script = "import time; print('out', flush=True); time.sleep(2.5)"
    assert run_child([sys.executable, "-c", script], title="shards") == 0
    out, err = capfdbinary.readouterr()
    assert b"out\n" in out
    assert b"shards: running, " in err


def test_output_is_copied_byte_for_byte(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """A log in another encoding must neither crash the front nor be changed."""
    script = "import os; os.write(1, bytes(range(256)) * 1000); os.write(2, b'\\xff\\n')"
    assert run_child([sys.executable, "-c", script], title="x") == 0
    out, err = capfdbinary.readouterr()
    assert bytes(range(256)) * 1000 in out
    assert b"\xff\n" in err


def test_command_text_is_paste_ready() -> None:
    """A shown command that a shell reads in another way than it was run."""
    words = ["prog", "a b", "$x", "", "it's", "new\nline"]
    assert shlex.split(command_text(words)) == words
    assert command_text(["p"], {"A": "1 2"}) == "A='1 2' p"
    assert command_text([os.path.join(os.getcwd(), "bin", "x")]) == "bin/x"
