"""A world of any number of ranks in one process, tensors without memory, and what goes with them.

For the memory plan: the very recipe runs on it. Tensors are fake ones on the CPU also where a GPU
is planned (torch without CUDA cannot run autograd on fake CUDA tensors), so the choices that our
code makes by device are put in its place here, by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

import dist.attention
import dist.loss
from dist.batch import Batch
from dist.devices import Device
from dist.errors import SetupError
from dist.memory_trace import BUFFERS, GRADIENTS, LOSS, MemoryTrace
from dist.op_cost import Costs, Message

CPU = torch.device("cpu")
BUCKET_BYTES = 25 << 20
"""DistributedDataParallel's default bucket_cap_mb."""


@contextmanager
def pretended_world(num_ranks: int) -> Iterator[None]:
    """This process is rank 0 of `num_ranks`; collectives return at once and move nothing."""
    if torch.distributed.is_initialized():
        raise SetupError("a plan needs a process of its own: this one is in a process group")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def choices_of(device: Device) -> Iterator[None]:
    """What dist decides by a tensor's device is decided as on the planned one."""
    with ExitStack() as stack:
        if device.kind == "cuda":
            chunk = dist.loss.chunk_tokens
            stack.enter_context(
                _replaced(dist.loss, "chunk_tokens", lambda v, _: chunk(v, torch.device("cuda")))
            )
            stack.enter_context(_replaced(dist.attention, "attention_kernel", _cuda_kernel))
        yield


def _cuda_kernel(_: torch.device, dtype: torch.dtype) -> str:
    return "varlen" if dtype in (torch.bfloat16, torch.float16) else "mask"


@contextmanager
def loss_marked(trace: MemoryTrace) -> Iterator[None]:
    """What the chunked loss allocates counts as LOSS."""
    forward = dist.loss._SummedLoss.forward

    def marked(*args: Any) -> Any:
        with trace.region(LOSS):
            return forward(*args)

    with _replaced(dist.loss._SummedLoss, "forward", staticmethod(marked)):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def fake_batch(rows: int, schema: dict[str, Any], step_targets: int) -> Batch:
    """A micro-batch of `rows` full rows, one document each, as the loader would give it."""
    seq_len = int(schema["seq_len"])
    narrow = torch.uint16 if int(schema["vocab_size"]) <= 1 << 16 else torch.uint32
    return Batch(
        tokens=torch.empty(rows, seq_len + 1, dtype=narrow),
        pieces=torch.empty(2, 2 * rows, dtype=torch.int32),
        cu_seqlens=torch.empty(rows + 1, dtype=torch.int32),
        rows=torch.empty(rows, dtype=torch.int64),
        max_len=seq_len,
        num_targets=rows * seq_len,
        step_targets=step_targets,
    )


def stand_in_trainer(num_ranks: int, num_micro: int) -> Any:
    """What a recipe's module asks its Trainer for."""
    return SimpleNamespace(
        strategy=SimpleNamespace(root_device=CPU),
        accumulate_grad_batches=num_micro,
        world_size=num_ranks,
        global_rank=0,
        local_rank=0,
    )


class DdpBuckets:
    """DistributedDataParallel's memory, which its C++ reducer cannot do on fake tensors.

    torch/csrc/distributed/c10d/reducer.cpp with gradient_as_bucket_view: buckets as large as all
    gradients exist from the start; at the last micro-batch each new gradient is copied into its
    bucket and replaced by the view. (They are made anew once, after the first backward, one bucket
    at a time.)
    """

    def __init__(self, net: nn.Module, trace: MemoryTrace, costs: Costs) -> None:
        self.syncs = True
        """Whether the coming backward is the step's last."""
        self._trace, self._costs = trace, costs
        self._parameters = [p for p in net.parameters() if p.requires_grad]
        self._views: dict[Tensor, Tensor] = {}
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._reduce)

    def fill(self) -> None:
        """Allocate the buckets; they hold the gradients of a step that has been."""
        self._views = {p: torch.empty_like(p) for p in self._parameters}
        self._trace.enter(self._views.values(), GRADIENTS)
        for parameter, view in self._views.items():
            parameter.grad = view.detach()

    def _reduce(self, parameter: Tensor) -> None:
        self._trace.enter([parameter.grad], GRADIENTS)
        if self.syncs:
            view = self._views[parameter]
            view.copy_(parameter.grad)  # type: ignore[arg-type]
            parameter.grad = view.detach()

    def count_messages(self, num_ranks: int) -> None:
        """Enter the all-reduces of one backward."""
        left = sum(p.numel() * p.element_size() for p in self._parameters)
        messages = self._costs.messages.setdefault("backward", [])
        while left > 0 and num_ranks > 1:
            size = min(BUCKET_BYTES, left)
            messages.append(Message(kind="all_reduce", bytes=size, ranks=num_ranks))
            left -= size


class FsdpGradients:
    """Tells the trace which storages FSDP2 keeps gathered parameters and full gradients in."""

    def __init__(self, net: nn.Module, trace: MemoryTrace) -> None:
        self._trace = trace
        self._groups = [
            group
            for module in net.modules()
            if isinstance(module, FSDPModule)
            for group in module._get_fsdp_state()._fsdp_param_groups
        ]
        self._hooked: set[int] = set()

    def look(self) -> None:
        """After each forward and backward: enter what has come to be."""
        for group in self._groups:
            for one in group.fsdp_params:
                self._trace.enter(one.all_gather_outputs, BUFFERS)
                self._trace.enter([one.unsharded_accumulated_grad], GRADIENTS)
                unsharded = getattr(one, "_unsharded_param", None)
                if unsharded is not None and id(unsharded) not in self._hooked:
                    self._hooked.add(id(unsharded))
                    if unsharded.requires_grad:  # a frozen base has no gradients
                        unsharded.register_post_accumulate_grad_hook(self._full_gradient)

    def _full_gradient(self, parameter: Tensor) -> None:
        self._trace.enter([parameter.grad], GRADIENTS)
