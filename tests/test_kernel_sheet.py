"""The kernel sheet's instruments: what is compiled, counted, declared and computed, each against something else."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import rfa_fast.kernels.availability as one_of_them
import torch
from rfa_fast.kernels import tuning

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
KERNELS = Path(one_of_them.__file__).parent
COMPILE = """
import json, sys, torch
from cases import CASES
from compiling import GPU_TARGETS, capture, compile_launch
from rfa_fast.kernels.tuning import candidates

found = []
for kernel, case in (("linear_forward", "target inside"), ("lora_down", "plain")):
    for target in GPU_TARGETS:
        for dtype in (torch.bfloat16, torch.float16):
            (launch,) = capture(CASES[kernel](candidates(kernel, target)[0], dtype, 8)[case])
            found.append(vars(compile_launch(launch, target)) | {"dtype": str(dtype)})
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def sheet():
    """The benchmark modules, which find each other in their own folder only."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("cases", "compiling", "counting", "layers", "occupancy", "roofline", "sheet_traffic", "traffic")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(BENCHMARKS))


def run(*arguments, **options):
    """A process that Triton compiles in: here, in the tests, it interprets."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=BENCHMARKS, env=env, capture_output=True, text=True, **options
    )


@pytest.fixture(scope="module")
def compiled():
    done = run("-c", COMPILE, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        ("sm_80", "mma.sync.aligned.m16n8k16.row.col.f32."),
        ("sm_90", "wgmma.mma_async.sync.aligned.m64n128k16.f32."),
        ("sm_100", "tcgen05.mma.cta_group::1.kind::f16"),
        ("sm_120", "mma.sync.aligned.m16n8k16.row.col.f32."),
        ("gfx942", "v_mfma_f32_32x32x8_"),
    ],
)
def test_a_matrix_kernel_has_its_targets_instruction_and_no_spill(compiled, target, instruction):
    built = [c for c in compiled if c["target"] == target and c["kernel"] == "linear_forward"]
    assert len(built) == 2
    for one in built:
        matching = [name for name in one["matrix"] if name.startswith(instruction)]
        assert matching, one["matrix"]
        if target not in ("sm_100",):
            assert any(("bf16" in name) == ("bfloat16" in one["dtype"]) for name in matching)
        assert one["spilled"] == 0
        assert 32 < one["registers"] <= (512 if target == "gfx942" else 255)
        assert one["threads"] == 8 * (64 if target == "gfx942" else 32)


