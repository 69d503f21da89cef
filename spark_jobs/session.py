"""A quiet Spark session that ends cleanly, whatever ends the job.

`spark_session(...)` is a context manager. Inside it `run_with_progress` runs one action in a
side thread while the main thread draws the progress bar and stays free to take Ctrl-C and
SIGTERM; both end the JVM and its Python workers and leave no scratch files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from dist import errors
from dist.errors import LeydenError, SetupError
from dist.progress import Progress
from spark_jobs.java import java_home

Result = TypeVar("Result")

POLL_S = 0.2
JVM_END_S = 20.0
_SCRATCH_NAME = re.compile(r"leyden-spark-(?P<pid>\d+)-(?P<host>.+)-[^-]+")
# A worker's traceback ends with the error; an empty line or the JVM's stack trace follows.
_OUR_ERROR = re.compile(
    r"^(?:dist\.errors\.)?(?P<name>ConfigError|DataRefused|SetupError|LeydenError): "
    r"(?P<message>.*?)(?:\n\s*\n|\n\tat |\Z)",
    flags=re.MULTILINE | re.DOTALL,
)
# The JVM only moves rows between Python workers: with the optimising compiler a 300 MB job took
# 10 s more CPU (27 s against 17 s) and was slower (63 s against 56 s on two busy cores).
_JAVA_OPTIONS = "-XX:TieredStopAtLevel=1"
_LOG_CONFIG = """status = fatal
appenders = console
appender.console.type = Console
appender.console.name = console
appender.console.target = SYSTEM_ERR
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = spark: %p %c{1}: %m%n
rootLogger.level = off
rootLogger.appenderRef.console.ref = console
logger.gateway.name = org.apache.spark.api.python.PythonGatewayServer
logger.gateway.level = off
"""


def default_master(master: str) -> str:
    """The master to use: the config's, else the one spark-submit was given, else local[*]."""
    if master:
        return master
    # Under spark-submit the JVM runs already and knows its master: "" means do not touch it.
    return "" if "PYSPARK_GATEWAY_PORT" in os.environ else "local[*]"


@contextlib.contextmanager
def spark_session(master: str, app_name: str, *, scratch: str = "") -> Iterator[Any]:
    """Build a SparkSession and end it with its JVM, workers and scratch files.

    `scratch` is a node-local folder for shuffle files (default: the temporary folder).
    SIGTERM inside the block raises KeyboardInterrupt, as Ctrl-C does.
    """
    from pyspark.sql import SparkSession

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    # py4j reports a Ctrl-C in the middle of a call, with a traceback, through the root logger,
    # which without a handler prints it.
    silence = logging.NullHandler()
    logging.root.addHandler(silence)
    folder = _scratch_folder(scratch)
    spark = None
    try:
        _prepare_environment(folder, default_master(master))
        builder = SparkSession.builder.appName(app_name)
        for key, value in _settings(default_master(master), folder).items():
            builder = builder.config(key, value)
        try:
            spark = builder.getOrCreate()
        except Exception as error:
            raise SetupError(_start_failure(error, master)) from error
        if threading.current_thread() is threading.main_thread():
            # PySpark's own handler talks to the JVM on a connection that is in use just then.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # It would print a traceback when the JVM goes away first.
        spark.sparkContext._accumulatorServer.handle_error = lambda *_: None
        spark.sparkContext.setLogLevel("OFF")
        spark.sparkContext.addPyFile(str(_ship_packages(folder)))
        try:
            yield spark
        except Exception:
            spark.stop()
            raise
        spark.stop()
    finally:
        # On Ctrl-C there is no stop(): the connection to the JVM is in use by the action.
        _end_jvm()
        shutil.rmtree(folder, ignore_errors=True)
        logging.root.removeHandler(silence)


def run_with_progress(
    spark: Any, title: str, num_tasks: int, action: Callable[[], Result], *, enabled: bool = True
) -> Result:
    """Run a Spark action in a side thread with a progress bar of its tasks.

    Errors that our code raised in a worker come out as themselves, without Spark's wrapping.
    """
    answer: list[Result] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            answer.append(action())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="spark-action", daemon=True)
    thread.start()
    tracker = spark.sparkContext.statusTracker()
    seen: dict[int, int] = {}
    with Progress(title, total=num_tasks, unit="tasks", enabled=enabled) as bar:
        while thread.is_alive():
            thread.join(POLL_S)
            bar.set(min(_count_tasks(tracker, seen), num_tasks))
        if not failure:
            bar.set(num_tasks)
    if failure:
        raise unwrap_error(failure[0])
    return answer[0]


