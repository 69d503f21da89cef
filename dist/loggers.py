"""Loggers of other tools beside metrics.jsonl: csv, TensorBoard, W&B, MLflow, by Lightning's own.

They are no part of the training: a thread hands them their numbers, and one that fails (a full
disk, a network that is down) is warned of once and left out from then on. What identifies the
run for each of them is kept in the run's `loggers.json`, so that every restart goes on in the
same place.
"""

from __future__ import annotations

import importlib.util
import json
import netrc
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dist.errors import ConfigError, SetupError
from dist.run_dir import RunDir

LoggerName = Literal["csv", "tensorboard", "wandb", "mlflow"]
LOGGERS_JSON = "loggers.json"
FLUSH_TIMEOUT_S = 20.0
MAX_WAITING = 1000
# The module that each needs, and how to get it.
_NEEDS = {
    "csv": ("pytorch_lightning", ""),
    "tensorboard": ("tensorboard", "pip install 'leyden[tensorboard]'"),
    "wandb": ("wandb", "pip install wandb"),
    "mlflow": ("mlflow", "pip install 'leyden[mlflow]'"),
}


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Loggers beside the run's own metrics.jsonl."""

    to: list[LoggerName] = field(default_factory=list)
    """Any of csv, tensorboard, wandb, mlflow; local files, unless W&B has a key or MLflow's
    MLFLOW_TRACKING_URI names a server."""
    project: str = "leyden"
    """W&B project and MLflow experiment."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.to if name not in _NEEDS]
        if unknown or len(set(self.to)) != len(self.to):
            raise ConfigError(
                f"log.to is {list(self.to)}; give each of {', '.join(_NEEDS)} at most once"
            )


class Loggers:
    """A thread that tells loggers what happens; made on rank 0 alone. Nothing here raises."""

    def __init__(self, loggers: Mapping[str, Any]) -> None:
        self._loggers = dict(loggers)
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue(MAX_WAITING)
        self._full = False
        self._thread = threading.Thread(target=self._run, name="loggers", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hand on the numbers of a step; returns at once."""
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and name not in ("step", "attempt")
        }
        self._tell(lambda logger: logger.log_metrics(numbers, step))

    def config(self, config: dict[str, Any]) -> None:
        """Hand on the resolved config."""
        self._tell(lambda logger: logger.log_hyperparams(config))

    def close(self, status: str = "success") -> None:
        """Give the loggers FLUSH_TIMEOUT_S for what is left; safe to call twice."""
        if not self._thread.is_alive():
            return
        self._tell(lambda logger: _finish(logger, status), wait_s=FLUSH_TIMEOUT_S)
        self._tell(None, wait_s=FLUSH_TIMEOUT_S)
        self._thread.join(FLUSH_TIMEOUT_S)
        if self._thread.is_alive():
            print(f"warning: loggers had not ended after {FLUSH_TIMEOUT_S:.0f} s", file=sys.stderr)

    def _tell(self, call: Callable[[Any], Any] | None, wait_s: float = 0.0) -> None:
        try:
            self._queue.put(call, block=wait_s > 0, timeout=wait_s or None)
        except queue.Full:
            if not self._full:
                print(f"warning: loggers ({', '.join(self._loggers)}) are slower than training; "
                      "some of their numbers are left out", file=sys.stderr)  # fmt: skip
            self._full = True

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            for name, logger in list(self._loggers.items()):
                try:
                    call(logger)
                except BaseException as error:  # whatever a tool raises, the run goes on
                    del self._loggers[name]
                    print(
                        f"warning: the logger {name} failed and is left out from now on "
                        f"({type(error).__name__}: {error}); metrics.jsonl has every number",
                        file=sys.stderr,
                    )


def _finish(logger: Any, status: str) -> None:
    logger.save()
    logger.finalize(status)
    if type(logger).__name__ == "WandbLogger":
        # Lightning leaves the run open for others of the process; the next attempt opens its own.
        logger.experiment.finish()


def check_loggers(config: LogConfig) -> None:
    """SetupError naming the first logger whose package is not installed."""
    for name in config.to:
        module, command = _NEEDS[name]
        if importlib.util.find_spec(module) is None:
            raise SetupError(
                f"log.to names {name}, but the package {module} is not installed; {command}, "
                f"or leave {name} out of log.to"
            )


def open_loggers(
    run: RunDir, config: LogConfig, *, attempt: int, warn: Callable[[str], None] | None = None
) -> Loggers | None:
    """The loggers of a config on rank 0, in the run's folder; None without any.

    One that cannot be opened is warned of and left out.
    """
    if not config.to:
        return None
    ids = _read_ids(run)
    opened: dict[str, Any] = {}
    for name in config.to:
        try:
            opened[name] = _open(name, run, config, ids, attempt)
        except Exception as error:
            said = f"the logger {name} cannot be opened ({type(error).__name__}: {error})"
            (warn or _warn)(said)
    try:
        run.write(LOGGERS_JSON, json.dumps(ids, indent=1, sort_keys=True).encode())
    except SetupError as error:
        (warn or _warn)(f"logger ids are not kept: {error}")
    return Loggers(opened)


def _open(name: str, run: RunDir, config: LogConfig, ids: dict[str, str], attempt: int) -> Any:
    from pytorch_lightning import loggers

    folder = run.path.absolute() / "loggers"
    run_id = str((run.read_run() or {}).get("run_id", run.name))
    if name == "csv":
        # Lightning's begins its file anew: one a start.
        ids["csv"] = run_id
        version = f"attempt-{attempt}"
        return loggers.CSVLogger(folder, name="csv", version=version, flush_logs_every_n_steps=1)
    folder.mkdir(exist_ok=True)
    if name == "tensorboard":
        ids["tensorboard"] = run_id
        return loggers.TensorBoardLogger(folder, name="tensorboard", version=ids["tensorboard"])
    if name == "wandb":
        ids.setdefault("wandb", run_id)
        made = loggers.WandbLogger(
            name=run.name, id=ids["wandb"], project=config.project, save_dir=folder,
            offline=not has_wandb_key(), resume="allow",
        )  # fmt: skip
        _ = made.experiment  # opens the run: it must fail here, not in training
        return made
    # Files, not SQLite: it needs two more packages, and locks that network file systems lack.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlflow").as_uri()
    mlflow = loggers.MLFlowLogger(
        config.project, run_name=run.name, tracking_uri=uri, run_id=ids.get("mlflow"),
    )  # fmt: skip
    ids["mlflow"] = str(mlflow.run_id)
    return mlflow


def has_wandb_key(environ: Mapping[str, str] | None = None) -> bool:
    """Whether W&B can be reached with a key of this user; without one it stays offline."""
    env = os.environ if environ is None else environ
    if env.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return False
    if env.get("WANDB_API_KEY"):
        return True
    host = env.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].strip("/")
    try:
        return netrc.netrc(env.get("NETRC") or None).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _read_ids(run: RunDir) -> dict[str, str]:
    try:
        record = json.loads((Path(run.path) / LOGGERS_JSON).read_text())
        return {str(name): str(value) for name, value in record.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _warn(text: str) -> None:
    print(f"warning: {text}; the run goes on without it", file=sys.stderr)