def test_the_waves_of_amd_are_those_that_llvm_computes(compiled, sheet):
    for one in (c for c in compiled if c["target"] == "gfx942"):
        own = sheet.occupancy.occupancy("gfx942", one["registers"], shared=0, threads=64)
        assert min(own.blocks // 4, 8) == one["waves"] or own.bound_by == "blocks"


def test_occupancy_worked_out_by_hand(sheet):
    occupancy = sheet.occupancy.occupancy
    # 255 registers become 256 × 32 = 8,192 per warp, 8 warps in 65,536: one block of 256 threads, 8 of 64 warps.
    assert occupancy("sm_90", 255, 0, 256) == sheet.occupancy.Occupancy(1, 0.125, "registers")
    # 60 KiB and the reserved one: 3 × 61 = 183 of 228 KiB.
    assert occupancy("sm_100", 32, 60 * 1024, 128) == sheet.occupancy.Occupancy(3, 12 / 64, "shared memory")
    # 48 warps on sm_120, 12 blocks of 4.
    assert occupancy("sm_120", 32, 0, 128) == sheet.occupancy.Occupancy(12, 1.0, "warps")
    # 132 vector registers become 136: 3 waves on each of 4 SIMDs, one workgroup of 8.
    assert occupancy("gfx942", 132, 32 * 1024, 512) == sheet.occupancy.Occupancy(1, 0.25, "registers")
    assert occupancy("sm_120", 32, 100 * 1024, 128).blocks == 0  # 99 KiB is the most a block may have
    # 2 warps of 168 registers: 5,376 each, 12 on four schedulers of 3.
    assert occupancy("sm_80", 168, 0, 64) == sheet.occupancy.Occupancy(6, 12 / 64, "registers")


def test_roofline_worked_out_by_hand(sheet):
    seconds = sheet.roofline.seconds
    assert seconds("A100", moved=2.039e12, flops=1.0) == pytest.approx(1.0)
    assert seconds("H100", moved=1.0, flops=989.4e12) == pytest.approx(1.0)
    assert seconds("MI300X", moved=5.3e9, flops=1307.4e9) == pytest.approx(1e-3)


def lora_down_case(m, k, rank, dtype=torch.bfloat16):
    from rfa_fast.kernels.lora_down import lora_down
    from rfa_fast.kernels.tuning import Config

    config = Config(16, 0, 16, warps=2, stages=1)
    x, a = torch.ones(m, k, dtype=dtype), torch.ones(rank, k)
    return lambda: lora_down(x, a, config=config)


def test_requested_bytes_counted_by_hand(sheet):
    (counted,) = sheet.counting.count(lora_down_case(40, 20, 3))
    x, a, h = (counted.arguments[name] for name in ("x_ptr", "a_ptr", "h_ptr"))
    # Three programs of 16 rows (the last of 8): each row of x once, all of A (3 × 20 × 4 bytes) three times.
    assert (x.read, a.read, h.written) == (40 * 20 * 2, 3 * 3 * 20 * 4, 40 * 3 * 2)
    assert (x.distinct_read, a.distinct_read, h.distinct_written) == (40 * 20 * 2, 3 * 20 * 4, 40 * 3 * 2)
    assert counted.total.requested == 1600 + 720 + 240
    assert x.written == a.written == h.read == 0


M, N, K, R = 40, 48, 32, 3


def linear_forward_case(**options):
    from rfa_fast.kernels.linear_forward import Rows, linear_forward
    from rfa_fast.kernels.tuning import Config

    dtype = torch.bfloat16
    x, w, bias = torch.ones(M, K, dtype=dtype), torch.ones(N, K, dtype=dtype), torch.ones(N, dtype=dtype)
    group = (torch.arange(M) % 2).to(torch.int8)
    aims = {"vector": Rows(torch.ones(1, N), 1, 1), "rows": Rows(torch.ones(M, N, dtype=dtype), 1, M)}
    named = {key: aims.get(value, value) for key, value in options.items()}
    hidden = None if named.pop("down", False) else torch.ones(M, R, dtype=dtype)
    config = Config(16, 16, 16, warps=2, stages=1, route=named.pop("route", "fused"))
    return lambda: linear_forward(
        x, w, bias, torch.ones(R, K), torch.ones(N, R), hidden, scale=2.0, group=group, config=config, **named
    )


def linear_gradient_case(goal=None, kept=False, whole=False):
    from rfa_fast.kernels.linear_forward import Rows
    from rfa_fast.kernels.linear_gradient import linear_gradient
    from rfa_fast.kernels.tuning import Config

    g, y, h = torch.ones(M, N).bfloat16(), torch.ones(M, N).bfloat16(), torch.ones(M, R).bfloat16()
    aims = {"vector": Rows(torch.ones(1, N), 1, 1), "rows": Rows(torch.ones(M, N), 1, M), None: None}
    return lambda: linear_gradient(
        g, y, h, torch.ones(N, R), scale=2.0, group=(torch.arange(M) % 2).to(torch.int8), goal=aims[goal],
        forget_weight=torch.ones(M), kept=aims["rows"] if kept else None, retain_weight=torch.ones(M), whole=whole,
        config=Config(16, 32, 0, warps=2, stages=1),
    )  # fmt: skip


def linear_input_gradient_case(select, route="fused"):
    from rfa_fast.kernels.linear_input_gradient import linear_input_gradient
    from rfa_fast.kernels.tuning import Config

    g, changed, w = torch.ones(M, N).bfloat16(), torch.ones(M, N).bfloat16(), torch.ones(N, K).bfloat16()
    return lambda: linear_input_gradient(
        g, changed, (torch.arange(M) % 2).to(torch.int8), w, torch.ones(M, R), torch.ones(R, K), select=select,
        config=Config(16, 16, 16, warps=2, stages=1, route=route),
    )  # fmt: skip


def feature_mean_case(loss, fallback=False):
    from rfa_fast.kernels.feature_mean import feature_mean
    from rfa_fast.kernels.tuning import Config

    earlier = {"fallback": torch.ones(N), "fallback_known": torch.tensor(True)} if fallback else {}
    config = Config(0, 16, 0, warps=2, stages=1)
    return lambda: feature_mean(torch.ones(3, 3, N), torch.ones(3, 2), with_loss=loss, config=config, **earlier)


def row_error_case():
    from rfa_fast.kernels.row_error import row_error
    from rfa_fast.kernels.tuning import Config

    group = (torch.arange(M) % 2).to(torch.int8)
    config = Config(8, 16, 0, warps=2, stages=1)
    return lambda: row_error(torch.ones(M, N).bfloat16(), torch.ones(N), group, config=config)


def lora_a_gradient_case():
    from rfa_fast.kernels.lora_a_gradient import lora_a_gradient
    from rfa_fast.kernels.tuning import Config

    config = Config(16, 0, 16, warps=2, stages=1)
    return lambda: lora_a_gradient(torch.ones(M, R), torch.ones(M, K).bfloat16(), config=config)


def conv2d_gradient_case():
    from rfa_fast.kernels.conv2d_gradient import conv2d_gradient
    from rfa_fast.kernels.tuning import Config

    g, y, changed = (torch.ones(4, *shape).bfloat16() for shape in ((6, 5, 3), (6, 5, 3), (1, 6, 5, 3)))
    return lambda: conv2d_gradient(
        g, y, torch.ones(60, R).bfloat16(), torch.ones(6, R, 1, 1), changed, groups=1, scale=2.0,
        group=(torch.arange(4) % 2).to(torch.int8), goal=torch.ones(1, 6, 5, 3).expand_as(y),
        forget_weight=torch.ones(4), kept=None, retain_weight=None, config=Config(16, 16, 0, warps=2, stages=1),
    )  # fmt: skip


def conv2d_retain_gradient_case():
    from rfa_fast.kernels.conv2d_retain import conv2d_retain_gradient
    from rfa_fast.kernels.tuning import Config

    weight = torch.tensor([1.0, 0.0, 1.0, 0.0])  # the kernel reads no row of weight 0
    return lambda: conv2d_retain_gradient(
        torch.ones(2, 60, R), torch.ones(60, R).bfloat16(), torch.ones(4, 1, R, 5, 3).bfloat16(), torch.ones(1, R, R),
        weight, config=Config(16, 0, 0, warps=2, stages=1),
    )  # fmt: skip


ALL_CASES = {
    "no loss": lambda: linear_forward_case(),
    "target inside": lambda: linear_forward_case(columns=2),
    "target inside, l2": lambda: linear_forward_case(columns=1),
    "target given": lambda: linear_forward_case(goal="vector"),
    "teacher": lambda: linear_forward_case(goal="rows", kept="rows", emit_delta=True),
    "h inside": lambda: linear_forward_case(down=True, goal="vector"),
    "vendor": lambda: linear_forward_case(route="vendor", columns=2),
    "gradient, no loss": lambda: linear_gradient_case(),
    "gradient, residual": lambda: linear_gradient_case("vector"),
    "gradient, whole": lambda: linear_gradient_case("vector", whole=True),
    "gradient, teacher": lambda: linear_gradient_case("rows", kept=True),
    "dx": lambda: linear_input_gradient_case(0),
    "dx, residual": lambda: linear_input_gradient_case(1),
    "dx, teacher": lambda: linear_input_gradient_case(2),
    "dx, vendor": lambda: linear_input_gradient_case(0, route="vendor"),
    "mean": lambda: feature_mean_case(False),
    "mean and loss": lambda: feature_mean_case(True, fallback=True),
    "row error": row_error_case,
    "down": lambda: lora_down_case(M, K, R),
    "dA": lora_a_gradient_case,
    "convolution, gradient": conv2d_gradient_case,
    "convolution, retain gradient": conv2d_retain_gradient_case,
}


@pytest.mark.parametrize("name", ALL_CASES)
def test_the_declared_bytes_are_those_the_interpreter_sees(sheet, name):
    call = ALL_CASES[name]()
    (counted,) = sheet.counting.count(call)
    _, items = sheet.traffic.record(call, sheet.traffic.Groups(M, M // 2))
    (declared,) = [item for item in items if item.kernel]
    assert declared.name == counted.kernel
    assert (declared.read, declared.written) == (counted.total.distinct_read, counted.total.distinct_written)
    assert counted.total.requested >= counted.total.distinct


@pytest.mark.parametrize(
    "name", ["target inside", "teacher", "gradient, residual", "dx, residual", "convolution, gradient"]
)
def test_the_counters_savings_change_no_count(sheet, name):
    call = ALL_CASES[name]()
    assert sheet.counting.count(call, values=True) == sheet.counting.count(call)


def test_a_declaration_that_misses_a_pointer_is_refused(sheet, monkeypatch):
    monkeypatch.delitem(sheet.traffic.ACCESS["lora_down"], "a_ptr")
    with pytest.raises(ValueError, match=r"ACCESS\['lora_down'\]"):
        sheet.traffic.record(lora_down_case(4, 16, 2), sheet.traffic.Groups(4, 2))


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("passed", ["forward", "backward"])
def test_the_real_layers_keep_their_bounds(sheet, index, passed):
    traffic = sheet.sheet_traffic.record_pass(index, passed)
    m, k, n = traffic.layer.shape[:3]
    rows, taps = (m * 14 * 14, 9) if index > 2 else (m, 1)
    x, w, y = 2 * rows * k, 2 * n * k * taps, 2 * rows * n
    if passed == "forward":  # the steps of the unfused list, without what has the rank for a factor
        wide = (x + w + y) + x + y + 3 * y + 3 * y / 2
    else:
        wide = 2 * (y + y / 2 + y) + (y + w + x) + y + x + 3 * x + x + y
    assert wide < traffic.moved_unfused < 1.03 * wide
    assert traffic.held, traffic.ratio
    assert traffic.moved > x + w + y


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "sm_120", "gfx942", "generic"])
def test_the_bounds_hold_with_every_targets_configurations(sheet, target):
    for index in range(5):
        for passed in ("forward", "backward"):
            traffic = sheet.sheet_traffic.record_pass(index, passed, target)
            assert traffic.held, (traffic.layer.name, passed, traffic.ratio)


def test_every_kernel_is_compiled_in_some_case(sheet):
    found = set()
    for path in KERNELS.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= {
            node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        }
    launched = set()
    for kernel, cases in sheet.cases.CASES.items():
        config = tuning.candidates(kernel, tuning.GENERIC)[0]
        for case in cases(config, torch.bfloat16, 8).values():
            launched |= {launch.name for launch in sheet.compiling.capture(case)}
    assert launched == {name.removesuffix("_kernel") for name in found}
    assert set(sheet.cases.CASES) == set(tuning.TABLES)


def test_the_command_writes_a_sheet(tmp_path):
    output = tmp_path / "sheet.md"
    done = run(
        "kernel_sheet.py", "--output", str(output), "--kernel", "feature_mean", "--target", "sm_80", "--dtype", "bf16",
        "--no-traffic", "--processes", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = output.read_text(encoding="utf-8")
    assert "### `feature_mean`" in text
    assert "| sm_80 |" in text
    assert "A part of the sheet only" in text


def test_the_command_names_what_it_does_not_know():
    done = run("kernel_sheet.py", "--target", "sm_75")
    assert done.returncode == 2
    assert "sm_75" in done.stderr
    assert "gfx942" in done.stderr


@pytest.mark.long
def test_every_configuration_of_the_matrix_kernels_compiles_without_a_spill(tmp_path):
    names = ("linear_forward", "linear_input_gradient", "conv2d_forward", "conv2d_input_gradient")
    chosen = [word for name in names for word in ("--kernel", name)]
    done = run("kernel_sheet.py", "--output", str(tmp_path / "sheet.md"), "--no-traffic", *chosen)
    assert done.returncode == 0, done.stderr
