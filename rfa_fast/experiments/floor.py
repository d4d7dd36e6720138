"""The bare matrix products of a step: what no arrangement of it can leave out.

In it, in the model's dtype, the layout and the order in which torch dispatches them:

* forward: the product of every frozen layer, of attention (Q·Kᵀ and P·V, as batched products; a causal one counts
  half its columns), of every convolution and of the head;
* backward: the gradient of the input, dX = G·W, of every product behind the first adapted layer, which is the head's
  p·W too. Where nothing upstream is trained there is no dX: not in the prefix, not of the first adapted layers.
  Attention's backward is four products; the recomputation inside a flash kernel is not counted.

Not in it: anything elementwise, embeddings, normalisations, biases, softmax, losses, the low-rank branches, the
optimiser, weight gradients of frozen layers, recomputation. Rows of the head without a label are left out.

The products are found, not listed: a forward and a backward run on shapes alone (fake tensors) under a dispatch
mode, with a zero that requires a gradient added to the output of each adapted layer. Replaying takes operands from
scratch memory that every product shares, so that the floor needs little memory and finds it warm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rfa_fast.experiments.sharing import labelled_rows, sharing_copy
from rfa_fast.head import logits_of
from rfa_fast.methods.weights import call
from rfa_fast.targets import output_embeddings

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Operand:
    """A tensor of a product: its shape, dtype, and the order of its axes in memory, outermost first."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def view(self, scratch: Tensor) -> Tensor:
        """The front of a 1-dim tensor, seen as this operand."""
        laid = scratch[: self.elements].view([self.shape[axis] for axis in self.order])
        return laid.permute([self.order.index(axis) for axis in range(len(self.shape))])


@dataclass(frozen=True)
class Product:
    """One matrix product.

    Attributes:
        kind: `"mm"`, `"bmm"`, `"conv"` (operands x, W), `"conv_dx"` (operands G, W, and the x whose gradient it is).
        left, right: its operands.
        window: a convolution's stride, padding, dilation, groups.
        source: the x of `"conv_dx"`; torch asks for it, its values do not matter.
    """

    kind: str
    left: Operand
    right: Operand
    window: tuple[Any, ...] = ()
    source: Operand | None = None

    @property
    def result(self) -> tuple[int, ...]:
        """Shape of the result of a `"mm"` or `"bmm"`; `(0,)` for a convolution, which allocates its own."""
        return (*self.left.shape[:-1], self.right.shape[-1]) if self.kind in ("mm", "bmm") else (0,)

    @property
    def flops(self) -> int:
        """Twice the number of multiplications."""
        if self.kind in ("mm", "bmm"):
            return 2 * self.left.elements * self.right.shape[-1]
        outputs = self.left.shape if self.kind == "conv_dx" else _conv_shape(self)
        return 2 * math.prod(outputs) * math.prod(self.right.shape[1:])


