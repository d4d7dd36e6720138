"""Every method's loss and gradients against its paper's formula in plain autograd, on two layers in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rfa_fast.methods import METHODS, Batch, Method

FORGET = torch.tensor([False, True, False, True, False, False])
Weights = list[Tensor]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(forget: Tensor = FORGET) -> Batch:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(len(forget), 4, generator=generator, dtype=torch.float64)
    return Batch(inputs, torch.arange(len(forget)) % 3, forget)


def weights_of(model: nn.Module) -> Weights:
    return [p.detach().clone().requires_grad_(True) for p in model.parameters()]


def log_p(w: Weights, x: Tensor, temperature: float = 1.0) -> Tensor:
    z = (torch.tanh(x @ w[0].T + w[1]) @ w[2].T + w[3]) / temperature
    return z - z.exp().sum(1, keepdim=True).log()


def ce(w: Weights, x: Tensor, y: Tensor) -> Tensor:
    return -torch.stack([log_p(w, x)[i, int(y[i])] for i in range(len(y))]).mean()


def kl(teacher: Weights, student: Weights, x: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) of every sample."""
    p, q = log_p(teacher, x, temperature).detach(), log_p(student, x, temperature)
    return (p.exp() * (p - q)).sum(1)


def moved(name: str, **options: Any) -> tuple[Method, Weights, Weights]:
    """A method whose model is no longer the original: it, the weights now, and the original ones."""
    model = net()
    original = weights_of(model)
    method = METHODS[name](model, seed=3, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in method.named_parameters().values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return method, weights_of(model), original


def check(method: Method, at: Weights, expected: Tensor, given: Batch | None = None) -> dict[str, Tensor]:
    """The loss and the gradient of every trained parameter are those of `expected`, a function of `at`."""
    losses = dict(method.loss(batch() if given is None else given))
    torch.testing.assert_close(losses["total"], expected, rtol=1e-12, atol=1e-12)
    losses["total"].backward()
    wanted = torch.autograd.grad(expected, at, allow_unused=True)
    assert any(g is not None and g.abs().max() > 1e-6 for g in wanted)
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    for name, gradient in zip(names, wanted, strict=True):
        parameter = method.named_parameters().get(name)
        if parameter is not None:
            assert parameter.grad is not None
            assert gradient is not None
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12, msg=name)
    return losses


def test_neggrad() -> None:
    method, w, _ = moved("neggrad")
    x, y, f = batch()
    check(method, w, -ce(w, x[f], y[f]))


def test_finetune() -> None:
    method, w, _ = moved("finetune")
    x, y, f = batch()
    check(method, w, ce(w, x[~f], y[~f]))


