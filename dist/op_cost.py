"""FLOPs, bytes and messages of a step, counted operation by operation as it is traced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Allocations and aliases: no work.
_FREE = ("empty", "detach", "alias", "lift", "_unsafe_view", "_reshape_alias", "wait_tensor")


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation."""

    flops: int
    bytes: int
    """Read and written, if each tensor goes through memory once."""
    half: bool
    """Whether its floating-point inputs are 16-bit."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One collective."""

    kind: str
    """all_gather, reduce_scatter, all_reduce or other."""
    bytes: int
    """The whole tensor: what all ranks of the group hold together of it."""
    ranks: int
    """Size of its group."""
    waited_for: bool = False
    """Whether nothing else is computed meanwhile: tensor parallelism's, within each layer."""


class Costs:
    """Operations and messages by phase; the trace sets the phase."""

    def __init__(self) -> None:
        self.phase = "forward"
        self.ops: dict[str, list[Op]] = {}
        self.messages: dict[str, list[Message]] = {}
        self.waited_for: set[str] = set()
        """Names of the process groups whose messages hold up computing."""

    def flops(self) -> int:
        """Of all phases."""
        return sum(op.flops for ops in self.ops.values() for op in ops)

    def add(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Count one operation; `result` is what it gave."""
        if func.namespace in ("c10d", "_c10d_functional"):
            self._message(func, args, result)
        if func.is_view or func.__name__.startswith(_FREE):
            return
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        outputs = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        known = {id(one) for one in inputs}
        moved = sum(map(num_bytes, inputs))
        moved += sum(num_bytes(one) for one in outputs if id(one) not in known)
        flops = _flops(func, args, kwargs, result)
        if flops or moved:
            half = any(one.is_floating_point() and one.element_size() == 2 for one in inputs)
            op = Op(flops=flops, bytes=moved, half=half)
            self.ops.setdefault(self.phase, []).append(op)

    def _message(self, func: Any, args: Any, result: Any) -> None:
        kind = _kind(func.__name__)
        tensors = [one for one in tree_leaves((args, result)) if isinstance(one, Tensor)]
        if not kind or not tensors:
            return
        # A gather's output and a scatter's input are the whole; both are the largest tensor.
        size = max(map(num_bytes, tensors))
        group = _group_of(args)
        message = Message(
            kind=kind, bytes=size, ranks=group.size(),
            waited_for=group.group_name in self.waited_for,
        )  # fmt: skip
        self.messages.setdefault(self.phase, []).append(message)


def _kind(name: str) -> str:
    plain = name.replace("_", "")
    if "reducescatter" in plain:
        return "reduce_scatter"
    if "allgather" in plain:
        return "all_gather"
    if "allreduce" in plain:
        return "all_reduce"
    return "" if "wait" in plain or "barrier" in plain else "other"


def _group_of(args: Any) -> torch.distributed.ProcessGroup:
    """The process group among a collective's arguments, of which it is the last word."""
    for one in reversed(args):
        if isinstance(one, str):
            return torch.distributed.distributed_c10d._resolve_process_group(one)
        if isinstance(one, torch.ScriptObject):
            try:
                return torch.distributed.ProcessGroup.unbox(one)
            except (RuntimeError, TypeError):
                continue  # a reduce operation
    return torch.distributed.group.WORLD


def num_bytes(tensor: Tensor) -> int:
    """Of its elements."""
    return tensor.numel() * tensor.element_size()


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    name = func.__name__.partition(".")[0]
    if name in ("_varlen_attn", "_varlen_attn_backward"):
        return _varlen_flops(name, args)
    if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
        return _cpu_attention_flops(name, args)
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0


def _varlen_flops(name: str, args: Any) -> int:
    """Causal attention in documents of `max_len` tokens: half of all pairs, two matmuls forward
    and five backward. torch's own formula wants as many key as query heads."""
    if name == "_varlen_attn":
        query, longest, matmuls = args[0], args[5], 2
    else:
        query, longest, matmuls = args[1], args[8], 5
    tokens, heads, head_dim = query.shape
    return matmuls * tokens * longest * heads * head_dim


def _cpu_attention_flops(name: str, args: Any) -> int:
    """All pairs of queries and keys; not among torch's formulas."""
    query, key, matmuls = (args[1], args[2], 5) if "backward" in name else (args[0], args[1], 2)
    batch, heads, num_queries, head_dim = query.shape
    return 2 * matmuls * batch * heads * num_queries * key.shape[2] * head_dim
