"""dist/strategies.py: Lightning runs on our ranks, our groups and our mesh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed
from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.distributed.tensor import DTensor

from dist.errors import ConfigError
from dist.precision import Precision
from dist.ranks import Ranks
from dist.sharding import ParallelConfig, arrange, shard_fsdp
from dist.strategies import LeydenEnvironment, make_strategy
from tests.run_ranks import run_ranks

DATA = [torch.full((2, 4), float(i)) for i in range(6)]


class Tiny(LightningModule):
    def __init__(self, strategy: str) -> None:
        super().__init__()
        self.strategy = strategy
        self.net: Any = None
        self.meshes: list[str] = []

    def configure_model(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        if self.strategy == "fsdp":
            self.meshes = list(self.device_mesh.mesh_dim_names)
            shard_fsdp(self.net, [], self.device_mesh, Precision(name="fp32", reason=""))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch * (1 + torch.distributed.get_rank())).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.01)


def fit(strategy: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
    ranks = Ranks.from_environment()
    parallel = ParallelConfig(strategy=strategy)  # type: ignore[arg-type]
    trainer = Trainer(
        accelerator="cpu", devices=ranks.local_world_size,
        strategy=make_strategy(parallel, arrange(parallel, ranks)),
        plugins=[LeydenEnvironment(ranks)], accumulate_grad_batches=2, max_steps=3,
        use_distributed_sampler=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Tiny(strategy)
    synced: list[bool] = []
    if strategy == "fsdp":
        inner = trainer.strategy.block_backward_sync
        trainer.strategy.block_backward_sync = lambda: (synced.append(False), inner())[1]
    trainer.fit(module, torch.utils.data.DataLoader(DATA, batch_size=None))
    values = [p.detach() for p in module.net.parameters()]
    facts = {
        "world": trainer.world_size,
        "rank": trainer.global_rank,
        "sharded": all(isinstance(p, DTensor) for p in values),
        "meshes": module.meshes,
        "not_synced": len(synced),
    }
    return [v.full_tensor() if isinstance(v, DTensor) else v.clone() for v in values], facts


def expected() -> list[torch.Tensor]:
    """The same three steps on two pretended ranks in one process."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        for batch in DATA[2 * step : 2 * step + 2]:
            for rank in range(2):
                (net(batch * (1 + rank)).mean() / 4).backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_trains_like_one_process(strategy: str) -> None:
    """Lightning's default sizes make FSDP2 of one rank each: parameters would drift apart."""
    for rank, (values, facts) in enumerate(run_ranks(fit, 2, 240, strategy)):
        assert facts["world"] == 2 and facts["rank"] == rank
        assert facts["sharded"] == (strategy == "fsdp")
        if strategy == "fsdp":
            # Half of the micro-batches do not end a step.
            assert facts["meshes"] == ["dp"] and facts["not_synced"] == 3
        for value, alone in zip(values, expected(), strict=True):
            torch.testing.assert_close(value, alone)


def test_environment_refuses_ranks_that_do_not_fit() -> None:
    """Nodes with unequal numbers of processes would give two processes one rank."""
    environment = LeydenEnvironment(
        Ranks(rank=3, world_size=5, local_rank=0, local_world_size=2, node_rank=1)
    )
    environment.set_global_rank(3)
    with pytest.raises(ValueError, match="world size 4 where it is 5"):
        environment.set_world_size(4)


def test_unknown_strategy_is_refused() -> None:
    """A typo must not train on one rank."""
    with pytest.raises(ConfigError, match="'fdsp'"):
        ParallelConfig(strategy="fdsp")  # type: ignore[arg-type]
