"""Who may import whom, read from the source; and what importing a room may bring along.

floor 0 <- floor 1 <- floor 2 <- floor 3 <- recipes;  floors 0-1 <- spark_jobs;
floors 0-1 <- launch (floor 0 at the top of a file, the rest inside functions).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("dist", "recipes", "spark_jobs", "launch")

# Every file of dist stands in exactly one floor; a new file fails the test until it is entered.
FLOORS: dict[int, set[str]] = {
    floor: set(names.split())
    for floor, names in {
        0: """
            channel data_pin devices errors fabric_rows fabric_verdicts file_locks
            http_connections lease members
            local_files manifest model_folder open_files ranks run_dir side_thread stamps
            strict_json trace_summary url_path versions web_address
        """,
        1: """
            arrow_view audit baselines batch_hashes batch_layout bundle cache cache_folder
            cached_file checked_shards checkpoint_folder commit config data_diff data_export data_gc
            data_import data_inspect data_page data_samples dataset documents example_file
            example_gather example_lengths example_shards examples folder_files http_files
            import_source lineage mds_format megatron_format mixed_order mixed_skips mixture
            mixture_stages
            node_probes open_shards order order_choice pack_index
            packing passes progress report report_facts report_html run_history
            references row_gather run_order shard_file skips source_versions sources stages storage
            split_table svg_chart switched_rows table_format tar_format thinned_order token_shards
            token_source tokenizer transfer verify windowed
        """,
        2: """
            activation adapter_file agreement attention batch checkpoint checkpoint_files
            checkpoint_url communication compile deepspeed_zero drain export_hf
            fabric_check fabric_probes gradient_scaler guard hang_stacks
            hang_watcher hf_weights initialise loader local_device lora loss
            memory_plan memory_trace mesh meter micro_batch op_cost optim
            plan_step plan_text precision pretend pretend_gather pretend_zero
            profiling randomness sharding source_loss start start_watch
            step_gather step_time stochastic_adamw tensor_parallel training_step watchdog
        """,
        3: """
            checkpoint_callback lightning_plugins loggers micro_batch_callback
            monitor numerics replica_check run_guard run_recorder strategies
            training
        """,
    }.items()
}
FLOOR_1_MAY_USE = {
    *{"numpy", "pyarrow", "fsspec", "xxhash"},
    # Inside functions only: they are slow to import or not always needed.
    *{"jsonargparse", "rich", "yaml", "tokenizers", "kitoken", "s3fs"},
    "zstandard",
}
FLOOR_1_LAZY = {"jsonargparse", "rich", "yaml", "tokenizers", "kitoken", "s3fs", "zstandard"}
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_utilities"}


def imports(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; `top_only` leaves out those inside functions.

    Imports under `if TYPE_CHECKING:` never run and are left out too.
    """
    tree = ast.parse(path.read_text())

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            inner = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if top_only and inner:
                continue
            yield child
            yield from walk(child)

    for node in walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            # `from dist import errors` names a file of the room.
            submodules = [f"{module}.{alias.name}" for alias in node.names]
            yield from submodules if module in ROOMS else [module]


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).glob("*.py"))


def floor_of(module: str) -> int:
    """Floor of `dist.<name>`; the room's docstring belongs to floor 0."""
    name = ([*module.split("."), "__init__"])[1]
    if name == "__init__":
        return 0
    floors = [floor for floor, names in FLOORS.items() if name in names]
    assert len(floors) == 1, f"dist/{name}.py stands in no floor: enter it in FLOORS"
    return floors[0]


def has_main(path: Path) -> bool:
    body = ast.parse(path.read_text()).body
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body)


def test_every_file_of_dist_has_one_floor() -> None:
    """A new file in no floor would be checked by none of the rules below."""
    names = {path.stem for path in sources("dist")} - {"__init__"}
    entered = [name for floor in FLOORS.values() for name in floor]
    assert len(entered) == len(set(entered)), "a file stands in two floors"
    assert names - set(entered) == set(), "enter these files in FLOORS (and keep its floor's rule)"


def test_dist_imports_downwards_only() -> None:
    """An import upwards would make the contract (floor 0) need torch."""
    for path in sources("dist"):
        for name in imports(path):
            room = name.split(".")[0]
            assert room not in ROOMS or room == "dist", f"{path.name} imports the room {room}"
            if room == "dist":
                assert floor_of(name) <= floor_of(f"dist.{path.stem}"), f"{path.name}: {name}"


def test_floor_0_is_the_standard_library() -> None:
    """`python -c "import dist.manifest"` has to work where nothing is installed."""
    for path in sources("dist"):
        if floor_of(f"dist.{path.stem}") == 0:
            for name in imports(path):
                top = name.split(".")[0]
                assert top == "dist" or top in sys.stdlib_module_names, f"{path.name}: {name}"


