"""The fused head: all outputs and gradients in the interpreter against float64, its memory, and torch.compile."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from head_cases import HEADS, head_case, others, run_head
from hypothesis import strategies as st
from kernel_cases import DTYPES, drawn, drawn_dtypes, few_programs, launches, poison_allocations
from operator_cases import assert_error_rule, leaf
from rfa_fast.kernels import common
from torch._dynamo.testing import CompileCounterWithBackend

from rfa_fast.functional import rfa_head_loss
from rfa_fast.ops.head import FP16_LIFT, Head

KINDS = ["mixed", "retain", "forget", "ignored"]
KERNELS = {"softmax_stats_kernel", "softmax_gradient_kernel"}

__all__ = ["few_programs"]

pytestmark = pytest.mark.usefixtures("few_programs")


@pytest.fixture(autouse=True)
def poisoned(request, monkeypatch):
    if "compile" not in request.node.name:
        poison_allocations(monkeypatch)


def compare(case, dtype, *, chunk_rows=100, **options):
    """The three runs the error rule needs."""
    tensors, labels, group = case
    v = tensors["weight"].shape[0]
    rounded = {k: t.detach().to(dtype).requires_grad_(t.requires_grad) for k, t in tensors.items()}
    widened = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in rounded.items()}
    exact = run_head(widened, labels, group, **options, backend="reference")
    rival = run_head(rounded, labels, group, **options, backend="reference")
    chunk_bytes = dtype.itemsize * v * chunk_rows
    with launches() as seen:
        ours = run_head(rounded, labels, group, **options, chunk_bytes=chunk_bytes, backend="triton")
    used = bool(((labels != -100) & (group >= 0)).any())
    assert set(seen) >= KERNELS or not used
    for name in ("retain_count", "forget_count"):
        assert torch.equal(ours.pop(name), exact.pop(name))
    for name in ("retain", "forget", "mean_prediction"):
        assert ours[name].dtype == torch.float32
    for name in ("hidden", "weight"):
        assert ours.get(f"grad {name}", rounded[name]).dtype == dtype
    return ours, rival, exact


def stacked(runs):
    """Results of several draws as one: torch's error of a single number can be 0 by luck."""
    return {name: torch.stack([r[name] for r in runs]) for name in runs[0]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_under_the_error_rule(kind, softcap, head, dtype):
    chunk_rows = {"mixed": 7, "retain": 7, "forget": 100, "ignored": 100}[kind]
    case = head_case(13, 9, 37, head=head, bias=softcap is None, kind=kind, seed=1)
    norm = "l2" if kind == "mixed" else "mse"
    assert_error_rule(*compare(case, dtype, chunk_rows=chunk_rows, softcap=softcap, norm=norm), dtype)


@pytest.mark.parametrize(
    ("head", "rows"), [("frozen", n) for n in (1, 2, 3, 4, 5, 7)] + [("trained", 1), ("trained", 3), ("adapted", 3)]
)
def test_any_chunk_gives_the_same(rows, head):
    """Chunks that end before, at and after the last retain row."""
    assert_error_rule(*compare(head_case(9, 5, 20, head=head), torch.float32, chunk_rows=rows), torch.float32)


def test_chunks_of_one_row_of_an_adapted_head():
    assert_error_rule(*compare(head_case(4, 5, 20, head="adapted"), torch.float32, chunk_rows=1), torch.float32)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fallback_stands_in_for_retain_rows_that_are_not_there(kind, head):
    fallback = leaf(20, seed=9).detach().softmax(0)
    case = head_case(12, 5, 20, head=head, kind=kind)
    for chunk_rows in (7, 100):
        ours, rival, exact = compare(case, torch.float32, chunk_rows=chunk_rows, mean_prediction=fallback.float())
        assert_error_rule(ours, rival, exact, torch.float32)
        if kind == "forget":
            assert torch.equal(ours["mean_prediction"], fallback.float())
            assert float(ours["forget"].detach()) > 0


@pytest.mark.parametrize("head", ["frozen", "adapted"])
@pytest.mark.parametrize("chunk_rows", [5, 100])
def test_nothing_known_is_an_exact_zero(chunk_rows, head):
    tensors, labels, group = head_case(12, 5, 20, head=head, kind="forget")
    tensors = {k: t.detach().float().requires_grad_(t.requires_grad) for k, t in tensors.items()}
    results = run_head(tensors, labels, group, chunk_bytes=4 * 20 * chunk_rows, backend="triton")
    assert int(results.pop("forget_count")) > 0
    assert not any(bool(value.any()) for value in results.values())


def test_an_unnormalised_fallback_keeps_its_weight():
    fallback = 3 * leaf(20, seed=9).detach().softmax(0).float()
    case = head_case(12, 5, 20, kind="forget")
    assert_error_rule(*compare(case, torch.float32, mean_prediction=fallback), torch.float32)


@pytest.mark.parametrize("given", [False, True], ids=["mean", "target"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_target_of_an_adapted_head(dtype, given):
    extra = {"target": leaf(37, seed=8).detach().float()} if given else {}
    for chunk_rows in (6, 100) if dtype == torch.float32 else (6,):
        runs = [
            compare(head_case(11, 9, 37, head="adapted", seed=seed), dtype, chunk_rows=chunk_rows, scale=0.5, **extra)
            for seed in (1, 2)
        ]
        assert_error_rule(*map(stacked, zip(*runs, strict=True)), dtype)


@pytest.mark.parametrize("head", HEADS)
def test_one_row_and_one_class(head):
    for rows, k, v in ((1, 1, 1), (1, 3, 7), (5, 2, 1)):
        runs = [compare(head_case(rows, k, v, head=head, seed=seed), torch.float32) for seed in range(4)]
        assert_error_rule(*map(stacked, zip(*runs, strict=True)), torch.float32)


@pytest.mark.parametrize("head", HEADS)
def test_no_row_is_a_correct_empty_result_with_gradients(head):
    tensors, labels, group = head_case(0, 5, 20, head=head)
    tensors = {k: t.detach().float().requires_grad_(t.requires_grad) for k, t in tensors.items()}
    results = run_head(tensors, labels, group, backend="triton")
    assert not any(bool(value.any()) for value in results.values())
    assert results["grad hidden"].shape == (0, 5)


def test_strided_arguments():
    tensors, labels, group = head_case(12, 6, 20)
    labels, group, weight, bias = (
        torch.stack([t, t], -1)[..., 0] for t in (labels, group, tensors["weight"], tensors["bias"])
    )
    hidden = tensors["hidden"].detach().t().contiguous().t().requires_grad_()
    strided = {"hidden": hidden, "weight": weight, "bias": bias}
    assert_error_rule(*compare((strided, labels, group), torch.float32, chunk_rows=5), torch.float32)


cases = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 20), "k": st.integers(1, 12), "v": st.integers(1, 50), "head": st.sampled_from(HEADS),
        "bias": st.booleans(), "kind": st.sampled_from(KINDS), "seed": st.integers(0, 99), "dtype": drawn_dtypes,
        "softcap": st.sampled_from([None, 3.0]), "chunk_rows": st.integers(1, 25), "fallback": st.booleans(),
    }
)  # fmt: skip


