"""Random numbers of training as a function of where the run stands, so none need be stored.

Before its forward every micro-batch reseeds the generators from blake2b(seed, step, micro-batch,
data-parallel coordinate). A resumed run therefore draws the numbers of an uninterrupted one.
Numbers are bitwise the same for the same ranks and micro-batch; with others a row meets another
mask of dropout, as it does in any two runs. Activation checkpointing repeats a block's numbers in
backward by itself (preserve_rng_state).
"""

from __future__ import annotations

import hashlib

import torch

_SCHEME = "leyden.randomness.v1"


def derive_seed(seed: int, step: int, micro: int, coordinate: int, purpose: str = "forward") -> int:
    """A seed below 2**63 for one micro-batch of one data-parallel coordinate.

    By blake2b, never by sums: seed + step would give two runs, or two steps, the same numbers.
    Give each use its own `purpose` (an augmentation on the CPU, say).
    """
    text = f"{_SCHEME}/{seed}/{step}/{micro}/{coordinate}/{purpose}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_micro_batch(
    seed: int, step: int, micro: int, coordinate: int, device: torch.device
) -> None:
    """Seed torch's generators of the CPU and, for a GPU, of `device`; nothing waits for it."""
    derived = derive_seed(seed, step, micro, coordinate)
    # Not torch.manual_seed: it seeds every GPU of the machine and warns about forks.
    torch.default_generator.manual_seed(derived)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(derived)
