"""Parameters made on the meta device, filled equally for any number of ranks.

Each parameter's full tensor comes from a generator keyed by (seed, its name) and each rank keeps
its slice: no broadcast, no dependence on world size, order of modules or other parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dist.errors import SetupError

Fill = Callable[[str, Tensor], None]


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from blake2b of the parts; never sums of seeds, which collide."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


_PRETENDED: list[AbstractContextManager[object]] = []


@contextmanager
def without_values(memory: AbstractContextManager[object]) -> Iterator[None]:
    """For the memory plan: materialise gives tensors made under `memory` and fills none."""
    _PRETENDED.append(memory)
    try:
        yield
    finally:
        _PRETENDED.pop()


def materialise(
    module: nn.Module, device: torch.device, seed: int, std: float, fill: Fill | None = None
) -> None:
    """Give a meta-device module (sharded or not) memory on `device` and its first values.

    Linear and embedding weights: normal(0, std); their biases 0; norm weights 1. Buffers are
    recomputed by their module's own constructor. `fill`, if given, puts a value into each named
    parameter instead (weights from a file). Memory is poisoned with NaN first, so that a
    tensor that no rule reached is an error here and not a silent wrong start.
    """
    tied = _tied_names(module)
    with _PRETENDED[-1] if _PRETENDED else nullcontext():
        module.to_empty(device=device)
    _tie(module, tied)
    if _PRETENDED:
        return
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                _local(tensor).fill_(float("nan"))
        for name, parameter in module.named_parameters():
            if fill is not None:
                fill(name, parameter)
            else:
                _fill(parameter, full_value(module, name, tuple(parameter.shape), seed, std))
        for child in module.modules():
            _recompute_buffers(child)
    check_initialised(module)


def full_value(
    module: nn.Module, name: str, shape: tuple[int, ...], seed: int, std: float
) -> Tensor:
    """The full first value of one parameter, fp32 on the CPU."""
    owner = module.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    if leaf == "bias":
        return torch.zeros(shape)
    if "norm" in type(owner).__name__.lower():
        return torch.ones(shape)
    if isinstance(owner, (nn.Linear, nn.Embedding)):
        # On the CPU on purpose: CUDA's generator gives other numbers.
        generator = torch.Generator("cpu").manual_seed(seed_of(seed, name))
        return torch.empty(shape).normal_(0.0, std, generator=generator)
    raise SetupError(
        f"no rule initialises the parameter {name} of a {type(owner).__name__}; add one to "
        "dist/initialise.py"
    )


def check_initialised(module: nn.Module) -> None:
    """Raise SetupError naming every parameter or buffer that holds a NaN or no memory."""
    left = []
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta or (tensor.is_floating_point() and bool(_local(tensor).isnan().any())):
            left.append(name)
    if left:
        raise SetupError(f"these tensors were left uninitialised: {', '.join(left)}")


def local_slice(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a full tensor, laid out as the DTensor `like` (else all of it)."""
    if not isinstance(like, DTensor):
        return full
    for dim, start, length in local_span(like):
        full = full.narrow(dim, start, length)
    return full


def local_span(like: DTensor) -> list[tuple[int, int, int]]:
    """(dimension, start, length) of this rank's part of a DTensor, for each dimension that is cut.

    A dimension that both FSDP and tensor parallelism cut is cut by the latter first, though its
    mesh axis comes last: that is what _StridedShard says.
    """
    coordinate = like.device_mesh.get_coordinate()
    assert coordinate is not None  # this rank holds parameters of a mesh that it is in
    axes = sorted(
        enumerate(like.placements), key=lambda item: (isinstance(item[1], _StridedShard), item[0])
    )
    spans: dict[int, tuple[int, int]] = {}
    for axis, placement in axes:
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, (Shard, _StridedShard)):
            raise SetupError(f"no rule slices a tensor placed as {placement}")
        start, length = spans.get(placement.dim, (0, like.shape[placement.dim]))
        # DTensor cuts like torch.chunk: the last ranks may get less, or nothing.
        piece = -(-length // like.device_mesh.size(axis))
        skip = min(piece * coordinate[axis], length)
        spans[placement.dim] = (start + skip, min(piece, length - skip))
    return [(dim, start, length) for dim, (start, length) in sorted(spans.items())]


def _fill(parameter: Tensor, full: Tensor) -> None:
    _local(parameter).copy_(local_slice(full, parameter))


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _recompute_buffers(child: nn.Module) -> None:
    """Rotary embeddings and the like: build the module anew on the CPU and copy its buffers."""
    mine = dict(child.named_buffers(recurse=False))
    if not mine:
        return
    if not hasattr(child, "config"):
        raise SetupError(
            f"the buffers {sorted(mine)} of a {type(child).__name__} cannot be recomputed: it "
            "has no `config` to build it anew; add a rule to dist/initialise.py"
        )
    with torch.device("cpu"):
        fresh = type(child)(child.config)  # type: ignore[call-arg]
    for name, buffer in fresh.named_buffers(recurse=False):
        mine[name].copy_(buffer)


def _tied_names(module: nn.Module) -> list[tuple[str, str]]:
    """Pairs (first name, other name) of parameters that are one tensor; to_empty unties them."""
    first: dict[int, str] = {}
    pairs = []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            pairs.append((first[id(parameter)], name))
        else:
            first[id(parameter)] = name
    return pairs


def _tie(module: nn.Module, pairs: list[tuple[str, str]]) -> None:
    for source, target in pairs:
        owner, _, leaf = target.rpartition(".")
        parameter = module.get_parameter(source)
        if module.get_parameter(target) is not parameter:
            setattr(module.get_submodule(owner), leaf, parameter)
