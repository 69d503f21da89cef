"""The Lightning callback behind `micro_batch: auto`: trial steps before the first real one."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any, Protocol

import torch
from pytorch_lightning import Callback, Trainer

from dist.loader import TokenLoader
from dist.mesh import on_rank_zero
from dist.micro_batch import (
    MicroBatch,
    budget_bytes,
    find_micro_batch,
    full_batch,
    measured_trial,
)
from dist.order import num_micro_batches
from dist.ranks import Ranks
from dist.run_dir import RunDir

FILE = "micro_batch.json"


class MicroBatchConfig(Protocol):
    """What this file reads of a recipe's config."""

    @property
    def micro_batch(self) -> MicroBatch: ...
    @property
    def global_batch(self) -> int: ...
    @property
    def activation_checkpointing(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def compile(self) -> Any: ...
    @property
    def parallel(self) -> Any: ...


class AutoMicroBatch(Callback):
    """Finds the micro-batch on the real model, strategy and optimizer; give it to Trainer first.

    `rows` is the number from the config, or the one that the run found in an earlier start of the
    same shape, which is kept: another one would sum gradients in another order and end bitwise
    equality. Otherwise it is 0 until on_fit_start has found one; a trial changes no parameter, no
    optimizer state and no random number of training. `loaders` must be set before fit.
    """

    def __init__(
        self, run: RunDir, config: MicroBatchConfig, schema: dict[str, Any], ranks: Ranks,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._run, self._config, self._schema, self._ranks = run, config, schema, ranks
        self._device = device
        self.loaders: list[TokenLoader] = []
        self.rows = 0
        if config.micro_batch != "auto":
            self.rows = config.micro_batch
        else:
            self.rows = on_rank_zero(lambda: _read(run).get(self._shape(), {}).get("rows", 0))

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.rows:
            return
        plan = self.loaders[0].plan
        rows_per_rank = -(-plan.batch // plan.world_size)
        optimizer: Any = trainer.optimizers[0]
        # A step that found an infinity makes the optimizer's state and changes nothing else.
        optimizer.found_inf = torch.ones((), device=self._device)
        try:
            for parameter in pl_module.net.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            found = find_micro_batch(
                rows_per_rank,
                lambda rows: self._trial(trainer, pl_module, rows, rows < rows_per_rank),
                budget_bytes(self._device, self._ranks.local_world_size),
            )
        finally:
            optimizer.zero_grad(set_to_none=True)
            optimizer.state.clear()
            del optimizer.found_inf
        self.rows = found.rows
        for loader in self.loaders:
            loader.plan = dataclasses.replace(loader.plan, micro_batch=found.rows)
        trainer.accumulate_grad_batches = num_micro_batches(plan.batch, plan.world_size, found.rows)
        if trainer.is_global_zero:
            record = {**_read(self._run), self._shape(): dataclasses.asdict(found)}
            self._run.write(FILE, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
            print(f"micro_batch auto: {found}", file=sys.stderr)

    def _trial(self, trainer: Trainer, pl_module: Any, rows: int, accumulates: bool) -> int | None:
        """Peak bytes of a step of one or two micro-batches of full rows."""
        optimizer = trainer.optimizers[0]

        def step() -> None:
            batch = full_batch(rows, self._schema).to(self._device)
            if accumulates:
                # Its gradients, under FSDP whole ones, are there during the next micro-batch.
                with trainer.strategy.block_backward_sync():
                    pl_module.training_step(batch, 0)["loss"].backward()
            pl_module.training_step(batch, 0)["loss"].backward()
            optimizer.step()

        try:
            return measured_trial(step, self._device)
        finally:
            optimizer.zero_grad(set_to_none=True)

    def _shape(self) -> str:
        """What the number depends on; a start with another shape finds its own."""
        config, device = self._config, self._device
        where = "cpu"
        if device.type == "cuda":
            where = torch.cuda.get_device_properties(device).name
        parallel = json.dumps(dataclasses.asdict(config.parallel), sort_keys=True)
        return (
            f"batch {config.global_batch} on {self._ranks.world_size} x {where}, {parallel}, "
            f"{config.precision}, activations {config.activation_checkpointing}, "
            f"compile {config.compile}"
        )


def _read(run: RunDir) -> dict[str, Any]:
    try:
        return dict(json.loads((run.path / FILE).read_bytes()))
    except (OSError, ValueError):
        return {}
