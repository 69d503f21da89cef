"""The traps of a room called `dist`: tools that skip, drop or ignore a folder of that name."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("dist", "recipes", "spark_jobs", "launch")


def run(*command: str, cwd: Path = ROOT) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def room_files(*suffixes: str) -> set[str]:
    """Files of the rooms that git tracks or would track, by suffix."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", *ROOMS)
    return {name for name in listed.splitlines() if name.endswith(suffixes)}


def files_on_disk(*suffixes: str) -> set[str]:
    """The same without asking git."""
    found = (path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file())
    return {
        str(path.relative_to(ROOT))
        for path in found
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_git_ignores_nothing_in_the_rooms() -> None:
    """The usual Python .gitignore holds `dist/`: new files of the room would never be added."""
    on_disk = files_on_disk(".py", ".yaml")
    assert "dist/manifest.py" in on_disk
    assert on_disk - room_files(".py", ".yaml") == set()
    assert not (ROOT / "dist" / ".gitignore").exists(), "a build tool put `*` there"


def test_the_wheel_holds_every_source_file(tmp_path: Path) -> None:
    """Hatchling drops `dist/`, and package data is easily forgotten: a wheel would lack a room."""
    # In a copy: setuptools leaves build/ and egg-info behind, and a stale build/lib hides a hole.
    copy = tmp_path / "source"
    for name in room_files(".py", ".yaml") | {
        name for name in room_files("") if name.startswith("launch/templates/")
    }:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy / name)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q")
    run(*pip, "-w", "build/wheel", ".", cwd=copy)
    (wheel,) = (copy / "build" / "wheel").glob("leyden-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    expected = {name for name in room_files(".py", ".yaml")}
    expected |= {name for name in room_files("") if name.startswith("launch/templates/")}
    assert expected - set(names) == set()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == set(ROOMS), "the wheel must hold the rooms and nothing else"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    scripts = zipfile.ZipFile(wheel).read(
        next(name for name in names if name.endswith("entry_points.txt"))
    )
    assert b"leyden = launch.cli:main" in scripts


def test_ruff_lints_dist() -> None:
    """Ruff's default `exclude` holds `dist`: the room would be linted by nobody."""
    listed = run(sys.executable, "-m", "ruff", "check", "--show-files", ".").splitlines()
    names = {str(Path(name).relative_to(ROOT)) for name in listed}
    assert "dist/manifest.py" in names
    assert room_files(".py") - names == set()


def test_ruff_bans_the_name_dist_for_torch(tmp_path: Path) -> None:
    """`import torch.distributed as dist` in a file that also imports our room."""
    for text in ("import torch.distributed as dist\n", "from torch import distributed as dist\n"):
        file = tmp_path / "bad.py"
        file.write_text(text + "\nprint(dist)\n")
        config = str(ROOT / "pyproject.toml")
        command = [sys.executable, "-m", "ruff", "check", "--config", config, str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert "ICN002" in done.stdout, done.stdout + done.stderr


def test_mypy_checks_every_room() -> None:
    """A room that is left out of `files` is typed by nobody."""
    assert set(pyproject()["tool"]["mypy"]["files"]) == set(ROOMS)


def test_every_test_file_is_collected() -> None:
    """Pytest's default norecursedirs holds `dist` and `build`; and a test file may be misnamed."""
    ini = pyproject()["tool"]["pytest"]["ini_options"]
    assert not {"dist", "build"} & set(ini["norecursedirs"])
    helpers = {"conftest.py", "__init__.py"}
    for path in (ROOT / "tests").rglob("*.py"):
        assert path.parent == ROOT / "tests", f"{path}: tests are flat"
        tree = ast.parse(path.read_text())
        tests = [n for n in tree.body if getattr(n, "name", "").startswith(("test_", "Test"))]
        if tests and path.name not in helpers:
            assert path.name.startswith("test_"), f"{path.name} holds tests and is not collected"
        if path.name.startswith("test_"):
            assert tests, f"{path.name} holds no test"


def test_test_names_begin_with_a_room() -> None:
    """tests/test_<room>_<module>.py, so that a module's tests are found by its name."""
    whole_house = {
        *{"test_packaging", "test_house", "test_quickstart", "test_golden", "test_docs"},
        *{"test_opens_elsewhere", "test_exact_resume", "test_drain", "test_benchmarks"},
    }
    rooms = (*(f"test_{room}_" for room in ROOMS), "test_slurm_")
    for path in (ROOT / "tests").glob("test_*.py"):
        assert path.stem in whole_house or path.stem.startswith(rooms), path.name


def test_constraints_pin_every_requirement() -> None:
    """A direct requirement without a pin makes the tested set another one every day."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in pins), (
        "exact versions only: no paths, no addresses, no local build tags"
    )

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    pinned = {plain(line.split("==")[0]) for line in pins}
    project = pyproject()["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    names = {plain(re.split(r"[\[<>=!~ ]", text)[0]) for text in wanted}
    assert names - pinned == set()


def test_github_counts_dist_as_ours() -> None:
    """Linguist calls a folder `dist` vendored and hides it from diffs and statistics."""
    shown = run(
        *("git", "check-attr", "linguist-vendored", "linguist-generated", "--"),
        "dist/manifest.py",
    )
    assert shown.count(": unset") == 2, shown


@pytest.mark.parametrize("name", ["Makefile", ".ci/run", "README.md", "launch/bootstrap.py"])
def test_build_output_never_goes_to_dist(name: str) -> None:
    """`python -m build` and `uv build` put wheels, and a .gitignore of `*`, into dist/."""
    for line in (ROOT / name).read_text().splitlines():
        if re.search(r"\b(python -m build|uv build|pip wheel)\b", line):
            assert "build/wheel" in line, line


def test_no_registry_and_no_machine_paths() -> None:
    """A host name or a path of one machine breaks everyone else's install."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    # Put together here, so that this file holds none of them either.
    homes = [str(ROOT) + "/", "/" + "root/"]
    hosts = ["py" + "pi.org", "python" + "hosted", "index-" + "url=", "extra-" + "index"]
    pattern = re.compile("|".join(map(re.escape, homes + hosts)))
    for name in listed:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".txt", ".yaml", ".sh", ""} and path.is_file():
            if name == "LICENSE":
                continue
            found = pattern.search(path.read_text(errors="replace"))
            assert found is None, f"{name}: {found and found[0]}"


def test_bootstrap_says_what_an_old_python_lacks(tmp_path: Path) -> None:
    """A SyntaxError instead of a sentence on Python 3.8: the file must stay readable by it."""
    source = (ROOT / "launch" / "bootstrap.py").read_text()
    ast.parse(source, feature_version=(3, 8))
    # Run it as if the interpreter were 3.8 and no other were on PATH.
    code = (
        "import runpy, sys\n"
        "sys.version_info = (3, 8, 18, 'final', 0)\n"
        f"sys.argv = [{str(ROOT / 'launch/bootstrap.py')!r}, '--check']\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    for program in ("git", "make", "apt-get"):
        (tmp_path / program).symlink_to("/bin/true")
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4, done.stderr
    assert "Python 3.8.18" in done.stderr and "3.11 to 3.13" in done.stderr
    assert "apt-get install python3.12 python3.12-venv" in done.stderr


def test_bootstrap_names_a_missing_program(tmp_path: Path) -> None:
    """Without git the install would fail half-way, minutes later."""
    (tmp_path / "make").symlink_to("/bin/true")
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "bootstrap.py"), "--check"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4
    assert done.stderr.startswith("error: git is not on PATH; install")
