"""The paper's own data and models (sections V-A2, V-A3, V-A6), built by name as soon as they are on this machine.

None of them is here: data and pretrained weights are fetched by whoever wants to repeat the paper's
figures, by the command that the error names. Images are shown at 224 × 224 pixels, the size ImageNet's
weights were made for; texts of ELI5 and WMDP are learnt whole, token by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from rfa_fast.data import DataBundle, load, resized, tokenise_lm, tokenise_texts
from rfa_fast.experiments import models
from rfa_fast.experiments.common import Experiment
from rfa_fast.experiments.comparison import Request

PIXELS = 224
REVIEW_TOKENS, ANSWER_TOKENS, QUESTION_TOKENS = 256, 128, 128

PAPER_RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "resnet18": {"epochs": 20, "batch_size": 128, "lr": 5e-5, "warmup_steps": 500},
        "vit": {"epochs": 10, "batch_size": 128, "lr": 5e-5, "warmup_steps": 250},
        # V-A6 names batch size and rate of the text models; the ten epochs are those of V-B2's retrained DistilGPT2.
        "text": {"epochs": 10, "batch_size": 32, "lr": 5e-5, "warmup_steps": 0},
        "language": {"epochs": 10, "batch_size": 32, "lr": 5e-5, "warmup_steps": 0},
    }
)
"""Section V-A6, from pretrained weights."""


def cifar_resnet18(request: Request) -> Experiment:
    """CIFAR-10 and ResNet18 from ImageNet.

    Raises:
        FileNotFoundError: data or weights are not there; the message holds the command that fetches them.
    """
    return _pretrained_vision("cifar-10", "resnet18", PAPER_RECIPES["resnet18"], request)


def cifar_vit(request: Request) -> Experiment:
    """CIFAR-10 and ViT-B/16 from ImageNet; errors as :func:`cifar_resnet18`."""
    return _pretrained_vision("cifar-10", "vit_b_16", PAPER_RECIPES["vit"], request)


def fashion_resnet18(request: Request) -> Experiment:
    """Fashion-MNIST and ResNet18 from ImageNet; errors as :func:`cifar_resnet18`."""
    return _pretrained_vision("fashion-mnist", "resnet18", PAPER_RECIPES["resnet18"], request)


def fashion_vit(request: Request) -> Experiment:
    """Fashion-MNIST and ViT-B/16 from ImageNet; errors as :func:`cifar_resnet18`."""
    return _pretrained_vision("fashion-mnist", "vit_b_16", PAPER_RECIPES["vit"], request)


def imdb_distilbert(request: Request) -> Experiment:
    """IMDB and DistilBERT with a new head; errors as :func:`cifar_resnet18`."""
    data = _loaded("imdb", request)
    tokenizer = models.tokenizer_of(models.DISTILBERT)
    seed, classes = request.seed, len(data.classes)
    return Experiment(
        "imdb-distilbert",
        lambda: models.distilbert(seed=seed, classes=classes),
        f"DistilBERT, {classes} classes, head seed {seed}",
        tokenise_texts(data.train, tokenizer, REVIEW_TOKENS),
        tokenise_texts(data.test, tokenizer, REVIEW_TOKENS),
        data.classes,
        request.recipe(PAPER_RECIPES["text"]),
        evaluation_batch=64,
    )


def eli5_distilgpt2(request: Request) -> Experiment:
    """ELI5-Category and DistilGPT2; errors as :func:`cifar_resnet18`."""
    return _language("eli5-category", models.DISTILGPT2, ANSWER_TOKENS, request)


def wmdp_qwen(request: Request) -> Experiment:
    """WMDP and Qwen2.5-3B; errors as :func:`cifar_resnet18`."""
    return _language("wmdp", models.QWEN, QUESTION_TOKENS, request)


def _pretrained_vision(data_name: str, model_name: str, recipe: Mapping[str, Any], request: Request) -> Experiment:
    models.published_weights(model_name)  # its absence is said before the data has been read
    shape = {} if data_name == "cifar-10" else {"channels": 3}
    data = resized(_loaded(data_name, request, **shape), PIXELS)
    seed, classes = request.seed, len(data.classes)

    def build() -> nn.Module:
        return models.pretrained_vision(model_name, seed, classes)

    return Experiment(
        f"{data_name}-{model_name}",
        build,
        f"torchvision {model_name} from ImageNet, {classes} classes, 3×{PIXELS}×{PIXELS}, head seed {seed}",
        data.train,
        data.test,
        data.classes,
        request.recipe(recipe),
        evaluation_batch=100,
    )


def _language(data_name: str, source: Any, tokens: int, request: Request) -> Experiment:
    data = _loaded(data_name, request)
    tokenizer = models.tokenizer_of(source)
    return Experiment(
        f"{data_name}-{source.name.lower()}",
        lambda: models.language_model(source),
        source.name,
        tokenise_lm(data.train, tokenizer, tokens),
        tokenise_lm(data.test, tokenizer, tokens),
        data.classes,
        request.recipe(PAPER_RECIPES["language"]),
        kind="language",
        evaluation_batch=16,
    )


def _loaded(name: str, request: Request, **options: Any) -> DataBundle:
    folder = {} if request.data is None else {"root": request.data}
    return load(name, **folder, **options)
