"""Environments of the peers: each in a folder of its own under build/peers, made once.

A peer runs with its own pinned set and never with ours. The torch that its resolver gets is
bounded, so that it does not bring gigabytes of CUDA to a machine without a GPU.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"


def peer_python(name: str, requirements: list[str], no_deps: tuple[str, ...] = ()) -> str:
    """The interpreter of an environment that holds `requirements` (and `no_deps` bare)."""
    wanted = json.dumps([sys.version, requirements, no_deps])
    folder = ROOT / "build" / "peers" / f"{name}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"
    python = folder / "bin" / "python"
    if (folder / "ready").exists():
        return str(python)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"building the environment of {name} in {folder}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *requirements], check=True)
    if no_deps:
        subprocess.run([*pip, "--no-deps", *no_deps], check=True)
    (folder / "ready").touch()
    return str(python)


def run_peer(python: str, script: str, *arguments: str) -> dict[str, Any]:
    """Run a script of benchmarks/peers; its last line of output is JSON.

    Once more, up to twice, where it or a worker of it crashed: litData 0.2.76 does now and then.
    """
    command = [python, str(ROOT / "benchmarks" / "peers" / script), *arguments]
    for tries_left in (2, 1, 0):
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, cwd=ROOT / "build"
        )
        crashed = done.returncode == -signal.SIGSEGV or "egmentation fault" in done.stderr
        if not crashed or not tries_left:
            break
        print(f"  {script} crashed (segmentation fault); once more", flush=True)
    if done.returncode != 0:
        said = f"exit {done.returncode}:\n{done.stderr[-3000:]}"
        raise RuntimeError(f"{' '.join(command)} failed, {said}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
