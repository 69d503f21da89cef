"""Attempts of `leyden train`: which follow each other, which end a run, what they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist.checkpoint_folder import checkpoint_name, write_commit
from dist.errors import SetupError
from launch.failures import describe_ranks, first_failure, last_words, oom_kills, write_failures
from launch.leftovers import end_leftovers_of
from launch.restarts import Launch, lead
from tests.rank_processes import processes_of

ROOT = Path(__file__).resolve().parent.parent
# Each attempt commits a checkpoint if `progress` is there, then rank 1 ends in its own way.
SCRIPT = """\
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from dist.checkpoint_folder import checkpoint_name, write_commit

run, attempt = Path(os.environ["LEYDEN_RUN_DIR"]), int(os.environ["LEYDEN_ATTEMPT"])
rank = int(os.environ["RANK"])
pid = run / f"pid-{{attempt}}-{{rank}}"
pid.with_suffix(".tmp").write_text(str(os.getpid()))
os.replace(pid.with_suffix(".tmp"), pid)
if rank == 0:
    (run / "attempts" / str(attempt) / "env.json").write_text("{{}}")
    print("attempt", attempt, flush=True)
    (run / f"said-{{attempt}}").touch()
    if Path("progress").exists():
        folder = run / "checkpoints" / checkpoint_name(10 * attempt + 10, attempt)
        folder.mkdir(parents=True)
        write_commit(folder, {{}})
    time.sleep(60 if Path("wait").exists() or not Path("fine").exists() else 0)
elif Path("wait").exists():
    time.sleep(60)
elif Path("hungry").exists():
    held = []
    while True:
        held.append(b"x" * (64 << 20))
elif not Path("fine").exists():
    def deep():
        # Rank 0 is ended with this one: on a busy machine before its first word.
        until = time.monotonic() + 30
        while not (run / f"said-{{attempt}}").exists() and time.monotonic() < until:
            time.sleep(0.05)
        raise RuntimeError("broken on purpose")
    deep()
