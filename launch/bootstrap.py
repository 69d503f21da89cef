"""Make `.venv` for a fresh clone: check the machine, say size and time, install the pinned set.

Standard library only, and readable by Python 3.8, so that an old interpreter gets a sentence
instead of a syntax error. `make setup` runs it; it returns at once when nothing changed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

OLDEST, NEWEST = (3, 11), (3, 13)
DEFAULT_TORCH = "torch==2.13.0"
OLDEST_TORCH = (2, 11)
DEEPSPEED = "deepspeed>=0.19,<0.20"
FREE_GB_NEEDED = 6
ROOT = Path(__file__).resolve().parent.parent
# Debian's and its relatives' names first: `{}` takes the interpreter's version.
INSTALL_LINES = {
    "apt-get": ("apt-get install", "python3.{minor} python3.{minor}-venv"),
    "dnf": ("dnf install", "python3.{minor}"),
    "zypper": ("zypper install", "python3{minor}"),
    "pacman": ("pacman -S", "python"),
    "apk": ("apk add", "python3"),
}


class CannotSetUp(Exception):
    """Something is missing that the user has to install; the text holds the line that does it."""


def install_line(*packages: str) -> str:
    """The command of this machine's package manager that installs `packages`."""
    for manager, (command, _) in INSTALL_LINES.items():
        if shutil.which(manager):
            sudo = "" if os.geteuid() == 0 else "sudo "
            return f"{sudo}{command} {' '.join(packages)}"
    return "install " + " ".join(packages) + " with your package manager"


def python_packages(minor: int) -> list[str]:
    """Names of the packages that bring Python 3.<minor> with venv on this machine."""
    for manager, (_, packages) in INSTALL_LINES.items():
        if shutil.which(manager):
            return packages.format(minor=minor).split()
    return [f"python3.{minor}", "with its venv module"]


def supported(version: tuple[int, ...]) -> bool:
    """Whether Leyden runs on this version of Python."""
    return OLDEST <= tuple(version[:2]) <= NEWEST