def check(case):
    shape = {name: case[name] for name in ("rows", "k", "v", "head", "bias", "kind", "seed")}
    options = {"softcap": case["softcap"], "chunk_rows": case["chunk_rows"]}
    if case["fallback"]:
        options["mean_prediction"] = leaf(case["v"], seed=9).detach().softmax(0).float()
    ours, rival, exact = compare(head_case(**shape), case["dtype"], **options)
    # A single drawn number has no error to compare with: twice torch's, or a few roundings of the largest logit.
    reach = 2 + 4 * case["k"] ** 0.5
    for name, truth in exact.items():
        unit = 8 * torch.finfo(case["dtype"]).eps * max(reach, float(truth.detach().abs().max())) * case["rows"]
        if "align" in name:
            unit *= reach
        mine, theirs = (float((r[name].detach().double() - truth.detach()).abs().max()) for r in (ours, rival))
        assert mine <= 2 * theirs + unit, (name, mine, theirs, unit)


@drawn(cases, 8)
def test_drawn_cases(case):
    check(case)


@pytest.mark.long
@drawn(cases, 300)
def test_many_drawn_cases(case):
    check(case)


def test_a_vocabularys_small_probabilities_survive_fp16():
    """99,999 classes share 1 %: each lies below what fp16 resolves, together they move the hidden state."""
    v = 100_000
    weight = torch.zeros(v, 2)
    weight[0, 0], weight[1:, 1] = 16.0, 1.0
    hidden = torch.tensor([[16.0 / 16, 0.0]])
    tensors = {"hidden": hidden.double().requires_grad_(), "weight": weight.double()}
    labels, group = torch.tensor([0]), torch.tensor([0], dtype=torch.int8)
    ours, _, exact = compare((tensors, labels, group), torch.float16)
    assert torch.allclose(ours["grad hidden"].double(), exact["grad hidden"], rtol=2e-3)
    assert FP16_LIFT > 1


def arguments(needs_gradient=True, softcap=None, dtype=torch.float32):
    tensors, labels, group = head_case(9, 5, 20)
    hidden, weight, bias = (tensors[name].detach().to(dtype) for name in ("hidden", "weight", "bias"))
    fallback = torch.full((20,), 0.05)
    hidden.requires_grad_(needs_gradient)
    return hidden, weight, bias, labels, group, fallback, softcap, 4 * 20 * dtype.itemsize, 0.0, needs_gradient


