"""The Lightning callback that says which dtypes and kernels a run computes with."""

from __future__ import annotations

import json
import sys
from typing import Any

from pytorch_lightning import Callback, Trainer

from dist.batch import Batch
from dist.precision import found_dtypes
from dist.run_dir import RunDir


class Numerics(Callback):
    """After an attempt's first step: dtypes of the real tensors, in one line on stderr and, with
    `facts` (kernels, compilation), in attempts/<n>/numerics.json. Put it before Checkpoints."""

    def __init__(self, run: RunDir, attempt: int, facts: dict[str, Any]) -> None:
        self._run, self._attempt, self._facts = run, attempt, facts
        self.dtypes: dict[str, str] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self.dtypes or not batch.ends_step:
            return
        net = pl_module.net
        autocast = getattr(net, "autocast_dtype", None)
        self.dtypes = found_dtypes(net, trainer.optimizers[0], autocast)
        if not trainer.is_global_zero:
            return
        rows, accumulation = len(batch.tokens), batch.num_micro
        micro_batch = {"rows": rows, "accumulation": accumulation}
        record = {"dtypes": self.dtypes, "micro_batch": micro_batch, **self._facts}
        text = json.dumps(record, indent=1, sort_keys=True) + "\n"
        self._run.write(f"attempts/{self._attempt}/numerics.json", text.encode())
        said = ", ".join(f"{what.replace('_', ' ')} {name}" for what, name in self.dtypes.items())
        print(f"dtypes: {said}; micro-batch {rows} x {accumulation}", file=sys.stderr)