def version_of(python: str) -> tuple[int, ...] | None:
    """Version of an interpreter, or None if it does not run (a pyenv shim may not)."""
    code = "import sys; print(*sys.version_info[:3])"
    try:
        done = subprocess.run(
            [python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30
        )
        return tuple(int(part) for part in done.stdout.split()) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def other_python() -> str | None:
    """A supported interpreter on PATH, newest first; None if there is none."""
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        version = version_of(found) if found else None
        if found and version and supported(version):
            return found
    return None


def check_machine() -> None:
    """Raise CannotSetUp with the line that installs what is missing."""
    if not sys.platform.startswith("linux"):
        raise CannotSetUp(f"this is {sys.platform}, and Leyden runs on Linux; use a Linux machine")
    for program in ("git", "make"):
        if shutil.which(program) is None:
            raise CannotSetUp(f"{program} is not on PATH; install it: {install_line(program)}")
    if not supported(tuple(sys.version_info[:3])):
        found = other_python()
        if found:
            # `exec` replaces this process, so nothing below runs on the unsupported Python.
            os.execv(found, [found, os.path.abspath(__file__), *sys.argv[1:]])
        have = ".".join(str(part) for part in sys.version_info[:3])
        want = f"Python 3.{OLDEST[1]} to 3.{NEWEST[1]}"
        line = install_line(*python_packages(12))
        raise CannotSetUp(
            f"{sys.executable} is Python {have} and Leyden needs {want}; install one: {line} "
            f"(or name one that is not on PATH: make setup PYTHON=/path/to/python3.12)"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        line = install_line(*python_packages(sys.version_info[1])[-1:])
        raise CannotSetUp(
            f"{sys.executable} has no module {error.name}, which makes `.venv`; install it: {line}"
        ) from None


def inputs_digest(torch_spec: str) -> str:
    """Digest of all that decides what is installed; equal to the stamp's = nothing to do."""
    digest = hashlib.sha256(torch_spec.encode())
    for name in ("pyproject.toml", "constraints.txt", "launch/bootstrap.py"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def installed_version(python: str, package: str) -> str | None:
    """Version of `package` as `python` sees it, without importing it."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return done.stdout.decode().strip() if done.returncode == 0 else None


def new_enough(torch_version: str | None) -> bool:
    numbers = re.findall(r"\d+", torch_version or "")
    return tuple(int(number) for number in numbers[:2]) >= OLDEST_TORCH


def make_venv(venv: Path) -> str:
    """Create `venv` unless a working one of a supported Python is there; return its python."""
    python = str(venv / "bin" / "python")
    have = version_of(python)
    has_pip = (
        subprocess.run(
            [python, "-m", "pip", "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ).returncode
        == 0
        if have
        else False
    )
    if have and supported(have) and has_pip:
        print(f"setup: {venv} is there (Python {'.'.join(map(str, have))}): used as it is")
        return python
    options = ["--clear"] if venv.exists() else []
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = None
    if torch and new_enough(torch):
        # A machine's own torch (a container, a cluster module) fits its drivers: do not replace it.
        print(f"setup: {sys.executable} has torch {torch}: .venv sees that interpreter's packages")
        options.append("--system-site-packages")
    print(f"setup: making {venv} with {sys.executable}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", *options, str(venv)], check=True)
    return python


def run_pip(python: str, log: Path, what: str, *arguments: str, env: dict | None = None) -> bool:
    """Run pip with its output in `log` and one status line here every 10 s; True if it worked."""
    command = [python, "-m", "pip", "install", "--progress-bar", "off", *arguments]
    started = shown = time.monotonic()
    print(f"setup: {what}", flush=True)
    with open(log, "ab") as out:
        out.write(("\n$ " + " ".join(shlex.quote(part) for part in command) + "\n").encode())
        out.flush()
        child = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}
        )
        try:
            while child.poll() is None:
                time.sleep(0.1)
                if time.monotonic() - shown >= 10:
                    shown = time.monotonic()
                    print(f"setup: {what}: {shown - started:.0f} s", flush=True)
        except BaseException:
            child.terminate()
            child.wait()
            raise
    return child.returncode == 0


def tail(log: Path, lines: int = 12) -> str:
    text = log.read_text(errors="replace").strip().splitlines()
    return "\n".join("  " + line for line in text[-lines:])


def torch_download(python: str, spec: list[str]) -> str:
    """Which torch pip would take for `spec` and how large it is, in words."""
    command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"]
    command += ["--ignore-installed", "--report", "-", *spec]
    done = subprocess.run(command, capture_output=True)
    if done.returncode != 0:
        why = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise CannotSetUp(
            f"pip finds no {' '.join(spec)} for this Python ({' '.join(why)}); choose another: "
            f"make setup TORCH_SPEC='torch==2.12.*', or PYTHON=python3.11"
        )
    url = json.loads(done.stdout)["install"][0]["download_info"]["url"]
    if url.startswith("file:"):
        path = Path(unquote(url[len("file://") :]))
        size = f"{path.stat().st_size / 1e6:.0f} MB" if path.exists() else "size unknown"
        return f"a wheel on this machine ({size}), nothing to download"
    if "cpu" in url.rsplit("/", 1)[-1]:
        return "a CPU build, about 0.2 GB to download"
    note = "the default build with its CUDA libraries, about 3 GB to download and 7 GB on disk"
    if not Path("/proc/driver/nvidia").exists():
        note += (
            " -- and this machine shows no NVIDIA GPU: Ctrl-C now and set TORCH_SPEC to a CPU build"
            " (TORCH_SPEC='torch==2.13.0 --index-url ...', as the PyTorch site says) to save most"
        )
    return note


def install_torch(python: str, log: Path, spec: list[str] | None) -> str:
    """Honour an installed torch, else install `spec`; return the version that is there."""
    have = installed_version(python, "torch")
    if spec is None and have and new_enough(have):
        print(f"setup: torch {have} is installed: kept")
        return have
    spec = spec or [DEFAULT_TORCH]
    print(f"setup: {' '.join(spec)}: {torch_download(python, spec)}", flush=True)
    if not run_pip(python, log, "installing torch", *spec):
        raise CannotSetUp(f"pip could not install {' '.join(spec)}; {log} ends:\n{tail(log)}")
    version = installed_version(python, "torch")
    if not version or not new_enough(version):
        raise CannotSetUp(f"TORCH_SPEC gave torch {version}, and Leyden needs 2.11 or newer")
    return version


def install(venv: Path, spec: list[str] | None) -> None:
    """Everything into `venv`, torch first so that nothing else picks its build."""
    free_gb = shutil.disk_usage(str(ROOT)).free / 1e9
    if free_gb < FREE_GB_NEEDED and not venv.exists():
        raise CannotSetUp(
            f"{ROOT} has {free_gb:.1f} GB free and .venv needs {FREE_GB_NEEDED} GB; make room"
        )
    python, log = make_venv(venv), venv / "setup.log"
    print(
        "setup: about 0.8 GB to download without torch (most of it Spark, 0.45 GB), 3 GB on disk,"
        " 3 to 6 minutes; nothing is downloaded twice",
        flush=True,
    )
    # DeepSpeed and the rooms are built without isolation, so the build tools are pinned too.
    base = ["-c", str(ROOT / "constraints.txt")]
    if not run_pip(python, log, "installing build tools", *base, "setuptools", "wheel"):
        raise CannotSetUp(f"pip could not install setuptools; {log} ends:\n{tail(log)}")
    torch = install_torch(python, log, spec)
    pinned = venv / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if not line.startswith("torch==")]
    pinned.write_text("\n".join([*kept, f"torch=={torch}"]) + "\n")
    rooms = ["--no-build-isolation", "-c", str(pinned), "-e", f"{ROOT}[dev,s3]"]
    if not run_pip(python, log, "installing Leyden and the tested set", *rooms):
        raise CannotSetUp(f"pip could not install the tested set; {log} ends:\n{tail(log)}")
    # Without DS_BUILD_OPS=0 its setup compiles CUDA kernels; with isolation it sees no torch.
    built = run_pip(
        python,
        log,
        "building deepspeed",
        "--no-build-isolation",
        "-c",
        str(pinned),
        DEEPSPEED,
        env={"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"},
    )
    if not built:
        print(
            f"setup: warning: deepspeed did not build, so `parallel.strategy: deepspeed` is not"
            f" there; all else works. {log} ends:\n{tail(log, 4)}",
            file=sys.stderr,
        )


def main() -> int:
    """Check, install what is missing, write the stamp; 0 = `.venv` is ready, 4 = it cannot be."""
    parser = argparse.ArgumentParser(prog="bootstrap", description=__doc__)
    parser.add_argument("--venv", default=str(ROOT / ".venv"), help="folder to make or reuse")
    parser.add_argument("--check", action="store_true", help="only check the prerequisites")
    options = parser.parse_args()
    spec = os.environ.get("TORCH_SPEC", "").strip()
    venv = Path(options.venv)
    started = time.monotonic()
    try:
        check_machine()
        if options.check:
            return 0
        stamp, digest = venv / ".leyden-setup", inputs_digest(spec)
        if stamp.is_file() and stamp.read_text() == digest and version_of(str(venv / "bin/python")):
            return 0
        install(venv, shlex.split(spec) or None)
        stamp.write_text(digest)
    except CannotSetUp as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(error.cmd)} failed ({error.returncode})", file=sys.stderr)
        return 4
    except KeyboardInterrupt:
        print("\nsetup: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"setup: {venv} is ready ({time.monotonic() - started:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
