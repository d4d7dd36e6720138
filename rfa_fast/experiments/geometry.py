"""A model's geometry without its weights, and random batches for any model: what a benchmark runs on.

Time and memory of a step depend on shapes, not on values, so that neither trained weights nor data are needed. What
a model takes is read off it: transformers says it by `main_input_name`, any other model by its first layer.
How many classes it answers with is found by running it on shapes alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfa_fast.experiments.rivals import StepBatch
from rfa_fast.experiments.sharing import sharing_copy
from rfa_fast.files import read_object
from rfa_fast.head import logits_of, predicts_next_token
from rfa_fast.methods.weights import call
from rfa_fast.metrics.shapes_only import DependsOnValues, fake_copy, shapes_only

DEFAULT_LENGTH, DEFAULT_IMAGE = 256, 224
DEFAULT_TEXTS, DEFAULT_IMAGES = 4, 32
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def geometry(config: str | os.PathLike[str], dtype: str = "auto", device: str = "meta") -> nn.Module:
    """The model that a transformers configuration describes, with random weights or with none.

    Args:
        config: a config.json, or the folder it lies in.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`; `"auto"`: as the configuration says, else float32.
        device: `"meta"` allocates nothing; any other fills the weights as transformers initialises them.

    Returns:
        The model in eval mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON object, an architecture that transformers does not have, or an unknown dtype.

    Example:
        >>> import json, tempfile
        >>> values = {"architectures": ["GPT2LMHeadModel"], "n_embd": 8, "n_head": 2, "n_layer": 1}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "config.json").write_text(json.dumps(values))
        ...     model = geometry(folder)
        >>> type(model).__name__, model.lm_head.weight.device.type
        ('GPT2LMHeadModel', 'meta')
    """
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"config: {path} does not exist, expected a config.json of transformers")
    values = read_object(path, "a model's configuration", "config: ")
    import transformers

    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    kind = None if name is None else getattr(transformers, name, None)
    if kind is None:
        raise ValueError(f"config: {path}: architectures: got {names!r}, expected a class that transformers has")
    if dtype not in ("auto", *_DTYPES):
        raise ValueError(f"dtype: got {dtype!r}, expected one of auto, {', '.join(_DTYPES)}")
    chosen = str(values.get("dtype") or values.get("torch_dtype") or "float32") if dtype == "auto" else dtype
    parsed = kind.config_class.from_dict(values)
    with torch.device(device):
        model: nn.Module = kind._from_config(parsed, dtype=_DTYPES.get(chosen.removeprefix("torch."), torch.float32))
    return model.eval()


@dataclass(frozen=True)
class Batches:
    """Random batches of one shape for one model.

    Attributes:
        size: samples, half of them (rounded down) to forget.
        shape: of one sample: `(T,)` tokens, `(C, H, W)` or `(K,)`.
        keyword: name of the input, `None` where the model takes a tensor.
        vocabulary: of token ids, `None` where the input is numbers.
        dtype: of numbers.
        classes: that a label may name.
        labels: `"tokens"`, the input's own; `"per token"` or `"per sample"`, random.
    """

    size: int
    shape: tuple[int, ...]
    keyword: str | None
    vocabulary: int | None
    dtype: torch.dtype
    classes: int = 1
    labels: str = "per sample"

    def draw(self, generator: torch.Generator, device: torch.device | str = "cpu") -> StepBatch:
        """A batch; the second half of the samples is to be forgotten."""
        shape = (self.size, *self.shape)
        if self.vocabulary is None:
            tensor = torch.randn(shape, generator=generator).to(self.dtype)
        else:
            tensor = torch.randint(0, self.vocabulary, shape, generator=generator)
        labels = tensor
        if self.labels != "tokens":
            places = shape if self.labels == "per token" else shape[:1]
            labels = torch.randint(0, self.classes, places, generator=generator)
        forget = torch.arange(self.size) >= (self.size + 1) // 2
        tensor, labels, forget = (t.to(device) for t in (tensor, labels, forget))
        inputs: Tensor | Mapping[str, Any] = tensor if self.keyword is None else {self.keyword: tensor}
        return StepBatch(inputs, labels, forget)

    def __str__(self) -> str:
        unit = "tokens" if self.vocabulary is not None else "pixels" if len(self.shape) == 3 else "numbers"
        return f"{self.size} × {'×'.join(map(str, self.shape))} {unit}"


def batches_for(
    model: nn.Module, *, size: int | None = None, length: int | None = None, image_size: int | None = None
) -> Batches:
    """What batches a model takes.

    Args:
        model: unpatched, on any device; it is run only if it decides by the values of activations.
        size: samples; `None`: 4 texts or 32 of anything else.
        length: tokens of a text; `None`: 256, or what the model takes if that is less.
        image_size: height and width of an image; `None`: the configuration's, else 224.

    Raises:
        ValueError: a model whose input is not known, sizes that it does not take, or fewer than 2 samples.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
        >>> batches = batches_for(net, image_size=4, size=2)
        >>> batches.shape, batches.classes, batches.draw(torch.Generator()).forget
        ((3, 4, 4), 5, tensor([False,  True]))
    """
    blank = _inputs_of(model, size, length, image_size)
    if blank.size < 2:
        raise ValueError(f"size: got {blank.size}, expected 2 or more samples: one to keep and one to forget")
    try:
        logits = _answer(model, blank)
    except (AssertionError, RuntimeError) as error:  # torchvision asserts
        raise ValueError(f"model: does not take a batch of {blank} ({error}); give another size") from error
    labels = "per sample"
    if logits.ndim == 3:
        labels = "tokens" if predicts_next_token(model) else "per token"
    return Batches(blank.size, blank.shape, blank.keyword, blank.vocabulary, blank.dtype, int(logits.shape[-1]), labels)


@torch.no_grad()
def _answer(model: nn.Module, blank: Batches) -> Tensor:
    """Logits of a batch, on shapes alone where that is possible."""
    first = next(model.parameters(), torch.zeros(0))
    try:
        with shapes_only():
            return logits_of(call(fake_copy(model).eval(), blank.draw(torch.Generator()).inputs))
    except DependsOnValues:
        if first.is_meta:
            raise
        twin = sharing_copy(model).eval()
        return logits_of(call(twin, blank.draw(torch.Generator(), first.device).inputs))


def _inputs_of(model: nn.Module, size: int | None, length: int | None, image_size: int | None) -> Batches:
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", None)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    first = next((m for m in model.modules() if isinstance(m, nn.Embedding | nn.Conv2d | nn.Linear)), None)
    by_token = name == "input_ids" or (name is None and isinstance(first, nn.Embedding))
    if image_size is not None and by_token:
        raise ValueError(f"image_size: got {image_size} for {type(model).__name__}, which takes token ids")
    if length is not None and not by_token:
        raise ValueError(f"length: got {length} for {type(model).__name__}, which does not take token ids")
    if by_token:
        embedding: Any = model.get_input_embeddings() if name else first  # type: ignore[operator]
        most = _positions(model, _whole(getattr(config, "max_position_embeddings", None)))
        if length is not None and most is not None and length > most:
            raise ValueError(f"length: got {length}, expected at most {most}, what the model takes")
        tokens = length or min(DEFAULT_LENGTH, most or DEFAULT_LENGTH)
        return Batches(size or DEFAULT_TEXTS, (tokens,), name, int(embedding.weight.shape[0]), dtype)
    if name == "pixel_values" or isinstance(first, nn.Conv2d):
        side = image_size or _side(getattr(config, "image_size", None)) or DEFAULT_IMAGE
        channels = _whole(getattr(config, "num_channels", None))
        channels = channels or (first.in_channels if isinstance(first, nn.Conv2d) else 3)
        return Batches(size or DEFAULT_IMAGES, (channels, side, side), name, None, dtype)
    if isinstance(first, nn.Linear) and name is None:
        return Batches(size or DEFAULT_IMAGES, (first.in_features,), None, None, dtype)
    raise ValueError(f"model: got {type(model).__name__}, expected one that takes token ids, images or vectors")


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _side(value: object) -> int | None:
    """A configuration's image size, one number or a height and a width."""
    if not isinstance(value, list | tuple) or not value:
        return _whole(value)
    if any(each != value[0] for each in value):
        raise ValueError(f"image_size: got {value} in the configuration, expected a square; give another size")
    return _whole(value[0])


def _positions(model: nn.Module, most: int | None) -> int | None:
    """How many tokens `most` positions are: RoBERTa and its kind count from behind the padding index."""
    if most is None:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return max(most - module.padding_idx - 1, 1)
    return most
