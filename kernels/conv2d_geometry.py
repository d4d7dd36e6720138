"""Where a convolution's windows lie, and the vendor's convolutions on exactly those windows.

Shapes: x (B, C, H, W), W (N, C/g, kh, kw), y (B, N, H', W'). Output (oh, ow) reads, for tap (i, j), the input at
`(oh · stride_h − top + i · dilation_h, ow · stride_w − left + j · dilation_w)`; outside the image that is 0.
`"same"` with an even kernel pads one more on the bottom and right than on the top and left, which no vendor's
library can say: there x is padded by the difference first, as torch itself does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as conv_grad

Pair = int | Sequence[int]


@dataclass(frozen=True)
class Geometry:
    """The sizes of one layer's windows; nothing in it depends on the batch.

    Attributes:
        height, width, out_height, out_width: H, W, H', W'.
        kernel, stride, dilation: (rows, columns).
        before, after: padding (top, left) and (bottom, right).
        groups: g.
    """

    height: int
    width: int
    out_height: int
    out_width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]
    groups: int

    @property
    def pixels(self) -> int:
        """Outputs per sample and channel: H' · W'."""
        return self.out_height * self.out_width

    @property
    def taps(self) -> int:
        """Weights per input and output channel: kh · kw."""
        return self.kernel[0] * self.kernel[1]


def pair(name: str, value: Pair) -> tuple[int, int]:
    """An option that torch takes as one number or two.

    Raises:
        ValueError: neither one number nor two.

    Example:
        >>> pair("stride", 2), pair("stride", (1, 3))
        ((2, 2), (1, 3))
    """
    if isinstance(value, int):
        return value, value
    given = tuple(value)
    if len(given) == 1:
        return given[0], given[0]
    if len(given) != 2:
        raise ValueError(f"{name}: got {given}, expected one number or two")
    return given[0], given[1]


def resolve_padding(
    padding: Pair | str, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of what :func:`torch.nn.functional.conv2d` takes as `padding`.

    Raises:
        ValueError: an unknown word, or `"same"` with a stride.

    Example:
        >>> resolve_padding("same", (2, 3), (1, 1), (1, 1))
        (0, 1, 1, 1)
    """
    if not isinstance(padding, str):
        top, left = pair("padding", padding)
        return top, left, top, left
    if padding == "valid":
        return 0, 0, 0, 0
    if padding != "same":
        raise ValueError(f"padding: got {padding!r}, expected 'same', 'valid' or numbers")
    if stride != (1, 1):
        raise ValueError(f"padding: got 'same' with stride {stride}, expected stride 1")
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2


