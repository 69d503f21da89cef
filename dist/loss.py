"""Cross-entropy that never holds the logits of a whole batch, and its normalisation.

Letters: N tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

# One chunk's logits: 2**27 fp32 numbers are 512 MiB; on a CPU small chunks stay in its cache.
_CHUNK_LOGITS = {"cuda": 1 << 27, "cpu": 1 << 22}


def chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Tokens whose logits are made at once."""
    return max(16, _CHUNK_LOGITS.get(device.type, 1 << 24) // vocab_size)


def summed_loss(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, valid_N: Tensor, chunk: int = 0,
    losses_N: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sum over valid targets of -log softmax(hidden @ weight.T)[target], in nats; a scalar.

    Softmax and sum are in fp32 (fp64 for fp64 inputs). Gradients are made in the forward, chunk
    by chunk, so memory holds C x V logits and the two gradients, never N x V. losses_N: takes the
    terms of the sum, without gradients; 0 where a target is not valid.
    """
    if chunk <= 0:
        chunk = chunk_tokens(weight_VD.shape[0], hidden_ND.device)
    return _SummedLoss.apply(hidden_ND, weight_VD, targets_N, valid_N, chunk, losses_N)


class _SummedLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        valid_N: Tensor,
        chunk: int,
        losses_N: Tensor | None,
    ) -> Tensor:
        wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=wide, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
        # The sum over chunks is kept wide: bf16 would drop late chunks.
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if wants_weight else None
        for start in range(0, len(hidden_ND), chunk):
            here = slice(start, start + chunk)
            h_CD = hidden_ND[here]
            target_C1 = targets_N[here].unsqueeze(1)
            keep_C1 = valid_N[here].unsqueeze(1).to(wide)
            # Autocast, where it is on, picks the matmul's dtype.
            logits_CV = torch.mm(h_CD, weight_VD.t()).to(wide)
            logsum_C1 = torch.logsumexp(logits_CV, dim=1, keepdim=True)
            loss_C1 = (logsum_C1 - logits_CV.gather(1, target_C1)) * keep_C1
            total += loss_C1.sum()
            if losses_N is not None:
                losses_N[here] = loss_C1.squeeze(1)
            if not (wants_hidden or wants_weight):
                continue
            # d loss / d logits = softmax - one_hot, in place of the logits.
            grad_CV = logits_CV.sub_(logsum_C1).exp_().mul_(keep_C1)
            grad_CV.scatter_add_(1, target_C1, -keep_C1)
            grad_CV = grad_CV.to(h_CD.dtype)
            if grad_hidden is not None:
                grad_hidden[here] = torch.mm(grad_CV, weight_VD)
            if grad_weight is not None:
                grad_weight += torch.mm(grad_CV.t(), h_CD)
        return keep_gradients(ctx, total, grad_hidden, grad_weight, weight_VD.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return kept_gradients(ctx, grad)


def keep_gradients(
    ctx: Any, total: Tensor, grad_hidden: Tensor | None, grad_weight: Tensor | None,
    weight_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """End a forward that made its own gradients, for `kept_gradients`; returns the loss."""
    ctx.weight_dtype = weight_dtype
    ctx.save_for_backward(grad_hidden, grad_weight)
    return total


def kept_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The backward of such a forward; hidden states and weight are its first two arguments.

    Scaled in place, since a second wide V x D would be the largest tensor of all. A second
    backward through the same graph is therefore refused, by autograd itself.
    """
    grad_hidden, grad_weight = ctx.saved_tensors
    if grad_hidden is not None:
        grad_hidden.mul_(grad.to(grad_hidden.dtype))
    if grad_weight is not None:
        grad_weight = grad_weight.mul_(grad).to(ctx.weight_dtype)
    return grad_hidden, grad_weight, *(None for _ in ctx.needs_input_grad[2:])


def loss_scale(step_targets: int, num_ranks: int, accumulation: int) -> float:
    """Factor on a micro-batch's loss sum so that the step's gradient is the mean over targets.

    `step_targets` counts the valid targets of the whole step on all ranks. DDP and FSDP divide
    gradients by the number of ranks and Lightning by the accumulation; both are undone here, so
    1 x 8, 2 x 4 and 8 x 1 give the same gradient however targets are spread.
    """
    return num_ranks * accumulation / max(step_targets, 1)
