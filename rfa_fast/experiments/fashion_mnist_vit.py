"""Fashion-MNIST and a small ViT: forget a class, or random samples, and compare with Retrain.

The same images and scenarios as :mod:`rfa_fast.experiments.fashion_mnist`, with a transformer in the
ResNet's place. The paper starts its ViT from ImageNet and trains 10 epochs with 250 warm-up steps at
5e-5; this one starts from nothing, for 32 × 32 pixels, so that its rate is higher. An epoch costs some
65 TFLOP, more than half an hour on one core: the recipe is shortened to three. The unlearning settings are those of
the ResNet, not chosen for it; `--validation --try lr=…` compares others.

    python -m rfa_fast.experiments.fashion_mnist_vit --output runs/fashion-mnist-vit
"""

from __future__ import annotations

from dataclasses import replace

from rfa_fast.experiments import fashion_mnist
from rfa_fast.experiments.common import Experiment
from rfa_fast.experiments.comparison import Request, compare
from rfa_fast.experiments.models import small_vit
from rfa_fast.report import RunReport

SCENARIOS = fashion_mnist.SCENARIOS

RECIPE = {"epochs": 3, "batch_size": 128, "lr": 1e-3, "warmup_steps": 250, "schedule": "cosine"}


def experiment(request: Request) -> Experiment:
    """Data, model and recipe.

    Raises:
        FileNotFoundError: the data is not there; the message holds the command that installs it.
    """
    base = fashion_mnist.experiment(request)
    seed, classes = request.seed, len(base.classes)
    return replace(
        base,
        name="fashion-mnist-vit",
        build=lambda: small_vit(seed, classes),
        architecture=f"torchvision VisionTransformer, patch 4, width 192, 6 blocks, {classes} classes, seed {seed}",
        recipe=request.recipe(RECIPE),
    )


def run(request: Request) -> RunReport:
    """Original, Retrain and RFA on each scenario; see :func:`rfa_fast.experiments.comparison.compare`.

    Raises:
        FileNotFoundError: the data is not there.
        ValueError: something in the request is not.
    """
    settings = fashion_mnist.SETTINGS
    return compare(experiment(request), settings, request, title="Fashion-MNIST, small ViT", scenarios=SCENARIOS)


if __name__ == "__main__":
    from rfa_fast.experiments.command import start

    start(run, "fashion-mnist-vit", SCENARIOS, "Forget classes and random samples of Fashion-MNIST with a small ViT.")
