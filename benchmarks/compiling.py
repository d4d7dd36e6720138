"""What a launch becomes: captured from the launcher on shapes alone, compiled for a GPU that is not there, read back.

Nothing here repeats a kernel's signature. A launcher runs on `device="meta"` tensors inside
`rfa_fast.kernels.common.observed`, and what it was about to launch goes through the functions that Triton's own
runtime would have called: the binder that decides which argument is a constant, which integer is 1, which pointer
is 16-byte aligned, and `_pack_args`, which makes a signature of that. So the artefact is the one a GPU would get;
what cannot be known without the GPU is how long it takes.

Figures come from the artefact: registers and local memory from `cuobjdump` (NVIDIA) or from the metadata of the
assembly (AMD), shared memory from Triton's metadata, threads and matrix instructions from the PTX or the assembly.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from rfa_fast.kernels.common import observed
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

GPU_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# The matrix instruction that belongs to a target, and what finds it in the PTX or in the assembly.
MATRIX_INSTRUCTIONS = {
    "sm_80": ("mma.sync", re.compile(r"\bmma\.sync\.[\w.]+")),
    "sm_90": ("wgmma", re.compile(r"\bwgmma\.mma_async\.[\w.]+")),
    "sm_100": ("tcgen05", re.compile(r"\btcgen05\.mma\.[\w.:]+")),
    "sm_120": ("mma.sync", re.compile(r"\bmma\.sync\.[\w.]+")),
    "gfx942": ("v_mfma", re.compile(r"\bv_mfma_\w+")),
}
# Another target's: on Blackwell a product too small for tcgen05 becomes an mma.sync.
ANY_MATRIX_INSTRUCTION = re.compile(r"\b(?:mma\.sync\.|wgmma\.mma_async\.|tcgen05\.mma\.|v_mfma_)[\w.:]+")


class Launch(NamedTuple):
    """One kernel launch as the launcher asked for it; the tensors among the arguments may be meta tensors."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name without its suffix."""
        return str(self.kernel.fn.__name__).removesuffix("_kernel")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch for one target.

    Attributes:
        registers: per thread: 32-bit registers; on AMD the unified vector registers (VGPR + AGPR) per lane.
        spilled: bytes of local memory (NVIDIA) or scratch (AMD) per thread; 0 is what a kernel ships with.
        shared: bytes per block.
        threads: per block.
        matrix: how often each matrix instruction stands in the code.
        waves: AMD: waves per SIMD that LLVM itself computes from the registers; 0 elsewhere.
    """

    kernel: str
    target: str
    registers: int
    spilled: int
    shared: int
    threads: int
    matrix: dict[str, int]
    waves: int = 0

    @property
    def instruction(self) -> str:
        """The target's own matrix instruction as it appears most often, any other if that is missing, or nothing."""
        _, pattern = MATRIX_INSTRUCTIONS[self.target]
        own = {name: count for name, count in self.matrix.items() if pattern.fullmatch(name)}
        chosen = own or self.matrix
        return max(chosen, key=lambda name: chosen[name]) if chosen else ""


def capture(run: Callable[[], Any]) -> list[Launch]:
    """The launches of `run`, none of which takes place."""
    launches: list[Launch] = []
    with observed(lambda kernel, grid, arguments: launches.append(Launch(kernel, tuple(grid), dict(arguments)))):
        run()
    return launches


def source_of(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """The specialised source and the options that Triton's runtime would hand to its compiler."""
    kernel, backend = launch.kernel, make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments = {**launch.arguments, "debug": False}
    bound, specialization, extra = binder(**arguments)
    options, signature, constants, attributes = kernel._pack_args(backend, arguments, bound, specialization, extra)
    return ASTSource(kernel, signature, constants, attributes), vars(options)


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compile a captured launch for one of :data:`GPU_TARGETS` and read the artefact."""
    source, options = source_of(launch, GPU_TARGETS[target])
    built = triton.compile(source, target=GPU_TARGETS[target], options=options)
    assembly = built.asm["amdgcn" if target.startswith("gfx") else "ptx"]
    if target.startswith("gfx"):
        registers, spilled, threads = _read_amd(assembly)
    else:
        registers, spilled = _read_nvidia(built.asm["cubin"])
        threads = _number(r"\.(?:reqntid|maxntid)\s+(\d+)", assembly)
    matrix = dict(Counter(ANY_MATRIX_INSTRUCTION.findall(assembly)))
    waves = _number(r"; Occupancy: (\d+)", assembly) if target.startswith("gfx") else 0
    return Compiled(launch.name, target, registers, spilled, built.metadata.shared, threads, matrix, waves)


def _read_nvidia(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return _number(r"REG:(\d+)", shown), _number(r"STACK:(\d+)", shown) + _number(r"LOCAL:(\d+)", shown)


def _read_amd(assembly: str) -> tuple[int, int, int]:
    spilled = _number(r"\.private_segment_fixed_size:\s*(\d+)", assembly)
    spilled += 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", assembly) * (spilled == 0)
    threads = _number(r"\.max_flat_workgroup_size:\s*(\d+)", assembly)
    # On gfx90a and later .vgpr_count is the sum of both kinds, which share one file.
    return _number(r"\.vgpr_count:\s*(\d+)", assembly), spilled, threads


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in what the compiler wrote: this version of Triton writes something else")
    return int(found.group(1))