"""


def start(place: Path, *words: str, before: Sequence[str] = ()) -> subprocess.Popen[str]:
    """`leyden train` of the script above, as a run called first, on two ranks."""
    (place / "mine.py").write_text(SCRIPT.format(root=str(ROOT)))
    command = [*before, sys.executable, "-m", "launch.cli", "train", "mine.py", "--nproc", "2"]
    return subprocess.Popen(
        [*command, "--run", "first", *words], cwd=place, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 90.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.05)


def test_a_crash_loop_ends_and_names_the_rank(tmp_path: Path) -> None:
    """A bug that is there in every attempt, restarted until somebody looks; and a person who has
    to find the one traceback among the messages of ranks that were ended because of it."""
    with start(tmp_path, "--max-restarts", "5") as front:
        out, err = front.communicate(timeout=200)
    assert front.returncode == 93, err
    run = tmp_path / "runs" / "first"
    assert sorted(os.listdir(run / "attempts")) == ["0", "1", "2"], "three without progress"
    assert "3 attempts in a row ended without new committed steps" in err
    assert "rank 1 failed first (exit code 1): RuntimeError: broken on purpose" in err
    failed = first_failure(run / "attempts" / "2")
    assert failed is not None and "in deep" in "\n".join(failed["said"]), failed
    assert failed["said"][0].startswith("Traceback")
    # Every rank's own output, as it wrote it; on the terminal too.
    (log,) = (run / "attempts" / "1" / "logs").glob("*/*/attempt_0/0/stdout.log")
    assert log.read_text() == "attempt 1\n"
    assert out.splitlines() == ["attempt 0", "attempt 1", "attempt 2"]
    assert not processes_of(str(run))
    said = subprocess.run(
        [sys.executable, "-m", "launch.cli", "logs", "first", "--rank", "1"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert "broken on purpose" in said.stdout, said.stderr


def test_a_killed_rank_is_restarted_until_the_bound(tmp_path: Path) -> None:
    """kill -9 (the OOM killer): an attempt that nobody starts again, one too many, or an orphan."""
    for name in ("progress", "wait"):
        (tmp_path / name).touch()
    run = tmp_path / "runs" / "first"
    front = start(tmp_path, "--max-restarts", "1")
    try:
        for attempt in (0, 1):
            commit = run / "checkpoints" / checkpoint_name(10 * attempt + 10, attempt)
            files = [run / f"pid-{attempt}-{rank}" for rank in (0, 1)]
            wait_for(lambda all_=(commit / "COMMIT.json", *files): all(p.exists() for p in all_),
                     f"attempt {attempt}")  # fmt: skip
            pids = [int(file.read_text()) for file in files]
            os.kill(pids[1], signal.SIGKILL)
            wait_for(lambda pid=pids[0]: not alive(pid), "the end of rank 0")  # type: ignore[misc]
        _, err = front.communicate(timeout=60)
    finally:
        front.kill()
        front.wait()
    assert front.returncode == 137, err
    assert "rank 1 failed first (killed by SIGKILL" in err
    assert "1 restarts are used up" in err
    assert not processes_of(str(run))


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def launch(run: Path, codes: list[int], after: Callable[[int], object] = lambda _: None) -> Launch:
    """A launch whose attempts end with these codes."""
    left = list(codes)

    def start_attempt(_: list[str], env: dict[str, str]) -> tuple[int, bool]:
        attempt = int(env["LEYDEN_ATTEMPT"])
        (run / "attempts" / str(attempt) / "env.json").touch()
        after(attempt)
        return left.pop(0), False

    return Launch(run=run, node="here", nproc=1, max_restarts=9, start=start_attempt)


@pytest.mark.parametrize("code", [0, 2, 3, 4, 75, 93, 130])
def test_codes_that_a_restart_cannot_mend(code: int, tmp_path: Path) -> None:
    """A refused config or dataset started again and again; a stop on request that goes on."""
    assert lead(launch(tmp_path / "run", [code])) == code
    assert os.listdir(tmp_path / "run" / "attempts") == ["0"]


@settings(max_examples=10, deadline=None, derandomize=True)
@given(progress=st.lists(st.booleans(), min_size=1, max_size=9))
def test_three_attempts_without_progress_are_the_last(
    progress: list[bool], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A count that progress does not reset, or that a restart does."""
    run = tmp_path_factory.mktemp("run")

    def commit(attempt: int) -> None:
        if attempt < len(progress) and progress[attempt]:
            folder = run / "checkpoints" / checkpoint_name(attempt + 1, attempt)
            folder.mkdir(parents=True)
            write_commit(folder, {})

    idle, expected = 0, 0
    for made in [*progress, False, False, False]:
        idle = 0 if made else idle + 1
        expected += 1
        if idle == 3 or expected == 10:
            break
    code = lead(launch(run, [1] * 20, commit))
    assert len(os.listdir(run / "attempts")) == expected
    assert code == (93 if idle == 3 and expected < 10 else 1)


def test_a_request_to_stop_between_attempts_is_heard(tmp_path: Path) -> None:
    """`control/drain` written while the ranks die: the next attempt would forget it."""
    run = tmp_path / "run"
    asked = launch(run, [1, 1], lambda _: (run / "control" / "drain").touch())
    assert lead(asked) == 75
    assert lead(launch(run, [0])) == 0, "the next launch forgets it"


def test_a_second_front_is_refused(tmp_path: Path) -> None:
    """Two fronts that restart one run in turn, each ending the other's ranks as left behind."""
    run = tmp_path / "run"

    def second(_: int) -> None:
        with pytest.raises(SetupError, match="in use"):
            lead(launch(run, [0]))

    assert lead(launch(run, [0], second)) == 0


