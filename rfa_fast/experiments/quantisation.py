"""Weight-only quantisation of a model, as far as its numbers go: rounded, and put back as floats.

What deployment does to a model after it has forgotten: weights go to 8 or 4 bits, and a change smaller
than half a step of the grid is gone. The question here is what such a model predicts, not how fast, so
each weight is replaced by its dequantised self in its own dtype. That works for every layer and on
every machine; int4 kernels know linears only, and no machine has them all::

    s = max|w| / (2^(bits−1) − 1)        w' = s · round(w / s)

with one s per output channel at 8 bits, and one per group of 64 inputs of a channel below (the last
group of a channel may be shorter; an all-zero group stays zero). The grid is symmetric (−7 to 7 at 4
bits: −8 stays unused) and `round` takes halves to even. Biases, norms, embeddings and buffers are left
alone, as weight-only quantisers do; a head that shares its weight with the embedding takes that along.

torchao's own arithmetic is used where torchao is installed, on the same grid, so that a table does not
depend on it. Which of the two it was stands in the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rfa_fast.modules import RFAConv1D
from rfa_fast.targets import kind_of

Quantiser = Literal["auto", "torchao", "simulated"]
GROUP_SIZE = 64

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Quantised:
    """What :func:`quantise_weights` did.

    Attributes:
        bits: of a weight.
        by: `"torchao 0.18.0"` or `"simulated"`.
        names: the weights that were rounded, by parameter name.
        share: of the model's parameters that these are, 0 to 1.
        granularity: what has a scale, in words.
    """

    bits: int
    by: str
    names: tuple[str, ...]
    share: float
    granularity: str

    def __str__(self) -> str:
        return (
            f"{self.bits}-bit weights, symmetric, {self.granularity}, rounded to nearest by {self.by} and dequantised: "
            f"{len(self.names)} weights, {self.share:.1%} of the parameters"
        )


def quantise_weights(
    model: nn.Module, bits: int, *, group_size: int = GROUP_SIZE, quantiser: Quantiser = "auto"
) -> Quantised:
    """Round the weights of every linear and convolution of a model, in place.

    Adapters that are live on it are not touched: what is rounded then is the frozen base.

    Args:
        model: floating-point weights.
        bits: 2 to 8. At 8 each output channel has a scale, below that each group of its inputs.
        group_size: inputs per group, of a convolution `C/groups · k · k` of them per channel.
        quantiser: `"auto"` takes torchao where it is installed.

    Raises:
        ValueError, TypeError: an option out of range, torchao asked for and not installed, or weights that
            are not floating, or no weight to round. Nothing has been changed then.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> _ = net.load_state_dict({"weight": torch.tensor([[7.0, 2.6]])})
        >>> print(quantise_weights(net, 4, quantiser="simulated").by, net.weight.tolist())
        simulated [[7.0, 3.0]]
    """
    check_options([bits], group_size, quantiser)
    found = list(_weights(model))
    if not found:
        raise ValueError(f"model: got {type(model).__name__} without linears and convolutions, expected some to round")
    by_torchao = _takes_torchao(quantiser)
    with torch.no_grad():
        for _, weight, transposed in found:
            rows = weight.t() if transposed else weight.flatten(1)
            rounded = round_rows(rows.float(), bits, None if bits == 8 else group_size, by_torchao=by_torchao)
            weight.copy_((rounded.t() if transposed else rounded).reshape(weight.shape))
    names = tuple(name for name, _, _ in found)
    share = sum(weight.numel() for _, weight, _ in found) / sum(p.numel() for p in model.parameters())
    granularity = "one scale per output channel" if bits == 8 else f"one scale per group of {group_size} inputs"
    return Quantised(bits, f"torchao {version('torchao')}" if by_torchao else "simulated", names, share, granularity)


def round_rows(rows: Tensor, bits: int, group_size: int | None, *, by_torchao: bool = False) -> Tensor:
    """Each row rounded to the grid of its groups.

    Args:
        rows: float32 `(N, K)`.
        bits: 2 to 8.
        group_size: columns per scale; `None`: all of them.
        by_torchao: let torchao compute it.

    Returns:
        float32 `(N, K)`.

    Example:
        >>> round_rows(torch.tensor([[-1.75, 0.6, 0.1, 7.0]]), 4, 2)
        tensor([[-1.7500,  0.5000,  0.0000,  7.0000]])
    """
    n, k = rows.shape
    width = k if group_size is None else group_size
    top = 2 ** (bits - 1) - 1
    padded = F.pad(rows, (0, -k % width))  # zeros change no group's maximum
    if by_torchao:
        return _round_by_torchao(padded, top, width)[:, :k]
    groups = padded.reshape(n, -1, width)
    scale = groups.abs().amax(-1, keepdim=True) / top
    scale = torch.where(scale > 0, scale, 1.0)
    return ((groups / scale).round() * scale).reshape(n, -1)[:, :k]


def check_options(bits: Sequence[int], group_size: int, quantiser: Quantiser) -> None:
    """Ranges, and whether a quantiser that was asked for is there.

    Raises:
        ValueError, TypeError: it is not.

    Example:
        >>> check_options([16], 64, "auto")
        Traceback (most recent call last):
        ...
        ValueError: bits: got 16, expected an integer from 2 to 8
    """
    for each in bits:
        if isinstance(each, bool) or not isinstance(each, int) or not 2 <= each <= 8:
            raise ValueError(f"bits: got {each!r}, expected an integer from 2 to 8")
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size: got {group_size!r}, expected an integer >= 1")
    if quantiser not in ("auto", "torchao", "simulated"):
        raise ValueError(f"quantiser: got {quantiser!r}, expected 'auto', 'torchao' or 'simulated'")
    if quantiser == "torchao" and find_spec("torchao") is None:
        raise ValueError("quantiser: got 'torchao', which is not installed; expected pip install 'rfa-fast[quantise]'")


def _takes_torchao(quantiser: Quantiser) -> bool:
    return quantiser == "torchao" or (quantiser == "auto" and find_spec("torchao") is not None)


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Name, weight, and whether it is stored as `(inputs, outputs)`; a shared weight comes once."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        for key, weight, transposed in _of_module(name, module):
            if id(weight) not in seen:
                seen.add(id(weight))
                yield f"{name}.{key}".lstrip("."), weight, transposed


def _of_module(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    transposed = isinstance(module, RFAConv1D) or kind_of(module) == "conv1d"
    if isinstance(module, nn.MultiheadAttention):
        keys: tuple[str, ...] = _ATTENTION  # read by a functional call: no linear holds them
    else:
        keys = ("weight",) if transposed or isinstance(module, _LAYERS) else ()
    for key in keys:
        weight = getattr(module, key)
        if weight is None:
            continue
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            got = f"one of {weight.dtype}" if isinstance(weight, nn.Parameter) else "one that is computed"
            raise TypeError(f"model: got {got} as {name}.{key}, expected a floating-point parameter")
        yield key, weight, transposed


def _round_by_torchao(rows: Tensor, top: int, width: int) -> Tensor:
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    block = (1, width)
    scale, zero = choose_qparams_affine(rows, MappingType.SYMMETRIC, block, torch.int8, -top, top)
    codes = quantize_affine(rows, block, scale, zero, torch.int8, -top, top)
    found: Tensor = dequantize_affine(codes, block, scale, zero, torch.int8, -top, top)
    return found
