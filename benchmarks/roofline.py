"""The least time a kernel can take on a GPU that nobody asked: `max(bytes / bandwidth, FLOP / peak)`.

A computed bound, never a measurement. Peaks are dense bf16, without structured sparsity, from the vendors' data
sheets: NVIDIA A100 80GB SXM (312 TFLOP/s, 2,039 GB/s), NVIDIA H100 SXM (1,979 TFLOP/s with sparsity, half of it dense;
3.35 TB/s), NVIDIA HGX B200 (4.5 PFLOP/s with sparsity; 8 TB/s in the Blackwell architecture brief, 7.7 in later
sheets), AMD Instinct MI300X (1,307.4 TFLOP/s, 5.3 TB/s).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Attributes:
    flops: FLOP/s, dense bf16.
    bandwidth: bytes/s of global memory.
    """

    flops: float
    bandwidth: float


DEVICES = {
    "A100": Device(312e12, 2.039e12),
    "H100": Device(989.4e12, 3.35e12),
    "B200": Device(2250e12, 8.0e12),
    "MI300X": Device(1307.4e12, 5.3e12),
}


def seconds(device: str, moved: float, flops: float) -> float:
    """Seconds for `moved` bytes and `flops` floating-point operations.

    Example:
        >>> round(seconds("A100", moved=2.039e9, flops=1e9) * 1e3, 3)  # bound by memory
        1.0
    """
    peak = DEVICES[device]
    return max(moved / peak.bandwidth, flops / peak.flops)
