"""Which tile sizes a kernel runs with: tables by capability, a generic entry for any other GPU.

A table names a capability, never a product: a card that is not in it takes the generic entry and works,
slower. Every entry is a :class:`Config`; the first of a tuple is what runs, the others are what an
autotuner may choose from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

GENERIC, FP32 = "generic", "fp32"
ALIGNMENT = 16  # elements; what Triton takes for aligned
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


@dataclass(frozen=True)
class Config:
    """How one launch is cut up.

    Attributes:
        block_m, block_n, block_k: rows, columns and depth of a tile. A kernel that has no such axis
            ignores it; each kernel's docstring says what they cut.
        warps: warps (wavefronts on AMD) per program.
        stages: software pipelining depth of the inner loop.
        group_m: row blocks walked before the next column block.
        route: `"fused"`: the product in our kernel, h in one before it; `"single"`: h in the same one;
            `"vendor"`: the vendor's product, and small kernels around it; `"split"`: of a convolution, h apart
            from that.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    route: str = "fused"


def target_of(device: torch.device) -> str:
    """The name a device's capability has in the tables; `"generic"` for one that is in none.

    Example:
        >>> target_of(torch.device("cpu"))
        'generic'
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return GENERIC
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(device)
        name = f"sm_{major}{minor}"
    return name if name in TARGETS else GENERIC


def candidates(kernel: str, target: str, *, aligned: bool = True) -> tuple[Config, ...]:
    """The configurations of a kernel on a target, the default one first.

    Args:
        kernel: a key of the tables, such as `"linear_forward"`.
        target: one of :data:`TARGETS`, or anything else for the generic entry.
        aligned: `False` for what takes the generic entry on every target, or an entry of :data:`UNALIGNED`.

    Raises:
        ValueError: a kernel that has no table.

    Example:
        >>> candidates("linear_forward", "sm_75") == candidates("linear_forward", "generic")
        True
    """
    if kernel not in TABLES:
        raise ValueError(f"kernel: got {kernel!r}, expected one of {', '.join(map(repr, TABLES))}")
    table = TABLES[kernel]
    return table.get(target, table[GENERIC]) if aligned else UNALIGNED.get((kernel, target), table[GENERIC])


def choose(kernel: str, device: torch.device, dtype: torch.dtype, *widths: int) -> Config:
    """The configuration a kernel runs with on a device.

    Args:
        dtype: of the operands; 4-byte ones take what :func:`exact` says.
        widths: lengths of the rows it reads. Where one is not a multiple of 16 elements, loads cannot be
            vectors, every element needs an address of its own, and such a layer takes the generic entry, too.

    Example:
        >>> choose("linear_forward", torch.device("cpu"), torch.float32).block_k
        16
    """
    if dtype.itemsize >= 4:
        return exact(kernel, target_of(device))
    aligned = all(width % ALIGNMENT == 0 for width in widths)
    return candidates(kernel, target_of(device), aligned=aligned)[0]


def exact(kernel: str, target: str) -> Config:
    """What a kernel runs with on 4-byte operands.

    Exact fp32 products need registers for every operand, and a large tile would spill: the table's entry for fp32,
    or the generic one at half the depth.

    Example:
        >>> exact("lora_a_gradient", "sm_90").block_k
        64
    """
    if FP32 in TABLES[kernel]:
        return TABLES[kernel][FP32][0]
    config = candidates(kernel, target, aligned=False)[0]
    return config if config.block_k <= 16 else replace(config, block_k=config.block_k // 2)


# Small enough for 64 KiB of shared memory and 16-bit or 32-bit operands.
_SMALL = Config(64, 64, 32, warps=4, stages=2)

TABLES: dict[str, dict[str, tuple[Config, ...]]] = {
    # Compiled with 0 spills in every mode and for ranks up to 64 (docs/kernels.md); 128 × 256 tiles spill with a loss.
    "linear_forward": {
        GENERIC: (_SMALL,),
        FP32: (Config(64, 32, 16, warps=8, stages=2),),
        "sm_80": (Config(128, 128, 32, warps=8, stages=4), Config(64, 128, 32, warps=8, stages=4)),
        "sm_90": (Config(128, 128, 64, warps=8, stages=4), Config(64, 128, 64, warps=8, stages=4)),
        "sm_100": (Config(128, 128, 64, warps=8, stages=4), Config(64, 128, 64, warps=8, stages=4)),
        "sm_120": (Config(128, 128, 64, warps=8, stages=3), Config(64, 128, 64, warps=8, stages=3)),
        "gfx942": (Config(128, 128, 64, warps=8, stages=2), Config(64, 128, 64, warps=4, stages=2)),
    },
    "linear_input_gradient": {
        GENERIC: (_SMALL,),
        "sm_80": (Config(128, 128, 32, warps=8, stages=4), Config(64, 128, 32, warps=8, stages=4)),
        "sm_90": (Config(128, 128, 64, warps=8, stages=4), Config(64, 128, 64, warps=8, stages=4)),
        "sm_100": (Config(128, 128, 64, warps=8, stages=4), Config(64, 128, 64, warps=8, stages=4)),
        "sm_120": (Config(128, 128, 32, warps=8, stages=4), Config(64, 128, 32, warps=8, stages=4)),
        "gfx942": (Config(128, 128, 64, warps=8, stages=2), Config(64, 128, 64, warps=4, stages=2)),
    },
    # Blocks of 128 columns: each leaves a partial U behind, and narrower ones would move more than half of what an
    # unfused backward does. How tall they are is a matter of registers.
    "linear_gradient": {
        GENERIC: (Config(16, 128, 0, warps=8, stages=2),),
        "sm_80": (Config(32, 128, 0, warps=8, stages=2), Config(64, 64, 0, warps=8, stages=2)),
        "sm_90": (Config(64, 128, 0, warps=8, stages=2), Config(32, 128, 0, warps=8, stages=2)),
        "sm_100": (Config(64, 128, 0, warps=8, stages=2), Config(32, 128, 0, warps=8, stages=2)),
        "sm_120": (Config(32, 128, 0, warps=8, stages=2), Config(64, 64, 0, warps=8, stages=2)),
        "gfx942": (Config(32, 128, 0, warps=4, stages=2), Config(16, 128, 0, warps=4, stages=2)),
    },
    "lora_down": {
        GENERIC: (Config(16, 0, 64, warps=2, stages=3),),
        FP32: (Config(16, 0, 32, warps=4, stages=3),),
        "sm_80": (Config(16, 0, 128, warps=4, stages=3),),
        "sm_90": (Config(16, 0, 128, warps=4, stages=3),),
        "sm_100": (Config(16, 0, 128, warps=4, stages=3),),
        "sm_120": (Config(16, 0, 128, warps=4, stages=3),),
        "gfx942": (Config(32, 0, 64, warps=4, stages=2),),
    },
    "lora_a_gradient": {GENERIC: (Config(32, 0, 128, warps=4, stages=2),)},
    "feature_mean": {GENERIC: (Config(0, 128, 0, warps=4, stages=1),)},
    "row_error": {
        GENERIC: (Config(8, 512, 0, warps=4, stages=1),),
        FP32: (Config(8, 512, 0, warps=8, stages=1),),
    },
    # A row's logits go by once: a program per row, as many bytes in flight as its registers hold.
    "softmax_stats": {
        GENERIC: (Config(1, 2048, 0, warps=4, stages=1),),
        "sm_80": (Config(1, 4096, 0, warps=8, stages=1),),
        "sm_90": (Config(1, 8192, 0, warps=8, stages=1),),
        "sm_100": (Config(1, 8192, 0, warps=8, stages=1),),
        "sm_120": (Config(1, 4096, 0, warps=8, stages=1),),
        "gfx942": (Config(1, 4096, 0, warps=8, stages=1),),
    },
    # 64 rows per program: partial column sums cost a thirty-second of what the 16-bit logits do.
    "softmax_gradient": {
        GENERIC: (Config(64, 256, 4, warps=4, stages=1),),
        "sm_80": (Config(64, 256, 4, warps=4, stages=1),),
        "sm_90": (Config(64, 256, 4, warps=4, stages=1),),
        "sm_100": (Config(64, 256, 4, warps=4, stages=1),),
        "sm_120": (Config(64, 256, 4, warps=8, stages=1),),
        "gfx942": (Config(64, 512, 8, warps=8, stages=1),),
    },
    "conv2d_forward": {
        GENERIC: (Config(64, 64, 32, warps=8, stages=2),),
        FP32: (Config(64, 32, 16, warps=4, stages=2),),
        "sm_80": (Config(128, 128, 32, warps=8, stages=3), Config(64, 64, 32, warps=4, stages=4)),
        "sm_90": (Config(128, 128, 64, warps=8, stages=3), Config(64, 64, 64, warps=4, stages=3)),
        "sm_100": (Config(128, 128, 64, warps=8, stages=3), Config(64, 64, 64, warps=4, stages=3)),
        "sm_120": (Config(128, 128, 32, warps=8, stages=3), Config(64, 64, 32, warps=8, stages=4)),
        "gfx942": (Config(128, 128, 64, warps=8, stages=2), Config(64, 128, 64, warps=4, stages=2)),
    },
    "conv2d_input_gradient": {
        GENERIC: (_SMALL,),
        "sm_80": (Config(128, 128, 32, warps=8, stages=3), Config(64, 64, 32, warps=4, stages=4)),
        "sm_90": (Config(128, 128, 64, warps=8, stages=3), Config(64, 64, 64, warps=4, stages=3)),
        "sm_100": (Config(128, 128, 64, warps=8, stages=3), Config(64, 64, 64, warps=4, stages=3)),
        "sm_120": (Config(128, 128, 32, warps=8, stages=3), Config(64, 64, 32, warps=4, stages=4)),
        "gfx942": (Config(128, 128, 64, warps=8, stages=2), Config(64, 128, 64, warps=4, stages=2)),
    },
    # 16 places × 64 channels, 8 samples to a program; 3 chunks of the samples where statistics are taken, because a
    # chunk's statistics are as large as three samples of y in fp32.
    "conv2d_epilogue": {GENERIC: (Config(16, 64, 8, warps=4, stages=3, group_m=3),)},
    "conv2d_gradient": {
        GENERIC: (Config(16, 64, 0, warps=4, stages=2),),
        "sm_80": (Config(32, 64, 0, warps=4, stages=2),),
        "sm_90": (Config(32, 128, 0, warps=8, stages=2),),
        "sm_100": (Config(32, 128, 0, warps=8, stages=2),),
        "sm_120": (Config(32, 128, 0, warps=8, stages=2),),
        "gfx942": (Config(32, 64, 0, warps=4, stages=2),),
    },
    "conv2d_lora_a_gradient": {
        GENERIC: (Config(32, 0, 128, warps=4, stages=2),),
        "sm_80": (Config(64, 0, 128, warps=8, stages=2),),
        "sm_90": (Config(64, 0, 128, warps=8, stages=2),),
        "sm_100": (Config(32, 0, 128, warps=4, stages=3),),
        "sm_120": (Config(32, 0, 128, warps=4, stages=3),),
    },
    "conv2d_retain": {GENERIC: (Config(32, 0, 0, warps=4, stages=1),)},
    "conv2d_sample_mean": {GENERIC: (Config(16, 64, 0, warps=4, stages=1),)},
}

# Where the generic entry would spill: 8 wavefronts of 64 lanes share the registers of one compute unit.
UNALIGNED: dict[tuple[str, str], tuple[Config, ...]] = {
    ("linear_gradient", "gfx942"): (Config(16, 128, 0, warps=4, stages=2),),
}
