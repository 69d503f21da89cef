"""DeepSpeed's ZeRO-1, 2 and 3 on tensors without memory: what its engine keeps, gathers, reduces.

DeepSpeed itself wants values and a real group, so its memory is written down here: the division
by ranks of Rajbhandari et al., "ZeRO", 2020 (arXiv 1910.02054, section 5), and the buffers of
DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py) under dist.deepspeed_zero's config, in
which all is fp32. ZeRO-3's gathering is dist.pretend_gather's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dist.deepspeed_zero import REDUCE_BUCKET
from dist.memory_trace import BUFFERS, GRADIENTS, OPTIMIZER, PARAMETERS, TEMPORARY, MemoryTrace
from dist.op_cost import Costs, Message
from dist.pretend_gather import GatheredParameters
from dist.sharding import ParallelConfig

# Of everything that DeepSpeed holds here.
_FP32 = 4


class ZeroPartitions:
    """The engine's part of a step; the module computes on `net`, whose parameters are whole."""

    def __init__(
        self, net: nn.Module, optimizer: torch.optim.Optimizer, parallel: ParallelConfig,
        dp_size: int, trace: MemoryTrace, costs: Costs, external: dict[nn.Module, list[Tensor]],
        *, on_gpu: bool,
    ) -> None:  # fmt: skip
        self.stage, self._dp_size = int(parallel.zero_stage), dp_size
        self._net, self._optimizer, self._trace, self._costs = net, optimizer, trace, costs
        # zero_config: overlapping needs streams.
        self._overlaps = on_gpu
        self._offloads = parallel.offload_optimizer and on_gpu
        self._groups: list[list[Tensor]] = [group["params"] for group in optimizer.param_groups]
        self._parameters = [p for group in self._groups for p in group]
        self._flats = [self._flat(group) for group in self._groups]
        for group, flat in zip(optimizer.param_groups, self._flats, strict=True):
            group["params"] = [flat]
        self._gathered: GatheredParameters | None = None
        if self.stage == 3:
            self._gathered = GatheredParameters(net, external, dp_size, trace, costs)
        self._bucket, self._partition = trace.hold(BUFFERS), trace.hold(GRADIENTS)
        self._next_partition = trace.hold(GRADIENTS)
        self._scratch = trace.hold(TEMPORARY)
        self._in_bucket = 0  # elements
        self._outside: Tensor | None = None  # a gradient larger than the bucket
        self._last = self._ready = self._kept = self._copied = False
        self.host_bytes = 0
        self.state_bytes = 3 * _FP32 * sum(flat.numel() for flat in self._flats)

    def _flat(self, group: list[Tensor]) -> nn.Parameter:
        """This rank's master weights of a group: ZeRO-3 cuts each tensor, 1 and 2 all at once."""
        cut = [p.numel() for p in group] if self.stage == 3 else [sum(p.numel() for p in group)]
        return nn.Parameter(torch.empty(sum(-(-size // self._dp_size) for size in cut)))

    def remember_the_last(self, once: Callable[[], None]) -> None:
        """Partitions, and the optimizer's state of a first step; `once` is a micro-batch."""
        if self._gathered is not None:
            self._gathered.record(once)
            for parameter in self._parameters:
                parameter.grad = None
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._gradient)
        for flat in self._flats:
            flat.grad = torch.zeros_like(flat)
        self._optimizer.step()
        for flat in self._flats:
            flat.grad = None
        self._trace.enter(self._net.buffers(), PARAMETERS)
        part = _FP32 * sum(flat.numel() for flat in self._flats)
        if self._gathered is not None:
            self._gathered.begin()
            self._trace.hold(PARAMETERS)(part + self._frozen_part())
            # Both are made once and stay.
            self._bucket(_FP32 * REDUCE_BUCKET)
            if not self._offloads:
                self._partition(part)
        else:
            self._trace.enter(self._net.parameters(), PARAMETERS)
        if self._offloads:
            # Master weights, two moments, gradients; ZeRO-1 and 2 stage the new weights too.
            self.host_bytes = (5 if self.stage < 3 else 4 + 1) * part
            # Gradients pass through a tensor as large as the largest parameter.
            if self.stage < 3:
                self._trace.hold(BUFFERS)(_FP32 * max(p.numel() for p in self._parameters))
            return
        states = [one for state in self._optimizer.state.values() for one in state.values()]
        self._trace.enter([*self._flats, *states], OPTIMIZER)

    def _frozen_part(self) -> int:
        """Bytes of this rank's part of what is not trained; ZeRO-3 cuts each tensor."""
        frozen = (p.numel() for p in self._net.parameters() if not p.requires_grad)
        return _FP32 * sum(-(-size // self._dp_size) for size in frozen)

    def begin_backward(self, *, last: bool) -> None:
        """Of a micro-batch, the step's last or not."""
        self._last = last

    def _gradient(self, parameter: Tensor) -> None:
        """A gradient is there, whole."""
        self._trace.enter([parameter.grad], GRADIENTS)
        if self.stage < 3 and not self._ready:
            self._ready = True
            self._bucket(_FP32 * REDUCE_BUCKET * (2 if self._overlaps else 1))
        if self.stage > 1 or (self._last and self._overlaps):
            self._into_bucket(parameter)

    def _into_bucket(self, parameter: Tensor) -> None:
        if self._in_bucket and self._in_bucket + parameter.numel() > REDUCE_BUCKET:
            self._reduce()
        self._in_bucket += parameter.numel()
        if parameter.numel() > REDUCE_BUCKET:
            self._outside = parameter
        else:
            parameter.grad = None

    def _reduce(self) -> None:
        """Send the bucket; this rank's part of it is kept or added."""
        size = _FP32 * self._in_bucket
        alone = self._outside is not None
        if self._dp_size > 1:
            # Slices of ranks are put one after the other first.
            self._scratch(0 if alone and self.stage == 3 else size)
            kind = "reduce_scatter" if self.stage == 3 else "all_reduce"
            self._send(kind, size)
        if self.stage < 3 and not self._offloads and not self._copied:
            # The first such copy of a micro-batch; the first micro-batch's is added to.
            self._copied = True
            (self._next_partition if self._kept else self._partition)(self._kept_bytes())
        self._scratch(0)
        if self._outside is not None:
            self._outside.grad = None
        self._in_bucket, self._outside = 0, None

    def _kept_bytes(self) -> int:
        """Gradients of the parameters that begin in rank 0's partition, each whole."""
        kept = 0
        for group, flat in zip(self._groups, self._flats, strict=True):
            before = 0
            for parameter in group:
                kept += parameter.numel() if before < flat.numel() else 0
                before += parameter.numel()
        return _FP32 * kept

    def end_backward(self) -> None:
        """What the engine does after each backward."""
        if self.stage == 1 and self._last and not self._overlaps:
            for parameter in self._parameters:
                self._into_bucket(parameter)
        if self._in_bucket:
            self._reduce()
        if self._gathered is not None:
            self._gathered.end_backward()
        elif self.stage == 2:
            self._release_bucket()
        self._copied = False

    def _release_bucket(self) -> None:
        self._bucket(0)
        self._next_partition(0)
        self._ready, self._kept = False, True

    def step(self) -> None:
        """Norm, clipping and the optimizer, a group at a time; then the weights to all ranks."""
        largest = max(p.numel() for p in self._parameters)
        if self._gathered is not None:
            self._gathered.release_all()
            self._scratch(sum(flat.numel() for flat in self._flats))  # isinf of all gradients
        elif not self._offloads:
            self._scratch(2 * _FP32 * largest)  # norms are of fp64
        self._scratch(0)
        if self.stage == 1:
            self._release_bucket()
        if not self._offloads:
            for flat in self._flats:
                # A copy of this group's gradients.
                flat.grad = torch.zeros_like(flat)
                self._trace.enter([flat.grad], GRADIENTS)
                self._optimizer.step()
                flat.grad = None
        if self.stage < 3:
            self._partition(0)
            self._kept = False
            for group in self._groups if self._dp_size > 1 else []:
                self._send("all_gather", _FP32 * sum(p.numel() for p in group))

    def _send(self, kind: str, size: int) -> None:
        message = Message(kind=kind, bytes=size, ranks=self._dp_size)
        self._costs.messages.setdefault(self._costs.phase, []).append(message)
        if kind == "reduce_scatter":
            self._trace.copy_for_gloo(size)
