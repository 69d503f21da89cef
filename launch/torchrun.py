"""The torchrun command of a training run, as a pure function of its inputs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist.errors import ConfigError

AGENT = "launch.agent"
TORCHRUN = "torch.distributed.run"
# Without the address ranks look for each other under this machine's name, and wait for five
# minutes where it does not resolve (containers, laptops off the network).
STANDALONE = ("--standalone", "--local-addr=127.0.0.1")


def torchrun_argv(
    target: str,
    arguments: Sequence[str],
    *,
    nproc: int,
    python: str = sys.executable,
    launcher: str = TORCHRUN,
    meeting: Sequence[str] = STANDALONE,
    more: Sequence[str] = (),
) -> list[str]:
    """The words of the command that runs `target` on `nproc` ranks of this machine.

    `meeting` says where several nodes meet (launch/nodes.py); `more` are options of torchrun.

    `target` is a module ("recipes.pretrain") or a path that ends in .py. `--standalone` takes a
    free port, so two runs on one machine never meet. `launcher` is torchrun's module, or our
    agent: the same program and the same arguments, with signals and exit codes kept.
    """
    options = [*meeting, f"--nproc-per-node={nproc}", "--max-restarts=0", *more]
    if not target.endswith(".py"):
        options.append("-m")
    # Without `--` torchrun reads the recipe's options too, and refuses `--run` as an ambiguous
    # short form of its own --run-path.
    return [python, "-m", launcher, *options, "--", target, *arguments]


def torchrun_env(nproc: int, environ: Mapping[str, str], num_cores: int) -> dict[str, str]:
    """Settings that torchrun would otherwise choose badly; what the user has set stays."""
    if "OMP_NUM_THREADS" in environ:
        return {}
    # torchrun sets 1 with a warning for several ranks, and nothing for one.
    return {"OMP_NUM_THREADS": str(max(1, num_cores // nproc))}


def num_gpus(environ: Mapping[str, str] = os.environ, dev: Path = Path("/dev")) -> int:
    """NVIDIA GPUs that this process may use, told without importing torch."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    return len([p for p in dev.glob("nvidia[0-9]*") if p.name.removeprefix("nvidia").isdigit()])


def parse_nproc(text: str, gpus: int) -> int:
    """Ranks on this machine: a number, or `auto` = one for each GPU, and one without any."""
    if text == "auto":
        return max(1, gpus)
    try:
        nproc = int(text)
    except ValueError:
        nproc = 0
    if nproc < 1:
        raise ConfigError(f"--nproc {text!r} is not a number of ranks: give 1, 2, ... or auto")
    return nproc