def test_a_refused_config_leaves_nothing(tmp_path: Path) -> None:
    """A typo that leaves a run's folder, which --fresh and `leyden status` then count."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", "pretrain", "--run", "x", "--max_stps", "3"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "did you mean 'max_steps'?" in done.stderr, done.stderr
    assert not (tmp_path / "runs" / "x").exists()


def test_what_a_killed_front_left_is_ended_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An orphan holds the GPU and the run's lease; a process of another run, one that the user
    started from a shell with the same setting, or our own parent must live."""
    run = str(tmp_path / "a run")
    both = {"LEYDEN_RUN": run, "LEYDEN_LAUNCH": "x"}
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    cases = {
        "orphan": (both, ""), "stubborn": (both, stubborn),
        "other run": ({**both, "LEYDEN_RUN": run + "2"}, ""), "shell": ({"LEYDEN_RUN": run}, ""),
        "other node": ({**both, "LEYDEN_NODE": "n2"}, ""),
    }  # fmt: skip
    processes = {}
    for name, (env, first) in cases.items():
        code = first + "import time; print(flush=True); time.sleep(60)"
        processes[name] = subprocess.Popen(
            [sys.executable, "-S", "-c", code, name], env={**os.environ, **env},
            stdout=subprocess.PIPE,
        )  # fmt: skip
    try:
        for process in processes.values():
            assert process.stdout is not None
            process.stdout.read(1)
        lines = end_leftovers_of(run, "n1", grace_s=0.5)
        assert len(lines) == 2 and "python" in lines[0] and "orphan" in "".join(lines)
        assert processes["orphan"].wait(10) == -15 and processes["stubborn"].wait(10) == -9
        spared = ("other run", "shell", "other node")
        assert [processes[name].poll() for name in spared] == [None] * 3
        assert lead(launch(Path(run), [0])) == 0, "a single node ends those of every node"
        assert processes["other node"].wait(10) == -15
        assert "left behind: process" in capsys.readouterr().err
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def test_a_node_out_of_memory_is_told(tmp_path: Path) -> None:
    """A bare -9: the person looks for a bug where the batch was too large."""
    vmstat, group = tmp_path / "vmstat", tmp_path / "group"
    group.mkdir()
    vmstat.write_text("nr_free_pages 5\noom_kill 3\n")
    assert oom_kills(vmstat, group) == 3
    (group / "memory.events").write_text("low 0\noom 9\noom_kill 7\noom_group_kill 1\n")
    assert oom_kills(vmstat, group) == 7
    assert oom_kills(tmp_path / "none", tmp_path / "none") == 0
    assert "oom_kill" in describe_ranks({0: -9}, {}, 1)[0]["how"]
    assert "oom_kill" not in describe_ranks({0: -9}, {}, 0)[0]["how"]
    assert "oom_kill" not in describe_ranks({0: -11}, {}, 1)[0]["how"]


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A control group of 1.5 GB, by cgroup v1 or v2."""
    old, new = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    group = (old if old.is_dir() else new) / f"leyden-test-{os.getpid()}"
    limit = "memory.limit_in_bytes" if old.is_dir() else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text("1500000000")
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield group
    group.rmdir()


def test_the_kernel_ends_a_rank_for_memory(tmp_path: Path, small_memory: Path) -> None:
    """The same by the kernel itself: counters that do not count here, a rank that is not named."""
    (tmp_path / "hungry").touch()
    join = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(small_memory)]
    with start(tmp_path, "--max-restarts", "0", before=join) as front:
        _, err = front.communicate(timeout=120)
    assert front.returncode != 0
    assert "rank 1" in err and "killed by SIGKILL; the node ran out of memory: oom_kill" in err, err


def test_the_first_failure_is_not_a_consequence(tmp_path: Path) -> None:
    """Rank 0 says that another rank ended: naming it sends the person to the wrong node."""
    logs = {rank: tmp_path / str(rank) for rank in range(4)}
    logs[0].write_text("error: another rank ended without a word (killed, ...)\n")
    logs[1].write_text("")
    logs[2].write_text("x\nTraceback (most recent call last):\n  old\nE: 1\n")
    logs[3].write_text("Traceback (most recent call last):\n  a\nTraceback (most recent call last):"
                       "\n  b\nValueError: y\n")  # fmt: skip
    by_code = describe_ranks({0: 1, 1: -15, 2: 1, 3: 1}, logs)
    assert [one["rank"] for one in by_code][:2] == [2, 3]
    assert describe_ranks({0: 1, 1: -9, 2: 1}, logs)[0]["rank"] == 1
    assert last_words(logs[3].read_text()) == [
        "Traceback (most recent call last):", "  b", "ValueError: y",
    ]  # fmt: skip
    # Of several nodes: each writes its own file.
    write_failures(tmp_path, "n1", describe_ranks({0: 1}, logs))
    write_failures(tmp_path, "n2", describe_ranks({3: 1}, logs))
    found = first_failure(tmp_path)
    assert found is not None and (found["rank"], found["node"]) == (3, "n2")
