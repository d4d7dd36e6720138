"""How a step is compiled: what an activation's derivative may be stored as, and what is kept of a teacher's feature."""

from __future__ import annotations

import re

import pytest
import torch
from step_cases import batches, tiny_language_model
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code

import rfa_fast
from rfa_fast import compiler, functional
from rfa_fast.compiler import compiler_settings, separate_uses
from rfa_fast.step import compile_step

ROWS, WIDTH, HIDDEN = 96, 24, 56


def wide_activations(monkeypatch, *, separate):
    """How many fp32 tensors of an activation's size the compiled step of a gated model stores; and its loss."""
    torch._dynamo.reset()
    if not separate:
        monkeypatch.setattr(compiler, "separate_uses", lambda graph: 0)
    rfa = rfa_fast.patch(tiny_language_model(2).bfloat16(), "deep", rank=2, seed=0)
    width = rfa.model.config.intermediate_size
    step = compile_step(rfa, torch.optim.AdamW(rfa.parameters(), lr=1e-2))
    batch = next(batches((4, 8)))
    with inductor.patch(force_disable_caches=True):
        losses, code = run_and_get_code(step, *batch)
    shape = rf"\(\((?:4, 8|32), {width}\), \([^)]*\), torch\.float32\)"
    return len(re.findall("empty_strided_cpu" + shape, "\n".join(code))), losses, step.grad_norm


def test_no_sigmoid_is_stored_for_the_backward_of_a_gate(monkeypatch):
    """torch's own schedule stores it in fp32: were that no longer so, the pass would have nothing to do."""
    ours, losses, norm = wide_activations(monkeypatch, separate=True)
    theirs, same, same_norm = wide_activations(monkeypatch, separate=False)
    assert ours == 0 < theirs
    assert torch.equal(losses.total, same.total)
    assert torch.allclose(norm, same_norm, rtol=1e-2)


def test_what_a_product_reads_stays_one():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    e = graph.call_function(torch.ops.aten.exp.default, (x,))
    products = [graph.call_function(torch.ops.aten.mm.default, pair) for pair in ((e, x), (x, e))]
    many = graph.call_function(torch.ops.aten.tanh.default, (x,))
    sums = [graph.call_function(torch.ops.aten.add.Tensor, (many, k)) for k in range(5)]
    plain = graph.call_function(torch.ops.aten.neg.default, (x,))
    graph.output((*products, *sums, *(graph.call_function(torch.ops.aten.add.Tensor, (plain, k)) for k in range(2))))
    before = len(graph.nodes)
    assert separate_uses(graph) == 0
    assert len(graph.nodes) == before


def test_a_pass_of_the_users_own_stays():
    def mine(graph):
        return None

    with inductor.patch(post_grad_custom_post_pass=mine), compiler_settings():
        assert inductor.post_grad_custom_post_pass is mine
    assert inductor.post_grad_custom_post_pass is None


def taught(dtype, group, norm="mse"):
    generator = torch.Generator().manual_seed(1)

    def of(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    x, weight, a, b, kept = of(ROWS, WIDTH), of(HIDDEN, WIDTH), of(4, WIDTH), of(HIDDEN, 4), of(ROWS, HIDDEN)
    leaves = [each.requires_grad_() for each in (x, a, b)]

    def run(backend="torch"):
        out = functional.rfa_linear(
            x, weight, a, b, scale=0.5, group=group, target=kept[0], retain_target=kept, norm=norm, backend=backend
        )
        return out.output.square().sum() + 3 * out.retain_loss + 2 * out.forget_loss

    return leaves, run


GROUPS = {
    "mixed": torch.tensor([0, 1, -1, 0, 1, 0]).repeat(ROWS // 6),
    "none retained": torch.ones(ROWS),
    "all retained": torch.zeros(ROWS),
    "one retained, the last": torch.cat([torch.ones(ROWS - 1), torch.zeros(1)]),
}


def test_a_backward_that_is_traced_after_a_forward_that_was_not():
    """Compiled autograd, on a batch without retain rows: there is a row to address all the same."""
    leaves, run = taught(torch.float64, GROUPS["none retained"].to(torch.int8))
    expected = torch.autograd.grad(run("reference"), leaves)
    total = run()
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        total.backward()
    for leaf, truth in zip(leaves, expected, strict=True):
        assert torch.allclose(leaf.grad, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("norm", ["mse", "l2"])
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_a_teachers_retain_rows_are_enough(group, norm, compiled):
    torch._dynamo.reset()
    leaves, run = taught(torch.float64, group.to(torch.int8), norm)
    expected = torch.autograd.grad(run("reference"), leaves)
    each = torch.compile(run, fullgraph=True) if compiled else run
    for mine, truth in zip(torch.autograd.grad(each(), leaves), expected, strict=True):
        assert torch.allclose(mine, truth, rtol=1e-10, atol=1e-10)


def test_nothing_else_of_the_teachers_feature_is_kept():
    """Half of the rows are retained: of M × N numbers, M/2 × N are kept besides y."""
    group = GROUPS["mixed"].to(torch.int8)
    _, run = taught(torch.float32, group)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        run()
    assert sizes.count((ROWS // 2, HIDDEN)) == 1
    assert (ROWS, HIDDEN) in sizes  # y
    assert sizes.count((ROWS, HIDDEN)) == 2  # for its layer, and for the square that reads it