def unwrap_error(error: BaseException) -> BaseException:
    """The LeydenError that a worker raised, found in Spark's wrapping; else a short SetupError."""
    if isinstance(error, (LeydenError, KeyboardInterrupt)):
        return error
    text = str(error)
    if found := _OUR_ERROR.search(text):
        return getattr(errors, found["name"])(found["message"].strip())
    handle, log = tempfile.mkstemp(prefix="leyden-spark-error-", suffix=".log")
    with open(handle, "w") as file:
        file.write(text)
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("\tat ")]
    python = [line for line in lines if re.match(r"[A-Za-z_.]*(Error|Exception|Interrupt)\b", line)]
    said = (python or lines or [type(error).__name__])[-1 if python else 0]
    wrapped = LeydenError(f"a Spark task failed: {said.strip()} (the whole report is in {log})")
    wrapped.__cause__ = error
    return wrapped


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _count_tasks(tracker: Any, seen: dict[int, int]) -> int:
    """Completed tasks over all stages so far; `seen` remembers those of past stages."""
    # The JVM may be going down; the action's own thread reports why.
    with contextlib.suppress(Exception):
        for stage in set(tracker.getActiveStageIds()) | set(seen):
            info = tracker.getStageInfo(stage)
            if info is not None:
                seen[stage] = max(seen.get(stage, 0), min(info.numCompletedTasks, info.numTasks))
    return sum(seen.values())


def _settings(master: str, folder: Path) -> dict[str, str]:
    settings = {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.local.dir": str(folder),
        "spark.sql.warehouse.dir": str(folder / "warehouse"),
        "spark.sql.catalogImplementation": "in-memory",
        "spark.pyspark.python": sys.executable,
        "spark.python.worker.reuse": "true",
        # Workers take our code from the zip that was shipped, as it was when the job started,
        # and not from a folder `dist` where the user happens to stand.
        "spark.executorEnv.PYTHONSAFEPATH": "1",
        # The plans are fixed (repartitionById); re-planning could only merge partitions.
        "spark.sql.adaptive.enabled": "false",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        "spark.sql.execution.arrow.maxRecordsPerBatch": "20000",
        "spark.sql.execution.arrow.maxBytesPerBatch": str(16 << 20),
        "spark.task.maxFailures": "4",
    }
    if not master:
        return settings
    settings["spark.master"] = master
    if master.startswith("local"):
        # log4j reads its settings when the JVM starts: before that nothing else can quiet it.
        log_config = folder / "log4j2.properties"
        log_config.write_text(_LOG_CONFIG)
        java = f"-Dlog4j2.configurationFile={log_config.as_uri()} {_JAVA_OPTIONS}"
        settings |= {
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.memory": f"{_driver_memory_mib()}m",
            "spark.driver.extraJavaOptions": java,
            "spark.executor.extraJavaOptions": java,
        }
    elif master.startswith("spark://"):
        # The log settings lie on this node's disk, so the executors do without them.
        log_config = folder / "log4j2.properties"
        log_config.write_text(_LOG_CONFIG)
        java = f"-Dlog4j2.configurationFile={log_config.as_uri()} {_JAVA_OPTIONS}"
        settings |= {
            "spark.driver.memory": f"{_driver_memory_mib()}m",
            "spark.driver.extraJavaOptions": java,
            "spark.executor.extraJavaOptions": _JAVA_OPTIONS,
        }
    return settings


def _driver_memory_mib() -> int:
    """A quarter of the memory of this machine or container, between 1 and 8 GiB."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return max(1024, min(8192, total // 4 >> 20))


def _prepare_environment(folder: Path, master: str) -> None:
    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    os.environ["SPARK_LOCAL_DIRS"] = str(folder)
    os.environ["SPARK_WORKER_DIR"] = str(folder / "workers")
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        os.environ["JAVA_HOME"] = str(java_home())
        if master.startswith("local"):
            # Of a real cluster this machine must be reached from others.
            os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")


def _ship_packages(folder: Path) -> Path:
    """Zip dist and spark_jobs for the executors (a .whl given to addPyFile is ignored)."""
    root = Path(__file__).resolve().parent.parent
    target = folder / "leyden_code.zip"
    with zipfile.ZipFile(target, "w") as archive:
        for package in ("dist", "spark_jobs"):
            for path in sorted((root / package).glob("*.py")):
                archive.write(path, path.relative_to(root).as_posix())
    return target


def _scratch_folder(scratch: str) -> Path:
    """A fresh folder for this process; folders of dead processes of this host are removed."""
    base = Path(scratch or tempfile.gettempdir())
    host = socket.gethostname()
    try:
        base.mkdir(parents=True, exist_ok=True)
        for old in base.glob("leyden-spark-*"):
            match = _SCRATCH_NAME.fullmatch(old.name)
            if match and match["host"] == host and not Path(f"/proc/{match['pid']}").exists():
                shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=f"leyden-spark-{os.getpid()}-{host}-", dir=base))
    except OSError as error:
        raise SetupError(
            f"cannot use {base} for scratch files ({error.strerror}); set --scratch to a folder "
            "with free space on this machine"
        ) from error


def _start_failure(error: Exception, master: str) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"Spark did not start with master {default_master(master)!r}: {first}; check the master's "
        "name, the free memory and that 127.0.0.1 may be bound"
    )


def _end_jvm() -> None:
    """Close the JVM that we started: it ends by itself when its standard input closes."""
    from pyspark import SparkContext

    gateway = SparkContext._gateway
    process = getattr(gateway, "proc", None)
    if gateway is None or process is None:
        return
    with contextlib.suppress(Exception):
        process.stdin.close()
    try:
        process.wait(JVM_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with contextlib.suppress(Exception):
        gateway.shutdown()
    # A later session in this process (tests) must start a JVM of its own.
    SparkContext._gateway = SparkContext._jvm = SparkContext._active_spark_context = None
