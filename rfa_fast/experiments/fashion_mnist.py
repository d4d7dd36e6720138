"""Fashion-MNIST and torchvision's ResNet18: forget a class, or random samples, and compare with Retrain.

All 60,000 training images, padded to 32 × 32 and shown as three channels, so that the network is
torchvision's own without a change. The paper trains 20 epochs at a rate of 5e-5; five epochs at that
rate leave a network from scratch half trained, so this recipe is shorter and faster. The settings of
class unlearning were chosen on class 3, which is not among the scenarios, with a tenth of the training
images in the test set's place, from six candidates (five of them in teacher mode) after 60 steps each.
Those of sample unlearning are the nearest to Retrain on held-out images as well, by accuracy and membership inference:
rate and weights of ten candidates with 12,000 training images, schedule and how often each sample comes of four with
30,000 (docs/results.md); `--validation --try lr=…` compares others.

    python -m rfa_fast.experiments.fashion_mnist --output runs/fashion-mnist
"""

from __future__ import annotations

from rfa_fast.data import load_fashion_mnist
from rfa_fast.experiments.common import Experiment
from rfa_fast.experiments.comparison import Request, Settings, compare
from rfa_fast.experiments.models import resnet18
from rfa_fast.report import RunReport

SCENARIOS = ("class:0", "class:6", "sample:128")
"""The classes were fixed before anything was measured: T-shirt/top, and Shirt, which is most often taken for others."""

RECIPE = {"epochs": 5, "batch_size": 128, "lr": 1e-3, "warmup_steps": 400, "schedule": "cosine"}

# Each group's loss is a mean over its own samples, and forgetting a class is the easy part: a tenth of
# the weight on the forget terms is enough for it, and keeps half a point more of the rest. Of 128 samples a batch
# has one or two, as heavy as all retained ones together: at full weight they cost points everywhere, and at a
# tenth the model is less sure of them than of images it has never seen. Each comes once, so that the push does not
# grow with the images beside them; and the rate falls, for a constant one leaves D_t half a point lower.
SETTINGS: Settings = {
    "class": {"lr": 1e-3, "weights": [1.0, 0.1, 1.0, 0.1]},
    "sample": {"lr": 1e-3, "weights": [1.0, 0.03, 1.0, 0.03], "schedule": "cosine", "forget_per_batch": "natural"},
}


def experiment(request: Request) -> Experiment:
    """Data, model and recipe.

    Raises:
        FileNotFoundError: the data is not there; the message holds the command that installs it.
    """
    data = load_fashion_mnist(request.data, pad_to=32, channels=3)
    seed, classes = request.seed, len(data.classes)
    return Experiment(
        "fashion-mnist",
        lambda: resnet18(seed, classes),
        f"torchvision resnet18, {classes} classes, 3×32×32, seed {seed}",
        data.train,
        data.test,
        data.classes,
        request.recipe(RECIPE),
    )


def run(request: Request) -> RunReport:
    """Original, Retrain and RFA on each scenario; see :func:`rfa_fast.experiments.comparison.compare`.

    Raises:
        FileNotFoundError: the data is not there.
        ValueError: something in the request is not.
    """
    return compare(experiment(request), SETTINGS, request, title="Fashion-MNIST, ResNet18", scenarios=SCENARIOS)


if __name__ == "__main__":
    from rfa_fast.experiments.command import start

    start(run, "fashion-mnist", SCENARIOS, "Forget classes and random samples of Fashion-MNIST with ResNet18.")
