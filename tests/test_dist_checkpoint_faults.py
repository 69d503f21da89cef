"""Kill a save at each of its file operations, fill the disk there, damage what it wrote."""

from __future__ import annotations

import builtins
import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist.checkpoint import CheckpointSaver, load_checkpoint, read_record
from dist.checkpoint_folder import (
    COMMIT,
    check_files,
    checkpoint_name,
    find_checkpoint,
    newer_than,
    remove_leftovers,
    retire,
)
from tests.run_ranks import _PRELOAD, one_thread

BEFORE, AFTER = 3, 6
"""Attempt 0 saves steps 1..BEFORE undisturbed, attempt 1 goes on to step AFTER under the shim."""


class FileOperations:
    """Counts what this process does to files, and at the n-th operation strikes.

    "killed": SIGKILL, in the middle of a write; "power cut": the same, and half of every file
    that was not synced is lost; "full", "read-only": the operation and all later ones fail
    (deleting works on a full disk).
    """

    def __init__(self, fault: str, strike_at: int) -> None:
        self.fault, self.strike_at, self.count = fault, strike_at, 0
        self.names: list[str] = []
        self._unsynced: dict[int, str] = {}  # inode -> path

    def install(self) -> None:
        """Patch the functions below in this process, for good."""
        for name in ("mkdir", "rename", "replace", "link"):
            setattr(os, name, self._counted(name, getattr(os, name)))
        for name in ("unlink", "remove", "rmdir"):
            setattr(os, name, self._counted(name, getattr(os, name), deletes=True))
        os.fsync = self._fsync(os.fsync)
        builtins.open = io.open = self._open(io.open)  # type: ignore[assignment]

    def happen(self, name: str, path: Any, deletes: bool = False, torn: Any = None) -> None:
        self.count += 1
        self.names.append(name)
        if self.strike_at == 0 or self.count < self.strike_at:
            return
        if self.fault in ("killed", "power cut"):
            if torn is not None:
                torn()
            if self.fault == "power cut":
                for lost in self._unsynced.values():
                    if os.path.exists(lost):
                        os.truncate(lost, os.path.getsize(lost) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "read-only":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        if not deletes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def _counted(self, name: str, original: Callable[..., Any], deletes: bool = False) -> Any:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            self.happen(name, path, deletes)
            result = original(path, *args, **kwargs)
            if name in ("rename", "replace"):
                self._unsynced = {
                    inode: str(args[0]) if old == str(path) else old
                    for inode, old in self._unsynced.items()
                }
            return result

        return call

    def _fsync(self, original: Callable[..., Any]) -> Any:
        def call(handle: int) -> None:
            self.happen("fsync", handle)
            original(handle)
            self._unsynced.pop(os.fstat(handle).st_ino, None)

        return call

    def _open(self, original: Callable[..., Any]) -> Any:
        def call(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wxa+"):
                return original(path, mode, *args, **kwargs)
            assert mode in ("wb", "xb"), f"the shim knows no open mode {mode!r} for {path}"
            self.happen("open", path)
            raw = _CountedFile(path, mode, self)
            self._unsynced[os.fstat(raw.fileno()).st_ino] = str(path)
            # Small buffers: several writes for each of these small files, as a large one has.
            return io.BufferedWriter(raw, 1024)

        return call


class _CountedFile(io.FileIO):
    """A file whose writes are counted; the one that is struck is torn in the middle."""

    def __init__(self, path: Any, mode: str, operations: FileOperations) -> None:
        super().__init__(path, mode)
        self._operations, self._path = operations, path

    def write(self, data: Any) -> int:
        half = memoryview(data)[: len(data) // 2]
        self._operations.happen(
            "write", self._path, torn=lambda: super(_CountedFile, self).write(half)
        )
        return super().write(data)


def make(step: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer that know their step: weights and first moments are functions
    of it."""
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.0, 0.9))
    train_to(model, optimizer, step)
    return model, optimizer


def train_to(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    with torch.no_grad():
        model.weight.fill_(float(step))
    model.weight.grad = torch.full_like(model.weight, 10.0 * step)
    optimizer.step()


def train(root: Path, attempt: int, steps: range, told: Callable[[int], None]) -> list[str]:
    """What Checkpoints does, with a save at every step; returns the failures."""
    saver, failures = CheckpointSaver(torch.device("cpu")), []
    model, optimizer = make()
    found, _ = find_checkpoint(root)
    damaged = newer_than(root, found, attempt)
    for step in steps:
        train_to(model, optimizer, step)
        told(step)
        if (saved := saver.wait()) and saved.failure:
            failures.append(saved.failure)

        def after(saved: Any) -> None:
            try:
                if not saved.failure:
                    retire(root, keep=2, keep_best=1, ignore=damaged)
            except OSError:
                return  # as in the callback: a warning

        # Step 2 stays the best, so that retention has one to keep out of turn.
        loss = abs(step - 2) + 1.0
        folder = root / checkpoint_name(step, attempt)
        saver.start(folder, model, optimizer, {"step": step}, validation_loss=loss, then=after)
    if (saved := saver.wait()) and saved.failure:
        failures.append(saved.failure)
    return failures


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: what counts is the order of operations, and an
    fsync of a busy disk takes 0.1 s."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="leyden-test-") as folder:
        yield Path(folder)


def one_child(root: Path, fault: str, strike_at: int) -> dict[str, Any]:
    """Fork, train under the shim, and tell what came of it. The caller has no threads."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            operations = FileOperations(fault, strike_at)
            operations.install()
            failures = train(
                root, 1, range(BEFORE + 1, AFTER + 1), lambda step: _tell(send, step=step)
            )
            _tell(send, failures=failures, names=operations.names)
            code = 0
        except BaseException:
            _tell(send, error=traceback.format_exc())
        finally:
            os._exit(code)
    os.close(send)
    seen: dict[str, Any] = {"strike_at": strike_at, "root": root}
    with open(receive) as told:
        for line in told:
            seen |= json.loads(line)
    seen["status"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return seen


def _tell(handle: int, **facts: Any) -> None:
    os.write(handle, (json.dumps(facts) + "\n").encode())


def all_faults(root: Path, fault: str, pipe: Any) -> None:
    """Strike at every operation in turn; runs in a process without threads, to fork from."""
    one_thread()
    prepared = root / "prepared"
    if os.fork() == 0:
        failures = train(prepared, 0, range(1, BEFORE + 1), lambda step: None)
        os._exit(len(failures))
    assert os.wait()[1] == 0
    shutil.copytree(prepared, root / "count")
    count = one_child(root / "count", fault, 0)
    results = []
    for strike_at in range(1, len(count.get("names", ())) + 1):
        shutil.copytree(prepared, root / str(strike_at))
        results.append(one_child(root / str(strike_at), fault, strike_at))
    pipe.send((count, results))


def strike_everywhere(root: Path, fault: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=all_faults, args=(root, fault, sender), daemon=True)
    process.start()
    sender.close()
    try:
        assert receiver.poll(240), "the faults took more than 240 s: does a save hang?"
        return receiver.recv()
    finally:
        process.kill()
        process.join()


def check_contents(folder: Path, step: int) -> None:
    """The tensors are those of `step`, not of one before or a mixture."""
    model, optimizer = make()
    load_checkpoint(folder, model, optimizer)
    assert torch.equal(model.weight, torch.full((4, 4), float(step)))
    moment = optimizer.state[model.weight]["exp_avg"]
    assert torch.equal(moment, torch.full((4, 4), 10.0 * step))


def check_next_start(root: Path, fault: str) -> int:
    """After a fault: the newest valid checkpoint is right, no committed one is damaged, what
    was left is cleaned, and the next attempt saves. Returns the step found."""
    found, passed_over = find_checkpoint(root)
    assert found is not None, passed_over
    step = read_record(found)["step"]
    check_contents(found, step)
    for folder in root.iterdir():
        assert not (folder / COMMIT).exists() or check_files(folder) == "", folder
    unfinished = {folder.name for folder in root.iterdir() if not (folder / COMMIT).exists()}
    assert set(remove_leftovers(root, attempt=2)) == unfinished
    assert all((folder / COMMIT).exists() for folder in root.iterdir())
    assert find_checkpoint(root) == (found, [])
    return step


@pytest.mark.parametrize("fault", ["killed", "power cut"])
def test_killed_at_every_file_operation(root: Path, fault: str) -> None:
    """A commit before its files, a deletion that leaves a commit without files, a file that was
    never synced, a name used twice: each shows at one of these points."""
    count, results = strike_everywhere(root, fault)
    assert count["status"] == 0 and count["failures"] == [], count
    names = count["names"]
    kinds = {name: names.count(name) for name in sorted(set(names))}
    print(f"{fault} at {len(results)} points of {AFTER - BEFORE} saves: {kinds}")
    assert len(results) >= 30
    lost = []
    for result in results:
        assert result["status"] == -signal.SIGKILL, result
        step = check_next_start(result["root"], fault)
        lost.append(result["step"] - step)
    print(f"intervals lost: at most {max(lost)}, mean {sum(lost) / len(lost):.2f}")
    assert max(lost) <= 2
    # What the last one left is a run like any other.
    assert train(results[-1]["root"], 2, range(AFTER, AFTER + 2), lambda step: None) == []
    assert check_next_start(results[-1]["root"], fault) == AFTER + 1


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_disk_fails_at_every_file_operation(root: Path, fault: str) -> None:
    """A save that raises out of its thread, or a failed one that spoils an older one."""
    count, results = strike_everywhere(root, fault)
    print(f"{fault} at {len(results)} points")
    word = os.strerror(errno.ENOSPC if fault == "full" else errno.EROFS)
    for result in results:
        assert result["status"] == 0, result
        step = check_next_start(result["root"], fault)
        # Where only the sync after the commit failed, and read-only forbids taking it back, the
        # save counts as failed and the checkpoint is valid.
        assert 0 <= step - (AFTER - len(result["failures"])) <= int(fault == "read-only"), result
        assert all(word in failure for failure in result["failures"]), result
    assert len(results[0]["failures"]) == AFTER - BEFORE


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    assert train(root, 0, range(1, 3), lambda step: None) == []
    return root


def test_every_flip_truncation_and_deletion_is_found(root: Path, two: Path) -> None:
    """Damage that goes unseen is trained on; 100 % of it must lead to the checkpoint before."""
    draw = random.Random(0)
    files = sorted(path.name for path in (two / "step-2-a0").iterdir())
    assert set(files) == {"__0_0.distcp", ".metadata", "state.json", COMMIT}
    trials = 0
    for damage in ["flip"] * 240 + ["truncate"] * 60 + ["delete"]:
        for name in files:
            trial = root / str(trials)
            shutil.copytree(two, trial)
            path = trial / "step-2-a0" / name
            data = bytearray(path.read_bytes())
            if damage == "flip":
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
                path.write_bytes(data)
            elif damage == "truncate":
                path.write_bytes(data[: draw.randrange(len(data))])
            else:
                path.unlink()
            found, passed_over = find_checkpoint(trial)
            assert found == trial / "step-1-a0", (damage, name)
            assert len(passed_over) == 1 and passed_over[0].startswith("step-2-a0: ")
            shutil.rmtree(trial)
            trials += 1
    print(f"{trials} damages, all found")