class Floor:
    """The products of a step, ready to run.

    Args:
        products: in order.
        features: shape of the output of each adapted layer, by name.

    Example:
        >>> flat = Operand((2, 3), torch.float32, (0, 1)), Operand((3, 4), torch.float32, (0, 1))
        >>> floor = Floor([Product("mm", *flat)])
        >>> floor.run()
        >>> floor.flops
        48
    """

    def __init__(self, products: Sequence[Product], features: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.products, self.features = tuple(products), dict(features or {})
        self._calls: list[tuple[Product, Tensor, Tensor, Tensor]] = []

    @property
    def flops(self) -> int:
        """Of one step."""
        return sum(product.flops for product in self.products)

    @torch.no_grad()
    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Allocate the operands; :meth:`run` does so when it was not done."""
        sizes: dict[tuple[torch.dtype, str], int] = {}
        for product in self.products:
            for role, dtype, elements in _needs(product):
                sizes[dtype, role] = max(sizes.get((dtype, role), 0), elements)
        scratch = {
            key: torch.empty(size, dtype=key[0], device=device).normal_(0.0, 0.05) for key, size in sizes.items()
        }
        for product in self.products:
            left = product.left.view(scratch[product.left.dtype, "left"])
            right = product.right.view(scratch[product.right.dtype, "right"])
            third = product.source or Operand(product.result, product.left.dtype, tuple(range(len(product.result))))
            self._calls.append((product, left, right, third.view(scratch[third.dtype, "third"])))

    @torch.no_grad()
    def run(self) -> None:
        """Every product once."""
        if not self._calls:
            self.prepare()
        for product, left, right, third in self._calls:
            if product.kind == "mm":
                torch.mm(left, right, out=third)
            elif product.kind == "bmm":
                torch.bmm(left, right, out=third)
            elif product.kind == "conv":
                stride, padding, dilation, groups = product.window
                torch.convolution(left, right, None, stride, padding, dilation, False, [0], groups)
            else:
                stride, padding, dilation, groups = product.window
                torch.ops.aten.convolution_backward(
                    left, third, right, None, stride, padding, dilation, False, [0], groups, (True, False, False)
                )


def floor_of(model: nn.Module, inputs: Tensor | Mapping[str, Any], labels: Tensor, names: Sequence[str]) -> Floor:
    """The products of one step of `model` when the layers `names` are adapted.

    Args:
        model: unpatched; it is neither changed nor run on real tensors (it is where its forward reads values).
        inputs: a tensor, or a transformers model's keyword dict (without labels).
        labels: int64 `(B,)` or `(B, T)`, as :meth:`rfa_fast.RFA.loss` takes them; −100 rows cost no head.
        names: adapted layers, as in `RFA.names`.

    Raises:
        ValueError: the model dispatches a product that cannot be replayed.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> floor_of(net, torch.ones(2, 4), torch.tensor([0, 1]), ["0"]).flops  # 2·(2·4·8 + 2·8·3), and 2·2·3·8 back
        320
    """
    try:
        products, features = _record(model, inputs, names, fake=True)
    except (DataDependentOutputException, DynamicOutputShapeException):
        products, features = _record(model, inputs, names, fake=False)
    head = output_embeddings(model)
    if labels.ndim == 2 and isinstance(head, nn.Linear):
        rows = int(labelled_rows(model, labels).sum())
        products = [_fewer_rows(product, labels.numel(), rows, head.out_features) for product in products]
    return Floor(products, features)


def _record(
    model: nn.Module, inputs: Tensor | Mapping[str, Any], names: Sequence[str], *, fake: bool
) -> tuple[list[Product], Shapes]:
    twin = sharing_copy(model).requires_grad_(False).eval()
    device = next(twin.parameters()).device
    recorder = _Recorder()
    with ExitStack() as stack:
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_no_fast_path())
        zeros = [torch.zeros((), device=device, requires_grad=True) for _ in names]

        features: Shapes = {}

        def adapted(name: str, zero: Tensor) -> Any:
            def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                features[name] = tuple(output.shape)
                return output + zero.to(output.dtype)

            return hook

        for name, zero in zip(names, zeros, strict=True):
            twin.get_submodule(name).register_forward_hook(adapted(name, zero))
        stack.enter_context(recorder)
        stack.enter_context(torch.enable_grad())
        value = logits_of(call(twin, inputs)).float().square().sum()
        torch.autograd.grad(value, zeros, allow_unused=True)
    return recorder.products, features


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Without torch's inference path for attention, which is one operation around all of its products."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every product that is dispatched."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[Product] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        name = func._overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.products.append(Product(name, _operand(args[0]), _operand(args[1])))
        elif name in ("addmm", "baddbmm"):
            self.products.append(Product(name.replace("add", ""), _operand(args[1]), _operand(args[2])))
        elif name == "convolution" and not given["transposed"]:
            window = tuple(given[key] for key in ("stride", "padding", "dilation", "groups"))
            self.products.append(Product("conv", _operand(args[0]), _operand(args[1]), window))
        elif name == "convolution_backward" and not given["transposed"]:
            if given["output_mask"][0]:
                window = tuple(given[key] for key in ("stride", "padding", "dilation", "groups"))
                grad, x, weight = args[:3]
                self.products.append(Product("conv_dx", _operand(grad), _operand(weight), window, _operand(x)))
        elif "scaled_dot_product" in name and "fused_sdp_choice" not in name:
            self.products += _attention(given, backward=name.endswith("_backward"))
        elif func._overloadpacket in flop_registry:
            raise ValueError(f"model: got a step that dispatches {func}, expected products the floor can replay")
        return func(*args, **(kwargs or {}))


def _attention(given: Mapping[str, Any], *, backward: bool) -> list[Product]:
    """Attention `(B, H, T, D)` as batched products of the same work."""
    query, key, value = (given[name] for name in ("query", "key", "value"))
    batch, (rows, depth) = math.prod(query.shape[:-2]), query.shape[-2:]
    columns, width = key.shape[-2], value.shape[-1]
    if given.get("is_causal", False):
        columns = (columns + 1) // 2

    def product(m: int, k: int, n: int, *, turned: bool) -> Product:
        left = Operand((batch, m, k), query.dtype, (0, 1, 2))
        return Product("bmm", left, Operand((batch, k, n), query.dtype, (0, 2, 1) if turned else (0, 1, 2)))

    if not backward:
        return [product(rows, depth, columns, turned=True), product(rows, columns, width, turned=False)]
    return [
        product(columns, rows, width, turned=False),  # dV = Pᵀ·dO
        product(rows, width, columns, turned=True),  # dP = dO·Vᵀ
        product(rows, columns, depth, turned=False),  # dQ = dS·K
        product(columns, rows, depth, turned=False),  # dK = dSᵀ·Q
    ]


def _operand(tensor: Tensor) -> Operand:
    """Its shape and the order of its axes by stride; an expanded one counts as contiguous."""
    shape = tuple(tensor.shape)
    strides = tensor.stride()
    if 0 in strides:
        return Operand(shape, tensor.dtype, tuple(range(len(shape))))
    order = sorted(range(len(shape)), key=lambda axis: (-strides[axis], axis))
    return Operand(shape, tensor.dtype, tuple(order))


def _fewer_rows(product: Product, all_rows: int, rows: int, vocabulary: int) -> Product:
    """The head's products on labelled rows alone."""
    if product.kind != "mm" or product.left.shape[0] != all_rows or vocabulary not in (
        product.left.shape[1], product.right.shape[1],
    ):  # fmt: skip
        return product
    return replace(product, left=replace(product.left, shape=(rows, product.left.shape[1])))


def _needs(product: Product) -> list[tuple[str, torch.dtype, int]]:
    third = math.prod(product.result) if product.source is None else product.source.elements
    return [
        ("left", product.left.dtype, product.left.elements),
        ("right", product.right.dtype, product.right.elements),
        ("third", product.left.dtype, third),
    ]


def _conv_shape(product: Product) -> tuple[int, ...]:
    """(B, N, …) of a convolution's result."""
    stride, padding, dilation, _ = product.window
    outputs, kernel = product.right.shape[0], product.right.shape[2:]
    sizes = product.left.shape[2:]
    spatial = (
        (size + 2 * pad - step * (taps - 1) - 1) // jump + 1
        for size, taps, jump, pad, step in zip(sizes, kernel, stride, padding, dilation, strict=True)
    )
    return (product.left.shape[0], outputs, *spatial)
