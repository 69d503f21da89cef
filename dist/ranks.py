"""Who am I: rank and world size from torchrun's variables, else from SLURM's, else alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dist.errors import SetupError


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place in the run; `world_size` processes, `local_world_size` on this node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise SetupError(f"rank {self.rank} does not exist in a world of {self.world_size}")
        if not 0 <= self.local_rank < self.local_world_size:
            raise SetupError(
                f"local rank {self.local_rank} does not exist among {self.local_world_size} "
                "local ranks"
            )

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> Ranks:
        """torchrun sets RANK and WORLD_SIZE; under srun alone SLURM_PROCID and SLURM_NTASKS.

        A SLURM job without a step (a batch script, salloc's shell) is one process. A launcher that
        knows how many ranks there must be says so in LEYDEN_NUM_RANKS (N or MIN:MAX): N nodes
        that did not find each other are N worlds, each of which would train the whole run.
        """
        env = os.environ if env is None else env
        ranks = cls._read(env)
        least, _, most = env.get("LEYDEN_NUM_RANKS", "").partition(":")
        if least.isdigit() and not int(least) <= ranks.world_size <= int(most or least):
            raise SetupError(
                f"this world has {ranks.world_size} ranks, and the launch is of {least}"
                f"{f' to {most}' if most else ''}: the nodes did not find each other; check that "
                "all were started with the same --nnodes and --rdzv"
            )
        return ranks

    @classmethod
    def _read(cls, env: Mapping[str, str]) -> Ranks:
        try:
            if "RANK" in env and "WORLD_SIZE" in env:
                world = int(env["WORLD_SIZE"])
                return cls(
                    rank=int(env["RANK"]),
                    world_size=world,
                    local_rank=int(env.get("LOCAL_RANK", "0")),
                    local_world_size=int(env.get("LOCAL_WORLD_SIZE", str(world))),
                    node_rank=int(env.get("GROUP_RANK", env.get("NODE_RANK", "0"))),
                )
            if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
                world = int(env["SLURM_STEP_NUM_TASKS"])
                per_node = env.get("SLURM_STEP_TASKS_PER_NODE", str(world))
                return cls(
                    rank=int(env["SLURM_PROCID"]),
                    world_size=world,
                    local_rank=int(env.get("SLURM_LOCALID", "0")),
                    local_world_size=_tasks_of_node(per_node, int(env.get("SLURM_NODEID", "0"))),
                    node_rank=int(env.get("SLURM_NODEID", "0")),
                )
        except ValueError as error:
            raise SetupError(f"a rank variable of the launcher is not a number: {error}") from None
        return cls()


def _tasks_of_node(spec: str, node: int) -> int:
    """Tasks on one node from SLURM's list, as in '4(x2),3' for 4, 4 and 3 tasks."""
    counts: list[int] = []
    for part in spec.split(","):
        number, _, times = part.partition("(x")
        counts += [int(number)] * int(times.rstrip(")") or 1)
    return counts[min(node, len(counts) - 1)]
