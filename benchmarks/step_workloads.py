"""What the step is timed on: a model of a real geometry with random weights, and fresh batches for it.

A workload is plain values, so that a child process can be told it in one line of JSON. Nothing is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rfa_fast.experiments.models import resnet18, seeded
from rfa_fast.experiments.rivals import Setting, StepBatch
from rfa_fast.experiments.sharing import quiet

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
IMAGES = ("resnet18", "vit")


@dataclass(frozen=True)
class Workload:
    """A model and the batches it gets.

    Attributes:
        model: `"qwen"`, `"resnet18"`, `"vit"`, `"distilbert"` or `"distilgpt2"`.
        dtype: of weights and activations: `"bf16"`, `"fp32"`, `"fp64"`; adapters are fp32.
        samples: B.
        forget: how many of them are to be forgotten; they are spread over the batch.
        length: tokens per sample; the side of an image in pixels.
        targets, rank: as :func:`rfa_fast.patch` takes them.
        geometry: what the model's configuration has to be told.
        checkpointing: recompute activations in the backward (transformers' switch).
    """

    model: str
    dtype: str
    samples: int
    forget: int
    length: int
    targets: str | list[str] = "deep"
    rank: int = 8
    geometry: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False

    @property
    def setting(self) -> Setting:
        return Setting(self.targets, rank=self.rank)

    @property
    def tokens(self) -> int:
        """Rows of a transformer's linear layers; of a ResNet the samples."""
        if self.model == "vit":
            return self.samples * ((self.length // 16) ** 2 + 1)
        return self.samples if self.model == "resnet18" else self.samples * self.length

    def build(self) -> nn.Module:
        """The model in its dtype, in eval mode; the weights depend on nothing but the workload."""
        model = seeded(0, lambda: _BUILDERS[self.model](self)).eval()
        if self.checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
            quiet(model)
        return model

    def batch(self, index: int) -> StepBatch:
        """The batch of step `index`; no two are equal."""
        generator = torch.Generator().manual_seed(1000 + index)
        forget = torch.zeros(self.samples, dtype=torch.bool)
        forget[torch.arange(self.forget) * self.samples // max(self.forget, 1)] = True
        if self.model in IMAGES:
            shape = (self.samples, 3, self.length, self.length)
            pixels = torch.randn(shape, generator=generator).to(DTYPES[self.dtype])
            labels = torch.randint(10, (self.samples,), generator=generator)
            return StepBatch({"pixel_values": pixels} if self.model == "vit" else pixels, labels, forget)
        ids = torch.randint(self.vocabulary, (self.samples, self.length), generator=generator)
        labels: Tensor = ids if self.model != "distilbert" else torch.randint(2, (self.samples,), generator=generator)
        return StepBatch({"input_ids": ids}, labels, forget)

    @property
    def vocabulary(self) -> int:
        return int(self.geometry["vocab_size"])

    def reduced(self) -> Workload:
        """The same layers on a few rows, with a small vocabulary: for comparing losses, not for timing."""
        geometry = dict(self.geometry)
        if "vocab_size" in geometry:
            geometry["vocab_size"] = min(geometry["vocab_size"], 1024)
        length = self.length if self.model == "vit" else min(self.length, 32)
        return replace(self, samples=min(self.samples, 4), forget=2, length=length, geometry=geometry)

    def words(self) -> str:
        """The shapes in a line."""
        size = f"{self.length}² pixels" if self.model in IMAGES else f"{self.length} tokens"
        text = f"{self.model}, {self.dtype}, {self.samples} × {size}, {self.forget} to forget, rank {self.rank}"
        targets = self.targets if isinstance(self.targets, str) else f"{len(self.targets)} named layers"
        return f"{text}, targets {targets}" + (", checkpointing" if self.checkpointing else "")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _transformers(kind: str, config: Any, dtype: torch.dtype) -> nn.Module:
    import transformers

    model: nn.Module = getattr(transformers, kind)._from_config(config, dtype=dtype)
    return model


def _qwen(w: Workload) -> nn.Module:
    from transformers import Qwen2Config

    return _transformers("Qwen2ForCausalLM", Qwen2Config(tie_word_embeddings=True, **w.geometry), DTYPES[w.dtype])


def _vit(w: Workload) -> nn.Module:
    from transformers import ViTConfig

    config = ViTConfig(num_labels=10, image_size=w.length, **w.geometry)
    return _transformers("ViTForImageClassification", config, DTYPES[w.dtype])


def _distilbert(w: Workload) -> nn.Module:
    from transformers import DistilBertConfig

    return _transformers("DistilBertForSequenceClassification", DistilBertConfig(**w.geometry), DTYPES[w.dtype])


def _distilgpt2(w: Workload) -> nn.Module:
    from transformers import GPT2Config

    last = w.vocabulary - 1
    config = GPT2Config(bos_token_id=last, eos_token_id=last, **w.geometry)
    return _transformers("GPT2LMHeadModel", config, DTYPES[w.dtype])


_BUILDERS: dict[str, Callable[[Workload], nn.Module]] = {
    "qwen": _qwen,
    "resnet18": lambda w: resnet18(0).to(DTYPES[w.dtype]),
    "vit": _vit,
    "distilbert": _distilbert,
    "distilgpt2": _distilgpt2,
}


def table_twelve(dtype: str) -> dict[str, Workload]:
    """The paper's four models at its batch sizes (section V-A6: 128 images, 32 texts), one sample in eight forgotten.

    The paper does not give the sides of its images: ResNet18 takes CIFAR-10's 32, ViT-B/16 the 224 that its position
    embeddings are trained for. Texts are 256 tokens.
    """
    distil = {"vocab_size": 30522, "dim": 768, "hidden_dim": 3072, "n_layers": 6, "n_heads": 12}
    gpt = {"vocab_size": 50257, "n_embd": 768, "n_layer": 6, "n_head": 12, "n_positions": 1024}
    return {
        "ResNet18": Workload("resnet18", dtype, 128, 16, 32),
        "ViT-B/16": Workload("vit", dtype, 128, 16, 224),
        "DistilBERT": Workload("distilbert", dtype, 32, 4, 256, geometry=distil),
        "DistilGPT2": Workload("distilgpt2", dtype, 32, 4, 256, geometry=gpt),
    }


def full_3b(dtype: str) -> Workload:
    """Qwen2.5-3B: 36 layers, 4 × 512 tokens, the upper half adapted, checkpointing on."""
    from step_slice import QWEN_3B

    geometry = QWEN_3B | {"num_hidden_layers": 36}
    return Workload("qwen", dtype, 4, 2, 512, geometry=geometry, checkpointing=True)


def narrow(dtype: str, *, tokens: int = 1024, rank: int = 8, adapted: int = 18, layers: int = 36) -> Workload:
    """For the growth of the cost: Qwen's shape, 256 wide, the feed-forward layers of the last `adapted` blocks."""
    geometry = {
        "hidden_size": 256, "intermediate_size": 1376, "num_attention_heads": 4, "num_key_value_heads": 1,
        "vocab_size": 8192, "num_hidden_layers": layers, "max_position_embeddings": 32768,
    }  # fmt: skip
    samples = max(2, tokens // 128)
    names = [f"layers.{i}.mlp.{part}_proj" for i in range(layers - adapted, layers) for part in ("gate", "up", "down")]
    return Workload("qwen", dtype, samples, samples // 2, math.ceil(tokens / samples), names, rank, geometry)