def test_floor_1_never_takes_torch_or_spark() -> None:
    """Spark executors and login nodes run floor 1 without torch."""
    for path in sources("dist"):
        if floor_of(f"dist.{path.stem}") == 1:
            for name in imports(path):
                top = name.split(".")[0]
                allowed = top == "dist" or top in sys.stdlib_module_names | FLOOR_1_MAY_USE
                assert allowed, f"{path.name}: {name}"
            for name in imports(path, top_only=True):
                assert name.split(".")[0] not in FLOOR_1_LAZY, f"{path.name}: {name} at the top"


def test_only_floor_3_imports_lightning() -> None:
    """Lightning's private hooks move; they may reach two files and the recipes, no more."""
    for path in sources("dist"):
        if floor_of(f"dist.{path.stem}") < 3:
            tops = {name.split(".")[0] for name in imports(path)}
            assert not tops & LIGHTNING, path.name


def test_no_recipe_imports_another() -> None:
    """A recipe is copied as one file; what two share is a function of dist.

    A recipe is a file of recipes/ that defines main(). Model files (llama.py: no main) may be
    imported by recipes, and import none themselves.
    """
    recipes = {path.stem for path in sources("recipes") if has_main(path)}
    for path in sources("recipes"):
        for name in imports(path):
            top, _, rest = name.partition(".")
            assert top not in ("spark_jobs", "launch"), f"{path.name}: {name}"
            assert not (top == "recipes" and rest in recipes - {path.stem}), f"{path.name}: {name}"


def test_spark_jobs_use_floors_0_and_1() -> None:
    """A job that imports torch costs every executor seconds and a gigabyte."""
    banned = LIGHTNING | {"torch", "recipes", "launch", "transformers"}
    for path in sources("spark_jobs"):
        for name in imports(path):
            assert name.split(".")[0] not in banned, f"{path.name}: {name}"
            if name.startswith("dist."):
                assert floor_of(name) <= 1, f"{path.name}: {name}"


def test_launch_is_light() -> None:
    """It answers on login nodes in 0.3 s: floor 0 at the top, floor 1 inside functions, no more."""
    for path in sources("launch"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top not in ("recipes", "spark_jobs", "pyspark"), f"{path.name}: {name}"
            # agent.py is the torchrun process itself, started by launch, never imported by it.
            assert top != "torch" or path.name == "agent.py", f"{path.name}: {name}"
            if top == "dist":
                assert floor_of(name) <= 1, f"{path.name}: {name}"
        for name in imports(path, top_only=True):
            top = name.split(".")[0]
            assert top in ("dist", "launch") or top in sys.stdlib_module_names, (
                f"{path.name}: {name} at the top"
            )
            assert top != "dist" or floor_of(name) == 0, f"{path.name}: {name} at the top"


@pytest.mark.parametrize("room", ROOMS)
def test_init_is_a_docstring(room: str) -> None:
    """Code in __init__.py runs with every import of the room."""
    tree = ast.parse((ROOT / room / "__init__.py").read_text())
    assert len(tree.body) == 1 and ast.get_docstring(tree), f"{room}/__init__.py"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_flat(room: str) -> None:
    """No sub-packages: a file's name says where it is."""
    assert not list((ROOT / room).glob("*/*.py"))


def test_tests_are_about_our_names() -> None:
    """`import torch.distributed as dist` hides the room in whichever file it stands."""
    for folder in (*ROOMS, "tests", "benchmarks"):
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    pairs = [(alias.name, alias.asname) for alias in node.names]
                    assert ("torch.distributed", "dist") not in pairs, path


def import_all(modules: list[str], blocked: list[str]) -> subprocess.CompletedProcess[str]:
    """Import `modules` in a new process in which importing `blocked` fails."""
    code = (
        "import importlib, sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def names_of(room: str) -> list[str]:
    return [f"{room}.{path.stem}" for path in sources(room) if path.stem != "__init__"]


def test_rooms_import_without_torch() -> None:
    """What the source does not show: torch brought in by a library, or by a late import at top."""
    low = [name for name in names_of("dist") if floor_of(name) <= 1]
    modules = low + names_of("spark_jobs") + names_of("launch")
    done = import_all(modules, ["torch", "pytorch_lightning", "lightning"])
    assert done.returncode == 0, done.stderr


def test_floors_0_and_1_import_without_spark() -> None:
    """Trainers have no Spark."""
    low = [name for name in names_of("dist") if floor_of(name) <= 1]
    done = import_all(low + names_of("launch"), ["torch", "pyspark", "py4j"])
    assert done.returncode == 0, done.stderr


def test_floor_0_and_launch_import_with_nothing_installed() -> None:
    """-S leaves site-packages out: only the standard library is there."""
    modules = [name for name in names_of("dist") if floor_of(name) == 0] + names_of("launch")
    code = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_importing_does_nothing() -> None:
    """Logging set up, environment changed, or something printed by an import."""
    modules = [name for name in names_of("dist") if floor_of(name) <= 1] + names_of("launch")
    code = (
        "import importlib, logging, os, threading\n"
        "before = dict(os.environ)\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "assert dict(os.environ) == before, 'environment'\n"
        "assert not logging.root.handlers, 'logging'\n"
        "assert threading.active_count() == 1, 'threads'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