def geometry(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Geometry:
    """The windows of `weight` on `x`.

    Args:
        x: `(B, C, H, W)`.
        weight: `(N, C/g, kh, kw)`.
        stride, dilation: (rows, columns).
        padding: (top, left, bottom, right), of :func:`resolve_padding`.
        groups: g.

    Raises:
        ValueError: options that no convolution has, or a window that does not fit into the padded image.

    Example:
        >>> where = geometry(torch.zeros(1, 4, 7, 6), torch.zeros(8, 4, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1)
        >>> where.out_height, where.out_width
        (4, 3)
    """
    for name, values, least in (("stride", stride, 1), ("dilation", dilation, 1), ("padding", padding, 0)):
        if min(values) < least:
            raise ValueError(f"{name}: got {tuple(values)}, expected numbers >= {least}")
    if groups < 1 or weight.shape[0] % groups or x.shape[1] % groups:
        raise ValueError(
            f"groups: got {groups}, expected a divisor of {x.shape[1]} inputs and {weight.shape[0]} outputs"
        )
    kernel = (weight.shape[2], weight.shape[3])
    out = []
    for axis in (0, 1):
        room = x.shape[2 + axis] + padding[axis] + padding[2 + axis] - dilation[axis] * (kernel[axis] - 1) - 1
        if room < 0:
            raise ValueError(
                f"x: got an image of {tuple(x.shape[2:])} with padding {tuple(padding)}, expected at least the window "
                f"of kernel {kernel} with dilation {tuple(dilation)}"
            )
        out.append(room // stride[axis] + 1)
    return Geometry(
        x.shape[2], x.shape[3], out[0], out[1], kernel, (stride[0], stride[1]), (dilation[0], dilation[1]),
        (padding[0], padding[1]), (padding[2], padding[3]), groups,
    )  # fmt: skip


def channels_last(x: Tensor) -> bool:
    """Whether x has its channels adjacent in memory; a tensor that is both ways counts as NCHW.

    Example:
        >>> x = torch.zeros(2, 3, 4, 4)
        >>> channels_last(x), channels_last(x.to(memory_format=torch.channels_last))
        (False, True)
    """
    return x.stride(1) == 1 and x.stride(3) != 1


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of what is computed from x.

    Example:
        >>> memory_format(torch.zeros(2, 3, 4, 4))
        torch.contiguous_format
    """
    return torch.channels_last if channels_last(x) else torch.contiguous_format


def dense_pixels(image: Tensor) -> Tensor:
    """`image` itself where its pixels are one axis with one stride (0 included), else a contiguous copy.

    NCHW, channels-last and everything expanded over samples, channels or whole maps are left as they are.

    Example:
        >>> x = torch.zeros(2, 3, 4, 4)
        >>> dense_pixels(x) is x, dense_pixels(x[..., 1:]).stride()
        (True, (36, 12, 3, 1))
    """
    height, width = image.shape[2:]
    together = height == 1 or width == 1 or image.stride(2) == width * image.stride(3)
    return image if together else image.contiguous()


def pixel_stride(image: Tensor) -> int:
    """How far apart two neighbouring pixels of :func:`dense_pixels` lie, in elements.

    Example:
        >>> pixel_stride(torch.zeros(2, 3, 4, 1))
        1
    """
    return image.stride(2) if image.shape[3] == 1 else image.stride(3)


def common_unit(*strides: int) -> int:
    """The largest of 8, 4, 2 and 1 that divides all of them.

    Triton knows of an integer argument whether it is a multiple of 16, and nothing else. Images of 14 × 14 and rows
    of N + R channels are multiples of 4 and 8, which is enough for wide loads; so their strides are passed in units.

    Example:
        >>> common_unit(264, 51744), common_unit(196)
        (8, 4)
    """
    return next(unit for unit in (8, 4, 2, 1) if all(stride % unit == 0 for stride in strides))


def joint_weight(weight: Tensor, lora_a: Tensor, groups: int, layout: torch.memory_format) -> Tensor:
    """W and A side by side, group by group, so that one convolution makes x' and h from one read of x.

    A group's rows are `[W; A; 0]`, filled up to a multiple of 8, which is what tensor cores take.

    Returns:
        `(g · J, C/g, kh, kw)` in weight's dtype; the joint output's channels of a group are N/g of x', R of h, rest.

    Example:
        >>> joint_weight(torch.ones(4, 1, 1, 1), torch.ones(2, 1, 1, 1), 2, torch.contiguous_format).flatten()
        tensor([1., 1., 1., 0., 0., 0., 0., 0., 1., 1., 1., 0., 0., 0., 0., 0.])
    """
    each, rank, window = weight.shape[0] // groups, lora_a.shape[0] // groups, weight.shape[1:]
    narrow = lora_a.to(weight.dtype).contiguous(memory_format=layout)
    weight = weight.contiguous(memory_format=layout)
    parts = [weight] if groups == 1 else [weight.reshape(groups, each, *window)]
    parts.append(narrow if groups == 1 else narrow.reshape(groups, rank, *window))
    missing = -(each + rank) % 8
    if missing:
        rest = torch.zeros((missing, *window), dtype=weight.dtype, device=weight.device)
        parts.append(rest.contiguous(memory_format=layout) if groups == 1 else rest.expand(groups, *rest.shape))
    joint = torch.cat(parts, 0 if groups == 1 else 1)
    return joint if groups == 1 else joint.flatten(0, 1).contiguous(memory_format=layout)


def convolution(x: Tensor, weight: Tensor, where: Geometry, bias: Tensor | None = None) -> Tensor:
    """`weight ∗ x + bias` by the vendor's library.

    Example:
        >>> x, w = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
        >>> where = geometry(x, w, (1, 1), resolve_padding("same", (2, 2), (1, 1), (1, 1)), (1, 1), 1)
        >>> convolution(x, w, where)[0, 0]
        tensor([[4., 2.],
                [2., 1.]])
    """
    return F.conv2d(_even(x, where), weight, bias, where.stride, where.before, where.dilation, where.groups)


def input_gradient(grad: Tensor, weight: Tensor, where: Geometry) -> Tensor:
    """The gradient of :func:`convolution` with respect to x, by the vendor's library."""
    more_h, more_w = _uneven(where)
    size = (grad.shape[0], weight.shape[1] * where.groups, where.height + more_h, where.width + more_w)
    full: Tensor = conv_grad.conv2d_input(size, weight, grad, where.stride, where.before, where.dilation, where.groups)
    return full[:, :, : where.height, : where.width] if more_h or more_w else full


def weight_gradient(grad: Tensor, x: Tensor, outputs: int, where: Geometry) -> Tensor:
    """The gradient of :func:`convolution` with respect to the weight, by the vendor's library."""
    size = (outputs, x.shape[1] // where.groups, *where.kernel)
    found: Tensor = conv_grad.conv2d_weight(
        _even(x, where), size, grad, where.stride, where.before, where.dilation, where.groups
    )
    return found


def _uneven(where: Geometry) -> tuple[int, int]:
    return where.after[0] - where.before[0], where.after[1] - where.before[1]


def _even(x: Tensor, where: Geometry) -> Tensor:
    more_h, more_w = _uneven(where)
    return F.pad(x, (0, more_w, 0, more_h)) if more_h or more_w else x
