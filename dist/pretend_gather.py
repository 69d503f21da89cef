"""ZeRO-3's gathering of parameters, as DeepSpeed's coordinator orders it, on fake tensors.

From DeepSpeed 0.19, runtime/zero/partitioned_param_coordinator.py: a module's own parameters are
gathered before its forward and its backward, the next ones ahead of time, and released unless
they are used again within `MAX_REUSE` elements. The order is that of a step before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torch import Tensor, nn

from dist.memory_trace import BUFFERS, PARAMETERS, Hold, MemoryTrace
from dist.op_cost import Costs, Message

# DeepSpeed's defaults, which dist.deepspeed_zero leaves as they are; all in elements.
PERSISTENT = 100_000
PREFETCH = 50_000_000
MAX_REUSE = 1_000_000_000
MAX_LIVE = 1_000_000_000


class _Batch:
    """Parameters that one message gathers: into a buffer, then each into a tensor of its own."""

    def __init__(self, waiting: set[Tensor], buffer: Hold) -> None:
        self.waiting, self.buffer, self.arrived = waiting, buffer, False


class GatheredParameters:
    """Gives the parameters of `net` memory only while DeepSpeed would.

    external: parameters that a module uses without owning them (dist.deepspeed_zero.gather_with).
    """

    def __init__(
        self, net: nn.Module, external: dict[nn.Module, list[Tensor]], dp_size: int,
        trace: MemoryTrace, costs: Costs,
    ) -> None:  # fmt: skip
        self._net, self._dp_size, self._trace, self._costs = net, dp_size, trace, costs
        self._uses: dict[nn.Module, list[Tensor]] = {}
        for module in net.modules():
            used = [*module.parameters(recurse=False), *external.get(module, [])]
            if used:
                self._uses[module] = list(dict.fromkeys(used))
        self._sizes = {p: p.untyped_storage().size() for p in net.parameters()}
        self._recording = False
        self._order: list[nn.Module] = []
        self._in_flight: dict[Tensor, _Batch] = {}
        self._held: set[Tensor] = set()
        self._buffers: list[Hold] = []  # that are empty and can be used again
        self._left: list[nn.Module] = []
        self._begin_pass()
        for module in self._uses:
            module.register_forward_pre_hook(lambda one, _: self._fetch(one))
            module.register_forward_hook(lambda one, _, __: self._release(one))
            module.register_full_backward_pre_hook(lambda one, _: self._before_backward(one))
            module.register_full_backward_hook(
                lambda one, inputs, _: self._after_backward(one, inputs)
            )

    def record(self, once: Callable[[], None]) -> None:
        """Note the order of modules in `once`, a forward and backward in which all is gathered."""
        self._recording = True
        once()
        self._recording = False

    def begin(self) -> None:
        """Release all but what stays gathered: small parameters."""
        for parameter, size in self._sizes.items():
            if parameter.numel() < PERSISTENT:
                self._trace.enter([parameter], PARAMETERS)
                self._held.add(parameter)
            else:
                storage = parameter.untyped_storage()
                storage.resize_(0)
                self._trace.enter([parameter], BUFFERS)
                assert size

    def end_backward(self) -> None:
        """Release what no hook did: of modules whose inputs have no gradient."""
        for module in self._left:
            self._free(self._uses[module])
        self._left = []
        self._begin_pass()

    def release_all(self) -> None:
        """Before the optimizer's step."""
        self._free(list(self._sizes))

    def _begin_pass(self) -> None:
        for batch in set(self._in_flight.values()):
            self._drop_buffer(batch)
        self._in_flight = {}
        self._at = 0
        self._queue = deque(
            (parameter, at) for at, one in enumerate(self._order) for parameter in self._uses[one]
        )
        self._fetched_for: dict[Tensor, int] = {}

    def _fetch(self, module: nn.Module) -> None:
        if self._recording:
            self._order.append(module)
            return
        needed = self._uses[module]
        missing = [p for p in needed if p not in self._held and p not in self._in_flight]
        if missing:
            self._gather(missing)
        for parameter in needed:
            self._wait(parameter)
        self._take_from_queue(needed)
        self._prefetch()
        self._at += 1

    def _take_from_queue(self, needed: list[Tensor]) -> None:
        left = {p for p in needed if self._fetched_for.get(p, -1) < self._at}
        while self._queue and left:
            parameter, at = self._queue.popleft()
            self._fetched_for[parameter] = at
            left.discard(parameter)

    def _prefetch(self) -> None:
        live = sum(p.numel() for p in (*self._held, *self._in_flight))
        most = min(MAX_LIVE - live, PREFETCH)
        ahead: dict[Tensor, None] = {}
        while self._queue and sum(p.numel() for p in ahead) < most:
            parameter, at = self._queue.popleft()
            self._fetched_for[parameter] = max(self._fetched_for.get(parameter, -1), at)
            if parameter not in self._held and parameter not in self._in_flight:
                ahead[parameter] = None
        if ahead:
            self._gather(list(ahead))

    def _gather(self, parameters: list[Tensor]) -> None:
        size = sum(self._sizes[p] for p in parameters)
        if self._dp_size > 1:
            message = Message(kind="all_gather", bytes=size, ranks=self._dp_size)
            self._costs.messages.setdefault(self._costs.phase, []).append(message)
        buffer = self._buffers.pop() if self._buffers else self._trace.hold(BUFFERS)
        batch = _Batch(set(parameters), buffer)
        if len(parameters) == 1:
            batch.arrived = True  # straight into its own memory
            self._fill(parameters[0])
        else:
            buffer(size)
        for parameter in parameters:
            self._in_flight[parameter] = batch

    def _wait(self, parameter: Tensor) -> None:
        batch = self._in_flight.pop(parameter, None)
        if batch is None:
            return
        if not batch.arrived:
            batch.arrived = True
            for one in batch.waiting:
                self._fill(one)
        batch.waiting.discard(parameter)
        self._held.add(parameter)
        if not batch.waiting:
            self._drop_buffer(batch)

    def _fill(self, parameter: Tensor) -> None:
        parameter.untyped_storage().resize_(self._sizes[parameter])

    def _drop_buffer(self, batch: _Batch) -> None:
        batch.buffer(0)
        self._buffers.append(batch.buffer)

    def _before_backward(self, module: nn.Module) -> None:
        self._fetch(module)

    def _after_backward(self, module: nn.Module, inputs: object) -> None:
        if self._recording:
            return
        if isinstance(inputs, tuple) and any(one is not None for one in inputs):
            self._release(module)
        else:
            self._left.append(module)

    def _release(self, module: nn.Module) -> None:
        """Free a module's parameters but those that are soon used again."""
        if self._recording:
            return
        free = {p for p in self._uses[module] if self._fetched_for.get(p, -1) <= self._at}
        passed = 0
        for one in self._order[self._at :]:
            if passed >= MAX_REUSE or not free:
                break
            for parameter in self._uses[one]:
                free.discard(parameter)
                passed += parameter.numel()
        self._free(list(free))

    def _free(self, parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if parameter in self._held and parameter.numel() >= PERSISTENT:
                self._held.discard(parameter)
                parameter.untyped_storage().resize_(0)
