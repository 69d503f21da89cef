"""What a device can do by its maker's data sheet: memory, peak rates, links. Standard library only.

Rates are dense (no sparsity) and in SI units; memory is what the device reports, in GiB. Sources
are named beside each entry.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from dist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator and its links."""

    name: str
    kind: str = "cuda"
    """cuda or cpu: which of our kernels run."""
    memory_gib: float
    """Memory that the device reports, GiB."""
    bf16_flops: float
    """Dense bf16 matrix peak with fp32 accumulation, FLOP/s."""
    fp32_flops: float
    """fp32 peak as torch uses it by default (no TF32), FLOP/s."""
    memory_bytes_per_s: float
    """Peak bandwidth of the device's memory."""
    node_bytes_per_s: float
    """To peers of the same node, one direction, bytes/s a device."""
    network_bytes_per_s: float
    """To other nodes, one direction, bytes/s a device."""
    ranks_per_node: int = 8
    """Devices of a usual node."""


# One 400 Gb/s (ConnectX-7) or 200 Gb/s (ConnectX-6) adapter a GPU, as in DGX H100 / DGX A100.
_NDR, _HDR, _ETHERNET = 50e9, 25e9, 12.5e9

# node_bytes_per_s is half of the published NVLink rate, which counts both directions.
_TABLE = (
    # NVIDIA H100 Tensor Core GPU data sheet, SXM column; a third-generation NVSwitch node.
    Device(
        name="h100", memory_gib=79.1, bf16_flops=989.4e12, fp32_flops=66.9e12,
        memory_bytes_per_s=3.35e12, node_bytes_per_s=450e9, network_bytes_per_s=_NDR,
    ),
    # NVIDIA H200 Tensor Core GPU data sheet, SXM column.
    Device(
        name="h200", memory_gib=139.8, bf16_flops=989.4e12, fp32_flops=66.9e12,
        memory_bytes_per_s=4.8e12, node_bytes_per_s=450e9, network_bytes_per_s=_NDR,
    ),
    # NVIDIA A100 data sheet, SXM columns; 19.5 TFLOP/s fp32 is without TF32.
    Device(
        name="a100-80", memory_gib=79.1, bf16_flops=312e12, fp32_flops=19.5e12,
        memory_bytes_per_s=2.039e12, node_bytes_per_s=300e9, network_bytes_per_s=_HDR,
    ),
    Device(
        name="a100-40", memory_gib=39.4, bf16_flops=312e12, fp32_flops=19.5e12,
        memory_bytes_per_s=1.555e12, node_bytes_per_s=300e9, network_bytes_per_s=_HDR,
    ),
    # NVIDIA HGX B200 data sheet, per GPU: 4.5 PFLOP/s bf16 with sparsity, so 2.25 dense.
    Device(
        name="b200", memory_gib=178.4, bf16_flops=2.25e15, fp32_flops=75e12,
        memory_bytes_per_s=7.7e12, node_bytes_per_s=900e9, network_bytes_per_s=_NDR,
    ),
    # NVIDIA L40S data sheet: 48 GB GDDR6 with ECC, PCIe 4.0 x16 (64 GB/s in both directions).
    Device(
        name="l40s", memory_gib=44.4, bf16_flops=362.05e12, fp32_flops=91.6e12,
        memory_bytes_per_s=864e9, node_bytes_per_s=32e9, network_bytes_per_s=_HDR,
    ),
    # NVIDIA Ada GPU architecture white paper, appendix A: GeForce RTX 4090; PCIe 4.0 x16.
    Device(
        name="rtx4090", memory_gib=23.5, bf16_flops=165.2e12, fp32_flops=82.6e12,
        memory_bytes_per_s=1008e9, node_bytes_per_s=32e9, network_bytes_per_s=_ETHERNET,
        ranks_per_node=4,
    ),
)  # fmt: skip

DEVICES = {device.name: device for device in _TABLE}
"""By name; `cpu` is not here: it is measured where it is planned for (dist.memory_plan)."""


def find_device(name: str) -> Device:
    """The entry of a name; ConfigError names the nearest."""
    if name in DEVICES:
        return DEVICES[name]
    known = [*DEVICES, "cpu"]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"no device {name!r}{hint} (devices: {', '.join(known)})")