def test_retrain_starts_anew_and_learns_what_is_kept(tmp_path: Path) -> None:
    model, other = net(), net(seed=9)
    save_file(other.state_dict(), tmp_path / "start.safetensors")
    method = METHODS["retrain"](model, seed=3, initial=str(tmp_path / "start.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    w = weights_of(other)
    x, y, f = batch()
    check(method, w, ce(w, x[~f], y[~f]))
    drawn = [list(METHODS["retrain"](net(), seed=s).named_parameters().values()) for s in (3, 3, 4)]
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert not torch.equal(drawn[0][0], drawn[2][0])
    assert not torch.equal(drawn[0][0], net()[0].weight)
    assert drawn[0][0].abs().max() <= 0.5  # PyTorch's rule for a linear layer of 4 inputs: U(−1/√4, 1/√4)


@pytest.mark.parametrize(("share", "used"), [(1.0, [0, 1, 2, 3, 4, 5]), (0.3, [0, 1, 3]), (0.5, [0, 1, 2, 3])])
def test_badt(tmp_path: Path, share: float, used: list[int]) -> None:
    incompetent = net(seed=9)
    save_file(incompetent.state_dict(), tmp_path / "bad.safetensors")
    options = {"initial": str(tmp_path / "bad.safetensors"), "retain_share": share, "temperature": 2.0}
    method, w, original = moved("badt", **options)
    x, _, f = batch()
    bad = weights_of(incompetent)
    each = torch.stack([kl(bad if f[i] else original, w, x[i : i + 1], 2.0)[0] for i in used])
    losses = check(method, w, each.mean())
    torch.testing.assert_close(losses["forget_kl"], each[[used.index(1), used.index(3)]].mean())


def test_badt_draws_its_incompetent_teacher_from_the_seed() -> None:
    losses = [METHODS["badt"](net(), seed=seed).loss(batch())["forget_kl"] for seed in (1, 1, 2)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_scrub_in_turns() -> None:
    method, w, original = moved("scrub", alpha=0.7, gamma=0.4)
    x, y, f = batch()
    method.begin_epoch(0, 2)
    check(method, w, -16 * kl(original, w, x[f], 4.0).mean())
    for parameter in method.named_parameters().values():
        parameter.grad = None
    method.begin_epoch(1, 2)
    losses = check(method, w, 0.7 * 16 * kl(original, w, x[~f], 4.0).mean() + 0.4 * ce(w, x[~f], y[~f]))
    assert list(losses) == ["total", "forget_kl", "retain_kl", "retain_task"]


@pytest.mark.parametrize(
    ("epochs", "most", "turns"),
    [(1, 1, "Mm"), (3, 1, "Mmmm"), (3, 2, "MmMmm"), (2, 5, "MmMm"), (2, 0, "mm")],
    ids=lambda value: str(value),
)
def test_scrub_passes(epochs: int, most: int, turns: str) -> None:
    method, w, original = moved("scrub", max_epochs=most)
    x, _, f = batch()
    passes = METHODS["scrub"].passes(METHODS["scrub"].settings({"max_epochs": most}), epochs)
    assert passes == len(turns)
    away = -16 * kl(original, w, x[f], 4.0).mean().item()
    found = ""
    for turn in range(passes):
        method.begin_epoch(turn, passes)
        found += "M" if method.loss(batch())["total"].item() == pytest.approx(away) else "m"
    assert found == turns


def test_graddiff() -> None:
    method, w, _ = moved("graddiff", forget_weight=0.5, retain_weight=2)
    x, y, f = batch()
    check(method, w, -0.5 * ce(w, x[f], y[f]) + 2 * ce(w, x[~f], y[~f]))


def test_salun_mask_labels_and_gradients() -> None:
    model = net()
    w = weights_of(model)
    x, y, f = batch()
    method = METHODS["salun"](model, seed=3, saliency=0.5, alpha=0.7)
    halves = [Batch(x[f][i : i + 1], y[f][i : i + 1], torch.tensor([True])) for i in range(2)]
    method.prepare(iter(halves))
    gradients = torch.autograd.grad(ce(w, x[f], y[f]), w)
    sizes = sorted(float(g) for gradient in gradients for g in gradient.abs().flatten())
    masks = [gradient.abs() >= sizes[len(sizes) - round(len(sizes) / 2)] * (1 - 1e-6) for gradient in gradients]
    assert sum(int(mask.sum()) for mask in masks) == 22  # of 43
    torch.manual_seed(5)
    losses = method.loss(batch())
    torch.manual_seed(5)
    other = (y + torch.randint(1, 3, (6,))) % 3
    assert (other[f] != y[f]).all()
    expected = ce(w, x[f], other[f]) + 0.7 * ce(w, x[~f], y[~f])
    torch.testing.assert_close(losses["total"], expected, rtol=1e-12, atol=0)
    losses["total"].backward()
    before = weights_of(model)
    parameters = list(method.named_parameters().values())
    for p, gradient, mask in zip(parameters, torch.autograd.grad(expected, w), masks, strict=True):
        torch.testing.assert_close(p.grad, gradient * mask)
    torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5).step()
    method.end_step()
    for p, old, mask in zip(parameters, before, masks, strict=True):
        assert torch.equal(p[~mask], old[~mask])
        assert (p[mask] != old[mask]).all()


def test_salun_refuses_texts() -> None:
    method = METHODS["salun"](net(), seed=0)
    with pytest.raises(ValueError, match="it is for classifiers"):
        method.loss(Batch(torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.long), torch.tensor([True, False])))


def pulled(method: Method) -> float:
    """How far one step of plain gradient descent moves the forget samples' cross-entropy."""
    x, y, f = batch()
    model = nn.Sequential(*list(method.model))  # type: ignore[attr-defined]
    before = nn.functional.cross_entropy(model(x[f]), y[f]).item()
    method.loss(batch())["total"].backward()
    with torch.no_grad():
        for p in method.named_parameters().values():
            p -= 0.01 * p.grad
    return nn.functional.cross_entropy(model(x[f]), y[f]).item() - before


@pytest.mark.parametrize("name", ["neggrad", "graddiff", "npo", "simnpo"])
def test_a_step_makes_the_forgotten_less_likely(name: str) -> None:
    options = {} if name == "neggrad" else {"retain_weight": 0}
    assert pulled(METHODS[name](net(), seed=0, **options)) > 1e-5


ALL = [name for name in METHODS if name != "rfa"]
EMPTY: dict[str, Callable[[int], Tensor]] = {
    "no forget sample": lambda n: torch.zeros(n, dtype=torch.bool),
    "no retained sample": lambda n: torch.ones(n, dtype=torch.bool),
}


@pytest.mark.parametrize("which", list(EMPTY))
@pytest.mark.parametrize("name", ALL)
def test_batch_without_one_group(name: str, which: str) -> None:
    method = METHODS[name](net(), seed=0)
    full = method.loss(batch())
    for phase in (0, 1):
        method.begin_epoch(phase, 2)
        losses = method.loss(batch(EMPTY[which](4)))
        assert list(losses) == list(full)
        losses["total"].backward()
        assert all(torch.isfinite(value) for value in losses.values())
        grads = [p.grad for p in method.named_parameters().values() if p.grad is not None]
        assert all(torch.isfinite(g).all() for g in grads)
    if (name, which) in {("neggrad", "no forget sample"), ("finetune", "no retained sample")}:
        assert not grads  # so that the optimizer makes no step at all, weight decay included


def test_labels_of_minus_100_are_in_no_loss() -> None:
    x, y, f = batch()
    gone = torch.tensor([False, True, True, False, False, False])
    masked = Batch(x, y.masked_fill(gone, -100), f)
    for name, expected in (
        ("neggrad", lambda w: -ce(w, x[f & ~gone], y[f & ~gone])),
        ("finetune", lambda w: ce(w, x[~f & ~gone], y[~f & ~gone])),
        ("graddiff", lambda w: ce(w, x[~f & ~gone], y[~f & ~gone]) - ce(w, x[f & ~gone], y[f & ~gone])),
    ):
        method, w, _ = moved(name)
        check(method, w, expected(w), masked)