@pytest.mark.parametrize("interpreted", ["1", "0"], ids=["kernels", "host"])
def test_opcheck_compile_rules(monkeypatch, interpreted):
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    operators = torch.ops.rfa_fast
    for dtype in (torch.float32, torch.float16):
        torch.library.opcheck(operators.head_loss, arguments(dtype=dtype))
    torch.library.opcheck(operators.head_loss, arguments(needs_gradient=False, softcap=3.0))
    _, labels, group = head_case(9, 5, 20)
    logits = torch.randn(9, 20, requires_grad=True)
    soft, one = torch.full((20,), 0.05), torch.ones(())
    torch.library.opcheck(operators.task_sums, (logits, labels, group, soft, 3.0))
    lse = operators.task_sums(logits.detach(), labels, group, soft, None)[2]
    torch.library.opcheck(operators.task_sums_backward, (one, None, logits.detach(), lse, labels, group, soft, None))
    torch.library.opcheck(operators.probability_sums, (logits.detach(), labels, group, None))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_host_implementation_equals_the_kernels(monkeypatch, softcap):
    operators, results = torch.ops.rfa_fast, []
    for interpreted in ("1", "0"):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        given = arguments(softcap=softcap)
        out = Head(*operators.head_loss(*given))
        still = Head(*operators.head_loss(given[0].detach(), *given[1:-1], False))
        assert still.hidden_gradient.numel() == 0
        logits = torch.randn(9, 20, generator=torch.Generator().manual_seed(0)).requires_grad_()
        retain, forget, lse = operators.task_sums(logits, given[3], given[4], out.soft_label, softcap)
        sums = operators.probability_sums(logits.detach(), given[3], given[4], softcap)
        grads = torch.autograd.grad(0.3 * retain + forget, logits) + torch.autograd.grad(
            out.retain + 0.7 * out.forget, given[0]
        )
        results.append([*out, *still[:-1], retain, forget, lse, sums, *grads])
    for kernels, host in zip(*results, strict=True):
        assert torch.allclose(kernels, host, rtol=1e-5, atol=1e-5)


