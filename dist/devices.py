"""What a device can do by its maker's data sheet: memory, peak rates, links. Standard library only.

The one table of peaks: the plan (dist.memory_plan) and the meter (dist.meter) read it. Rates are
dense (no sparsity) and in SI units. All are from the data sheets named beside each entry, none
was measured; memory is about what the driver reports, in GiB, less than the sheet's GB.
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
    reported: str = ""
    """Words of the name that torch.cuda.get_device_name gives."""
    half: str = "bf16"
    """The 16-bit type that bf16_flops is of: fp16 where there are no bf16 units."""


# One 400 Gb/s (ConnectX-7) or 200 Gb/s (ConnectX-6) adapter a GPU, as in DGX H100 / DGX A100.
_NDR, _HDR, _ETHERNET = 50e9, 25e9, 12.5e9

# node_bytes_per_s is half of the published NVLink rate, which counts both directions.
_TABLE = (
    # NVIDIA H100 Tensor Core GPU data sheet, SXM column; a third-generation NVSwitch node.
    Device(
        name="h100", reported="H100", memory_gib=79.1,
        bf16_flops=989.4e12, fp32_flops=66.9e12,
        memory_bytes_per_s=3.35e12, node_bytes_per_s=450e9, network_bytes_per_s=_NDR,
    ),
    # NVIDIA H200 Tensor Core GPU data sheet, SXM column.
    Device(
        name="h200", reported="H200", memory_gib=139.8,
        bf16_flops=989.4e12, fp32_flops=66.9e12,
        memory_bytes_per_s=4.8e12, node_bytes_per_s=450e9, network_bytes_per_s=_NDR,
    ),
    # NVIDIA A100 data sheet, SXM columns; 19.5 TFLOP/s fp32 is without TF32.
    Device(
        name="a100-80", reported="A100", memory_gib=79.1,
        bf16_flops=312e12, fp32_flops=19.5e12,
        memory_bytes_per_s=2.039e12, node_bytes_per_s=300e9, network_bytes_per_s=_HDR,
    ),
    Device(
        name="a100-40", reported="A100-SXM4-40GB", memory_gib=39.4,
        bf16_flops=312e12, fp32_flops=19.5e12,
        memory_bytes_per_s=1.555e12, node_bytes_per_s=300e9, network_bytes_per_s=_HDR,
    ),
    # NVIDIA HGX B200 data sheet, per GPU: 4.5 PFLOP/s bf16 with sparsity, so 2.25 dense.
    Device(
        name="b200", reported="B200", memory_gib=178.4,
        bf16_flops=2.25e15, fp32_flops=75e12,
        memory_bytes_per_s=7.7e12, node_bytes_per_s=900e9, network_bytes_per_s=_NDR,
    ),
    # NVIDIA L40S data sheet: 48 GB GDDR6 with ECC, PCIe 4.0 x16 (64 GB/s in both directions).
    Device(
        name="l40s", reported="L40S", memory_gib=44.4,
        bf16_flops=362.05e12, fp32_flops=91.6e12,
        memory_bytes_per_s=864e9, node_bytes_per_s=32e9, network_bytes_per_s=_HDR,
    ),
    # NVIDIA Ada GPU architecture white paper, appendix A: GeForce RTX 4090; PCIe 4.0 x16.
    Device(
        name="rtx4090", reported="RTX 4090", memory_gib=23.5,
        bf16_flops=165.2e12, fp32_flops=82.6e12,
        memory_bytes_per_s=1008e9, node_bytes_per_s=32e9, network_bytes_per_s=_ETHERNET,
        ranks_per_node=4,
    ),
    # NVIDIA H100 data sheet, PCIe column (350 W; 1,513 TFLOP/s bf16 with sparsity); PCIe 5.0 x16.
    Device(
        name="h100-pcie", reported="H100 PCIe", memory_gib=79.1,
        bf16_flops=756e12, fp32_flops=51.2e12,
        memory_bytes_per_s=2.0e12, node_bytes_per_s=64e9, network_bytes_per_s=_NDR,
    ),
    # NVIDIA H100 NVL and H200 NVL data sheets: 1,671 TFLOP/s bf16 with sparsity, NVLink bridges.
    Device(
        name="h100-nvl", reported="H100 NVL", memory_gib=93.1,
        bf16_flops=835.5e12, fp32_flops=60e12,
        memory_bytes_per_s=3.9e12, node_bytes_per_s=300e9, network_bytes_per_s=_NDR,
    ),
    Device(
        name="h200-nvl", reported="H200 NVL", memory_gib=139.8,
        bf16_flops=835.5e12, fp32_flops=60e12,
        memory_bytes_per_s=4.8e12, node_bytes_per_s=450e9, network_bytes_per_s=_NDR,
    ),
    # NVIDIA GH200 data sheet, 96 GB of HBM3.
    Device(
        name="gh200", reported="GH200", memory_gib=94.5, bf16_flops=989.4e12, fp32_flops=66.9e12,
        memory_bytes_per_s=4.0e12, node_bytes_per_s=450e9, network_bytes_per_s=_NDR,
    ),
    # NVIDIA L4 data sheet: 242 TFLOP/s bf16 with sparsity; PCIe 4.0 x16.
    Device(
        name="l4", reported="L4", memory_gib=22.0, bf16_flops=121e12, fp32_flops=30.3e12,
        memory_bytes_per_s=300e9, node_bytes_per_s=32e9, network_bytes_per_s=_ETHERNET,
    ),
    # NVIDIA A10G data sheet for cloud providers: 70 TFLOP/s fp16 and bf16, dense. Tables that give
    # it 125 mean the A10, whose sheet says 125 dense.
    Device(
        name="a10g", reported="A10G", memory_gib=22.1, bf16_flops=70e12, fp32_flops=35e12,
        memory_bytes_per_s=600e9, node_bytes_per_s=32e9, network_bytes_per_s=_ETHERNET,
    ),
    Device(
        name="a10", reported="A10", memory_gib=22.1, bf16_flops=125e12, fp32_flops=31.2e12,
        memory_bytes_per_s=600e9, node_bytes_per_s=32e9, network_bytes_per_s=_ETHERNET,
    ),
    # NVIDIA V100 data sheet, SXM2 column; no bf16 units. NVLink 2: 300 GB/s in both directions.
    Device(
        name="v100", reported="V100", memory_gib=31.7, bf16_flops=125e12, fp32_flops=15.7e12,
        memory_bytes_per_s=900e9, node_bytes_per_s=150e9, network_bytes_per_s=_ETHERNET,
        half="fp16",
    ),
    # NVIDIA T4 data sheet; no bf16 units; PCIe 3.0 x16.
    Device(
        name="t4", reported="T4", memory_gib=14.6, bf16_flops=65e12, fp32_flops=8.1e12,
        memory_bytes_per_s=320e9, node_bytes_per_s=16e9, network_bytes_per_s=_ETHERNET,
        half="fp16",
    ),
    # AMD Instinct MI300X data sheet: 1,307.4 TFLOP/s bf16 dense, 163.4 fp32 vector; seven links of
    # Infinity Fabric, 64 GB/s each in one direction.
    Device(
        name="mi300x", reported="MI300X", memory_gib=191.7,
        bf16_flops=1307.4e12, fp32_flops=163.4e12,
        memory_bytes_per_s=5.3e12, node_bytes_per_s=448e9, network_bytes_per_s=_NDR,
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


def device_of_name(reported: str) -> Device | None:
    """The entry of what torch.cuda.get_device_name gives; None if the table lacks it."""
    words = reported.split()
    found = [
        device
        for device in _TABLE
        # Whole words: "L4" is no part of "L40S".
        if all(any(one == word or one.startswith(f"{word}-") for one in words)
               for word in device.reported.split())
    ]  # fmt: skip
    return max(found, key=lambda device: len(device.reported), default=None)
