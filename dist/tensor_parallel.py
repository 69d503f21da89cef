"""Tensor parallelism: the layers of a Megatron-style block, and a loss over a split vocabulary.

Letters: N tokens, D hidden size, V vocabulary, v rows of it on this rank, C tokens of a chunk.
Between layers every rank of a group holds the same activations: one all-reduce after attention
and one after the MLP, forward and backward (Shoeybi et al., "Megatron-LM", 2019).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from dist.errors import ConfigError
from dist.loss import chunk_tokens, keep_gradients, kept_gradients


def check_divides(tp: int, sizes: dict[str, int]) -> None:
    """ConfigError naming the sizes that tp ranks cannot split evenly."""
    odd = [f"{name} {size}" for name, size in sizes.items() if size % tp]
    if odd:
        raise ConfigError(
            f"parallel.tp {tp} does not divide {', '.join(odd)}; set parallel.tp to a divisor of "
            "all of them"
        )


def split_block(
    block: nn.Module, mesh: DeviceMesh, column: tuple[str, ...], row: tuple[str, ...],
    inputs: dict[str, str | None],
) -> None:  # fmt: skip
    """Split one block's linear layers (in place): `column` by outputs, `row` by inputs.

    `inputs` names the submodules whose input the column layers share, each with the keyword that
    it comes by (None: the first argument): their gradients are summed before one all-reduce.
    """
    plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in column}
    plan |= {name: RowwiseParallel() for name in row}
    same = Replicate()
    for name, keyword in inputs.items():
        if keyword is None:
            plan[name] = PrepareModuleInput(input_layouts=(same,), desired_input_layouts=(same,))
        else:
            plan[name] = PrepareModuleInput(
                input_kwarg_layouts={keyword: same}, desired_input_kwarg_layouts={keyword: same}
            )
    parallelize_module(block, mesh, plan)


def split_vocabulary(embedding: nn.Embedding, head: nn.Linear, mesh: DeviceMesh) -> None:
    """Split the rows of an embedding and of the output matrix (in place); tied ones stay tied.

    The head's module is not to be called: give its weight to vocab_parallel_loss.
    """
    tied = head.weight is embedding.weight
    parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate()))
    if tied:
        head.weight = embedding.weight
    else:
        head.weight = nn.Parameter(distribute_tensor(head.weight, mesh, [Shard(0)]))


def vocab_parallel_loss(
    hidden_ND: Tensor, weight_VD: DTensor, targets_N: Tensor, valid_N: Tensor, chunk: int = 0,
    losses_N: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dist.loss.summed_loss where ranks of a group hold rows of the output matrix.

    Every rank has the same hidden states, returns the same sum, and gets the full gradient of the
    hidden states. Two numbers a token travel forward, and one all-reduce of N x D for backward.
    """
    if chunk <= 0:
        chunk = chunk_tokens(weight_VD.to_local().shape[0], hidden_ND.device)
    mesh = weight_VD.device_mesh
    # torch.chunk's sizes: all ranks before this one hold full pieces.
    first = mesh.get_local_rank() * -(-weight_VD.shape[0] // mesh.size())
    return _VocabParallelLoss.apply(
        hidden_ND, weight_VD.to_local(), targets_N - first, valid_N, chunk, mesh.get_group(),
        losses_N,
    )  # fmt: skip


class _VocabParallelLoss(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_vD: Tensor, targets_N: Tensor, valid_N: Tensor,
        chunk: int, group: torch.distributed.ProcessGroup, losses_N: Tensor | None,
    ) -> Tensor:  # fmt: skip
        wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=wide, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_weight = torch.zeros_like(weight_vD, dtype=wide) if wants_weight else None
        num_rows = len(weight_vD)
        for start in range(0, len(hidden_ND), chunk):
            here = slice(start, start + chunk)
            h_CD = hidden_ND[here]
            target_C = targets_N[here]
            keep_C1 = valid_N[here].unsqueeze(1).to(wide)
            mine_C1 = ((target_C >= 0) & (target_C < num_rows)).unsqueeze(1)
            target_C1 = target_C.clamp(0, num_rows - 1).unsqueeze(1)
            logits_Cv = torch.mm(h_CD, weight_vD.t()).to(wide)
            # The target's logit is on one rank; the others give 0.
            own_C1 = torch.where(mine_C1, logits_Cv.gather(1, target_C1), 0.0)
            parts = torch.cat((logits_Cv.logsumexp(1, keepdim=True), own_C1), dim=1)
            every = parts.new_empty(group.size(), *parts.shape)  # (ranks, C, 2)
            torch.distributed.all_gather(list(every.unbind()), parts, group=group)
            logsum_C1 = every[:, :, 0].logsumexp(0).unsqueeze(1)
            loss_C1 = (logsum_C1 - every[:, :, 1].sum(0).unsqueeze(1)) * keep_C1
            total += loss_C1.sum()
            if losses_N is not None:
                losses_N[here] = loss_C1.squeeze(1)
            if not (wants_hidden or wants_weight):
                continue
            # d loss / d logits = softmax - one_hot, in place of the logits.
            grad_Cv = logits_Cv.sub_(logsum_C1).exp_().mul_(keep_C1)
            grad_Cv.scatter_add_(1, target_C1, -keep_C1 * mine_C1)
            grad_Cv = grad_Cv.to(h_CD.dtype)
            if grad_hidden is not None:
                grad_hidden[here] = torch.mm(grad_Cv, weight_vD)
            if grad_weight is not None:
                grad_weight += torch.mm(grad_Cv.t(), h_CD)
        if grad_hidden is not None:
            torch.distributed.all_reduce(grad_hidden, group=group)
        return keep_gradients(ctx, total, grad_hidden, grad_weight, weight_vD.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return kept_gradients(ctx, grad)