def test_a_loss_nobody_differentiates():
    """One of the two losses alone, and neither: no gradient that was not asked for, and the right one of what was."""
    tensors, labels, group = head_case(12, 5, 20)
    weight = tensors["weight"].float()
    truth = {}
    for backend in ("reference", "triton"):
        hidden = tensors["hidden"].detach().float().requires_grad_()
        out = rfa_head_loss(hidden, weight, labels, group, backend=backend)
        truth[backend] = torch.autograd.grad(out.forget, hidden, retain_graph=True) + torch.autograd.grad(
            out.retain, hidden
        )
        assert not out.mean_prediction.requires_grad
    for a, b in zip(*truth.values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    with torch.no_grad():
        assert not rfa_head_loss(hidden, weight, labels, group, backend="triton").retain.requires_grad
    assert not rfa_head_loss(hidden.detach(), weight, labels, group, backend="triton").retain.requires_grad


def test_autocast_takes_the_products_in_its_dtype():
    for head in ("frozen", "adapted"):
        tensors, labels, group = head_case(12, 5, 20, head=head)
        tensors = {k: t.detach().float().requires_grad_(t.requires_grad) for k, t in tensors.items()}
        runs = []
        for backend in ("torch", "triton"):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                runs.append(run_head(tensors, labels, group, chunk_bytes=2 * 20 * 5, backend=backend))
        for name, truth in runs[0].items():
            assert runs[1][name].dtype == truth.dtype, name
            assert torch.allclose(runs[1][name].double(), truth.double(), rtol=0.05, atol=0.05), name


def allocations(function):
    """Bytes of each allocation inside, and the most that was live at once, as torch's allocator saw them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    moves = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for nbytes in moves:
        live += nbytes
        peak = max(peak, live)
    return moves, peak


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("head", HEADS)
def test_no_more_logits_than_a_chunk_are_ever_there(head, softcap):
    """Launches are left out: the interpreter holds on to its last arguments, which a GPU does not."""
    rows, k, v, chunk_rows = 640, 4, 600, 60
    tensors, labels, group = head_case(rows, k, v, head=head)
    tensors = {n: t.detach().float().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    chunk, all_of_them = 4 * v * chunk_rows, 4 * v * int((labels != -100).sum())
    largest, peaks = {}, {}
    for backend in ("reference", "triton"):
        options = {"chunk_bytes": chunk, "softcap": softcap, "backend": backend}
        with common.observed(lambda *launch: None):
            moves, peaks[backend] = allocations(lambda options=options: run_head(tensors, labels, group, **options))
        largest[backend] = max(moves)
    assert largest["reference"] >= all_of_them  # the count does see what the reference builds
    # Partial sums of dB, which are no logits, are 32 times as large as B.
    assert largest["triton"] <= max(chunk, 4 * 32 * 3 * v if head == "adapted" else 0)
    small = 4 * (rows * k * 4 + v * k * 2 + v * 8) + 8 * rows * 4  # hidden states, weight, ỹ, labels, and their copies
    if head == "frozen":
        assert peaks["triton"] <= chunk + small
    assert peaks["triton"] < peaks["reference"] / 3


def test_the_gradient_of_the_hidden_states_is_made_only_if_asked_for():
    rows, k, v = 64, 512, 8
    tensors, labels, group = head_case(rows, k, v, bias=False)
    weight = tensors["weight"].float()
    for needs in (False, True):
        hidden = tensors["hidden"].detach().float().requires_grad_(needs)

        def loss(hidden=hidden):
            rfa_head_loss(hidden, weight, labels, group, chunk_bytes=4 * v * 4, backend="triton")

        moves, _ = allocations(loss)
        assert (max(moves) >= 4 * rows * k) == needs


@pytest.mark.parametrize(
    ("backend", "head"), [("aot_eager", "frozen"), ("inductor", "frozen"), ("inductor", "adapted")]
)
def test_compile_is_one_frame_and_one_dynamic_one(backend, head):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    def step(tensors, labels, group):
        out = rfa_head_loss(
            tensors["hidden"], tensors["weight"], labels, group, **others(tensors), softcap=5.0, backend="triton"
        )
        total = out.retain / out.retain_count.clamp(min=1) + out.forget / out.forget_count.clamp(min=1)
        return total if out.retain_align is None else total + out.retain_align + out.forget_align

    compiled, frames = torch.compile(step, fullgraph=True, backend=counter), []
    for rows in (6, 9, 12, 70):
        tensors, labels, group = head_case(rows, 5, 20, head=head, seed=rows)
        tensors = {k: t.detach().float().requires_grad_(t.requires_grad) for k, t in tensors.items()}
        wanted = [t for t in tensors.values() if t.requires_grad]
        grads = [torch.autograd.grad(f(tensors, labels, group), wanted) for f in (compiled, step)]
        for ours, eager in zip(*grads, strict=True):
            assert torch.allclose(ours, eager, rtol=1e-5, atol=1e-5)
        frames.append(counter.frame_count)
    assert frames == [1, 2, 2, 2]


def test_compile_takes_the_chunks_of_an_adapted_head_in_one_graph():
    torch._dynamo.reset()
    tensors, labels, group = head_case(12, 5, 20, head="adapted")
    tensors = {k: t.detach().float().requires_grad_(t.requires_grad) for k, t in tensors.items()}

    def step(tensors, labels, group):
        out = rfa_head_loss(
            tensors["hidden"], tensors["weight"], labels, group, **others(tensors), chunk_bytes=4 * 20 * 5,
            backend="triton",
        )  # fmt: skip
        return out.retain + out.forget + out.retain_align + out.forget_align

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    wanted = [t for t in tensors.values() if t.requires_grad]
    grads = [torch.autograd.grad(f(tensors, labels, group), wanted) for f in (compiled, step)]
    for ours, eager in zip(*grads, strict=True):
        assert torch.allclose(ours, eager, rtol=1e-5, atol=1e-5)


def test_compile_sees_the_kernels_on_a_gpu():
    """On (fake) CUDA tensors the operators on logits decompose into their kernels, with any number of rows."""
    code = """
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch._subclasses.functional_tensor import dispatch_functionalize
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.experimental.symbolic_shapes import ShapeEnv
        import rfa_fast.ops.head

        def terms(u, y, g, soft, one):
            ops = torch.ops.rfa_fast
            retain, forget, lse = ops.task_sums(u, y, g, soft, 30.0)
            return ops.task_sums_backward(one, one, u, lse, y, g, soft, 30.0), ops.probability_sums(u, y, g, None)

        fakes = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        with fakes:
            u = torch.empty(480, 1000, device="cuda", dtype=torch.bfloat16)
            y, g = torch.empty(480, device="cuda", dtype=torch.int64), torch.empty(480, device="cuda", dtype=torch.int8)
            soft, one = torch.empty(1000, device="cuda"), torch.empty((), device="cuda")
            for mode in ("fake", "symbolic"):
                trace = make_fx(dispatch_functionalize(terms), tracing_mode=mode, _allow_non_fake_inputs=True)
                traced = trace(u, y, g, soft, one)
                names = [str(node.target) for node in traced.graph.nodes]
                print(sum("triton_kernel_wrapper" in name for name in names), any("rfa_fast" in name for name in names))
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["4", "False", "4", "False"], done.stderr[-2000:]
