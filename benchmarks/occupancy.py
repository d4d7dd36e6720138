"""How many blocks fit on a multiprocessor at once, computed from registers, shared memory and threads.

    blocks    = min(block slots, warp slots / warps, registers / registers of a block, shared memory / that of a block)
    occupancy = blocks × warps / warp slots

Every quotient is rounded down; what is allotted in units is rounded up to them first. NVIDIA: a warp takes its
registers in units of 256, and warps go to four schedulers, each of which owns a quarter of the file; a block occupies
1 KiB of shared memory beyond its own. AMD (CDNA3): a wave takes vector registers, accumulators included, in units of
8 from the 512 of its SIMD, one of four in a CU; scalar registers allow more waves than that and are left out.

Sources: NVIDIA, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (slots, registers,
shared memory per multiprocessor and per block), the tuning guides for Ampere, Hopper and Blackwell (the reserved
KiB), the occupancy calculator of Nsight Compute (units); AMD, "AMD Instinct MI300 Instruction Set Architecture"
(registers, 64 KiB of LDS); LLVM's AMDGPU back end (8 waves per SIMD, 16 workgroups of several waves), which states
the waves per SIMD that it computes from the registers in the assembly; a test compares.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor (CU) has.

    Attributes:
        registers: 32-bit registers per multiprocessor; on AMD vector registers per lane and SIMD.
        shared: bytes of shared memory (LDS).
        shared_per_block: the most one block may have.
        reserved: bytes the driver adds to a block's.
        warps, blocks: resident at once.
        warp: threads in a warp (wavefront).
        simds: parts a multiprocessor's registers are divided into; 1 where they are counted as a whole.
    """

    registers: int
    shared: int
    shared_per_block: int
    reserved: int
    warps: int
    blocks: int
    warp: int = 32
    simds: int = 1


KIB = 1024
LIMITS = {
    "sm_80": Limits(65536, 164 * KIB, 163 * KIB, KIB, 64, 32),
    "sm_90": Limits(65536, 228 * KIB, 227 * KIB, KIB, 64, 32),
    "sm_100": Limits(65536, 228 * KIB, 227 * KIB, KIB, 64, 32),
    "sm_120": Limits(65536, 100 * KIB, 99 * KIB, KIB, 48, 24),
    "gfx942": Limits(512, 64 * KIB, 64 * KIB, 0, 32, 16, warp=64, simds=4),
}


@dataclass(frozen=True)
class Occupancy:
    """Attributes:
    blocks: resident per multiprocessor; 0 if not even one fits.
    share: resident warps as a share of the most there can be.
    bound_by: `"registers"`, `"shared memory"`, `"warps"` or `"blocks"`.
    """

    blocks: int
    share: float
    bound_by: str


def occupancy(target: str, registers: int, shared: int, threads: int) -> Occupancy:
    """Resident blocks and warps of a kernel.

    Args:
        target: one of :data:`LIMITS`.
        registers: per thread (lane).
        shared: bytes per block.
        threads: per block.

    Example:
        >>> occupancy("sm_80", registers=128, shared=48 * 1024, threads=256)
        Occupancy(blocks=2, share=0.25, bound_by='registers')
    """
    limits = LIMITS[target]
    warps = -(-threads // limits.warp)
    if limits.simds == 1:
        per_warp = -(-registers * limits.warp // 256) * 256
        by_registers = limits.registers // 4 // max(per_warp, 1) * 4 // warps
    else:
        waves = min(limits.warps // limits.simds, limits.registers // max(8, -(-registers // 8) * 8))
        by_registers = waves * limits.simds // warps
    taken = shared + limits.reserved
    bounds = {
        "registers": by_registers,
        "shared memory": 0 if shared > limits.shared_per_block else limits.shared // max(taken, 1),
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
    }
    bound_by = min(bounds, key=lambda name: bounds[name])
    return Occupancy(bounds[bound_by], bounds[bound_by] * warps / limits.warps, bound_by)
