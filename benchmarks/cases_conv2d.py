"""The convolution's kernels as they are launched: ResNet18's stage 3, its first layer, and sizes nothing divides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rfa_fast.kernels.conv2d_epilogue import conv2d_epilogue
from rfa_fast.kernels.conv2d_forward import conv2d_down, conv2d_forward, conv2d_plain
from rfa_fast.kernels.conv2d_geometry import Geometry, geometry
from rfa_fast.kernels.conv2d_gradient import conv2d_gradient
from rfa_fast.kernels.conv2d_input_gradient import conv2d_input_gradient
from rfa_fast.kernels.conv2d_lora_a_gradient import conv2d_lora_a_gradient
from rfa_fast.kernels.conv2d_retain import conv2d_retain_energy, conv2d_retain_gradient
from rfa_fast.kernels.conv2d_sample_mean import conv2d_sample_mean
from rfa_fast.kernels.tuning import Config
from shapes import Case, meta, meta_image
from torch import Tensor

BATCH = 128


class Layer:
    """The tensors of one convolution, without data."""

    def __init__(self, dtype: torch.dtype, rank: int, *, odd: bool = False, stride: int = 1, nchw: bool = False):
        batch, inputs, outputs, size = (3, 13, 21, 11) if odd else (BATCH, 256, 256, 14)
        self.dtype, self.batch, self.rank, self.nchw = dtype, batch, rank, nchw
        self.x = meta_image(batch, inputs, size, size, dtype=dtype, nchw=nchw)
        self.weight = meta(outputs, inputs, 3, 3, dtype=dtype)
        self.bias = meta(outputs, dtype=dtype)
        self.a, self.b = meta(rank, inputs, 3, 3), meta(outputs, rank, 1, 1)
        self.where: Geometry = geometry(self.x, self.weight, (stride, stride), (1, 1, 1, 1), (1, 1), 1)
        self.out_shape = (batch, outputs, self.where.out_height, self.where.out_width)
        self.rows = batch * self.where.pixels
        self.hidden = meta(self.rows, rank, dtype=dtype)
        self.up = meta_image(batch, rank, *self.out_shape[2:], dtype=dtype).unflatten(1, (1, -1))
        self.group = meta(batch, dtype=torch.int8)

    def output(self, dtype: torch.dtype | None = None) -> Tensor:
        """y, or something of its shape."""
        return meta_image(*self.out_shape, dtype=dtype or self.dtype, nchw=self.nchw)

    def mean(self) -> Tensor:
        """x̃, one map for all samples."""
        one = meta_image(1, *self.out_shape[1:], dtype=torch.float32, nchw=self.nchw)
        return one.expand(self.out_shape)


def _forward(config: Config, dtype: torch.dtype, rank: int) -> dict[str, Case]:
    def case(layer: Layer, *, down: bool = False, goal: bool = True, kept: bool = False) -> Case:
        return lambda: conv2d_forward(
            layer.x, layer.weight, layer.bias, layer.a, layer.b[:, :, 0, 0], None if down else layer.hidden,
            where=layer.where, scale=4.0, group=layer.group, goal=layer.mean() if goal else None,
            kept=layer.output() if kept else None, config=config,
        )  # fmt: skip

    usual, odd = Layer(dtype, rank), Layer(dtype, rank, odd=True)
    mean = meta_image(1, 256, 14, 14)
    cases = {
        "target": case(usual),
        "teacher": case(usual, kept=True),
        "no loss": case(usual, goal=False),
        "h inside, target": case(usual, down=True),
        "h alone": lambda: conv2d_down(usual.x, usual.a, where=usual.where, config=config),
        "x̃ alone": lambda: conv2d_plain(
            mean, usual.weight, usual.bias, where=usual.where, dtype=torch.float32, config=config
        ),
        "stride 2": case(Layer(dtype, rank, stride=2)),
        "unaligned, teacher": case(odd, kept=True),
        "unaligned, h inside": case(odd, down=True),
    }
    return cases


def _input_gradient(config: Config, dtype: torch.dtype, rank: int) -> dict[str, Case]:
    def case(layer: Layer) -> Case:
        return lambda: conv2d_input_gradient(
            layer.output(), layer.weight, layer.up, layer.a, where=layer.where, memory_format=torch.channels_last,
            config=config,
        )  # fmt: skip

    return {
        "stride 1": case(Layer(dtype, rank)),
        "stride 2": case(Layer(dtype, rank, stride=2)),
        "unaligned": case(Layer(dtype, rank, odd=True)),
    }


def _epilogue(config: Config, dtype: torch.dtype, rank: int) -> dict[str, Case]:
    def case(layer: Layer, *, columns: bool = False, goal: bool = False, kept: bool = False) -> Case:
        out = layer.output()
        product = out.unflatten(1, (1, -1))
        hidden = meta_image(layer.batch, rank, *layer.out_shape[2:], dtype=dtype, nchw=layer.nchw).unflatten(1, (1, -1))
        return lambda: conv2d_epilogue(
            product, hidden, out, layer.b[:, :, 0, 0], layer.bias, scale=4.0, group=layer.group,
            goal=layer.mean() if goal else None, kept=layer.output() if kept else None, columns=columns,
            copy_hidden=True, config=config,
        )  # fmt: skip

    return {
        "target inside": case(Layer(dtype, rank), columns=True),
        "target given": case(Layer(dtype, rank), goal=True),
        "teacher": case(Layer(dtype, rank), goal=True, kept=True),
        "NCHW, target inside": case(Layer(dtype, rank, nchw=True), columns=True),
        "unaligned, target inside": case(Layer(dtype, rank, odd=True), columns=True),
    }


def _gradient(config: Config, dtype: torch.dtype, rank: int) -> dict[str, Case]:
    def case(layer: Layer, *, goal: bool = True, kept: bool = False) -> Case:
        def run() -> object:
            changed = layer.output().unflatten(1, (1, -1)) if goal or kept else None
            weight = meta(layer.batch)
            return conv2d_gradient(
                layer.output(), layer.output(), layer.hidden, layer.b[:, :, 0, 0], changed, groups=1, scale=4.0,
                group=layer.group, goal=layer.mean() if goal else None, forget_weight=weight if goal else None,
                kept=layer.output() if kept else None, retain_weight=weight if kept else None, config=config,
            )  # fmt: skip

        return run

    return {
        "residual": case(Layer(dtype, rank)),
        "teacher": case(Layer(dtype, rank), kept=True),
        "no loss": case(Layer(dtype, rank), goal=False),
        "NCHW, residual": case(Layer(dtype, rank, nchw=True)),
        "unaligned, teacher": case(Layer(dtype, rank, odd=True), kept=True),
    }


def _lora_a_gradient(config: Config, dtype: torch.dtype, rank: int) -> dict[str, Case]:
    def case(layer: Layer) -> Case:
        return lambda: conv2d_lora_a_gradient(layer.up, layer.x, where=layer.where, config=config)

    return {
        "stride 1": case(Layer(dtype, rank)),
        "stride 2": case(Layer(dtype, rank, stride=2)),
        "unaligned": case(Layer(dtype, rank, odd=True)),
    }


def _sample_mean(config: Config, dtype: torch.dtype, rank: int) -> dict[str, Case]:
    def case(layer: Layer) -> Case:
        return lambda: conv2d_sample_mean(layer.x, layer.group, config=config)

    return {
        "plain": case(Layer(dtype, rank)),
        "NCHW": case(Layer(dtype, rank, nchw=True)),
        "unaligned": case(Layer(dtype, rank, odd=True)),
    }


def _retain(config: Config, dtype: torch.dtype, rank: int) -> dict[str, Case]:
    def energy(layer: Layer) -> Case:
        return lambda: conv2d_retain_energy(
            layer.hidden, meta(1, rank, rank), layer.group, pixels=layer.where.pixels, config=config
        )

    def gradient(layer: Layer, parts: int, *, retain: bool = True) -> Case:
        weight = meta(layer.batch) if retain else None
        return lambda: conv2d_retain_gradient(
            meta(parts, layer.rows, rank), layer.hidden, layer.up, meta(1, rank, rank), weight, config=config
        )

    return {
        "energy": energy(Layer(dtype, rank)),
        "gradient": gradient(Layer(dtype, rank), 2),
        "sum of U alone": gradient(Layer(dtype, rank), 2, retain=False),
        "unaligned, energy": energy(Layer(dtype, rank, odd=True)),
        "unaligned, gradient": gradient(Layer(dtype, rank, odd=True), 3),
    }


CONV2D: dict[str, Callable[[Config, torch.dtype, int], dict[str, Case]]] = {
    "conv2d_forward": _forward,
    "conv2d_input_gradient": _input_gradient,
    "conv2d_epilogue": _epilogue,
    "conv2d_gradient": _gradient,
    "conv2d_lora_a_gradient": _lora_a_gradient,
    "conv2d_retain": _retain,
    "conv2d_sample_mean": _sample_mean,
}
