"""Replicas of a model hold the same bits; a rank whose memory or arithmetic lies is named.

ddp, hsdp and the replicas of tensor parallelism average gradients and take the same step, so their
parameters are equal bit for bit. Every `guard.check_replicas_every` steps, and before a save, each
rank adds up its bits (one number), and all compare. A flipped bit shows at the next comparison,
unless updates have rounded the difference away until then, which takes a lowest bit; then the
copies are equal again. fsdp and ZeRO hold one copy: nothing to compare.
"""

from __future__ import annotations

import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed
from pytorch_lightning import Callback, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist.batch import Batch
from dist.errors import LeydenError
from dist.mesh import Layout, PeerFailed
from dist.run_recorder import RunRecorder

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicasDiffer(LeydenError):
    """Copies of the weights that must be equal are not; the attempt ends, a restart may go on."""


@torch.no_grad()
def bits_sum(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of the bit patterns of all local elements, the i-th tensor's times 2i + 1, modulo 2^64.

    An int64 scalar on the tensors' device. Any one flipped bit changes it.
    """
    total: Tensor | None = None
    for number, tensor in enumerate(tensors):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        words = local.detach().contiguous().view(_WORDS[local.element_size()])
        one = words.sum(dtype=torch.int64) * (2 * number + 1)
        total = one if total is None else total + one
    return torch.zeros((), dtype=torch.int64) if total is None else total


def odd_ones(sums: list[int], layout: Layout) -> tuple[list[int], bool]:
    """Ranks whose sum is not that of most replicas of the same part, and whether that is certain:
    without a majority (of two, say) all ranks of that part are returned.

    sums: by rank; rank = (replica * shards + shard) * tp + tp rank.
    """
    part = layout.shards * layout.tp
    found: list[int] = []
    certain = True
    for place in range(part):
        ranks = range(place, len(sums), part)
        (most, count), *_ = Counter(sums[rank] for rank in ranks).most_common(1)
        if count == len(ranks):
            continue
        majority = 2 * count > len(ranks)
        certain = certain and majority
        found += [rank for rank in ranks if not majority or sums[rank] != most]
    return sorted(found), certain


class ReplicaCheck(Callback):
    """Compares replicas; stands before the checkpoints: what is saved has been compared."""

    def __init__(self, recorder: RunRecorder, config: Any) -> None:
        """config: the recipe's (guard, save_every_steps)."""
        self._recorder, self._config = recorder, config

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        every, layout = self._config.guard.check_replicas_every, pl_module.layout
        off = self._config.guard.policy == "off" or every == 0 or layout.replicas == 1
        if off or not batch.ends_step:
            return
        step, saves = batch.step + 1, self._config.save_every_steps
        due = step % every == 0 or batch.stop or step == self._recorder.end_step
        if due or (saves > 0 and step % saves == 0):
            self._compare(trainer, pl_module, layout, step)

    def _compare(self, trainer: Trainer, pl_module: Any, layout: Layout, step: int) -> None:
        mine = bits_sum(pl_module.net.parameters())
        sums = mine.new_zeros(trainer.world_size)
        sums[trainer.global_rank] = mine
        torch.distributed.all_reduce(sums)
        found, certain = odd_ones(sums.tolist(), layout)
        if not found:
            return
        hosts: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(hosts, socket.gethostname())
        named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in found)
        which = "differs from" if certain else "differ, and none of them has a majority against"
        text = (
            f"the weights of replicas are no longer equal after step {step}: {named} {which} the "
            "others of the same part. Equal gradients and equal steps give equal bits, so memory "
            "or arithmetic went wrong there. Nothing of this step was saved; the next attempt "
            "goes on from the newest checkpoint. If it happens again, leave the host out"
        )
        if not trainer.is_global_zero:
            raise PeerFailed(text, ReplicasDiffer.exit_code)
        event = {"event": "replicas_differ", "step": step, "ranks": found, "certain": certain}
        try:
            self._recorder.write_line("ledger.jsonl", {**event, "text": text, "time": time.time()})
        except OSError as error:
            print(f"warning: the guard cannot write: {error}", file=sys.stderr)
        raise ReplicasDiffer(text)
