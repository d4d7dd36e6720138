"""The demo: handwritten digits, forgotten twice, in under a minute on two cores.

It uses only what comes with scikit-learn, trains everything itself and keeps no model, so that its
times are times and its figures are this machine's. First a whole class is forgotten, then 64 samples
drawn at random. The settings were chosen on a tenth of the training images, held out, with another class (5) and other
samples: two seeds, six or seven rates with two sets of weights each, and for samples twelve pairs of rate and weights
by membership inference (SVM) besides, three seeds. The epochs, one to four, likewise: four leave nothing of the class's
gap to Retrain there, one changes the samples' membership inference least.
"""

from __future__ import annotations

import os
from typing import get_args

from rfa_fast.config import Mode
from rfa_fast.data import load_digits
from rfa_fast.experiments.cache import ModelCache, Say, labels_of
from rfa_fast.experiments.common import Experiment, Method, ScenarioRun
from rfa_fast.experiments.comparison import Settings, command_line, deliver, machine, scenario_split, title_of
from rfa_fast.experiments.models import digits_net
from rfa_fast.report import RunReport

RECIPE = {"epochs": 15, "batch_size": 64, "lr": 3e-3, "weight_decay": 0.01, "warmup_steps": 60, "schedule": "cosine"}
SETTINGS: Settings = {
    "class": {"lr": 2e-3, "weights": [1.0, 0.1, 1.0, 0.1]},
    "sample": {"lr": 5e-3, "weights": [1.0, 0.003, 1.0, 0.003]},
}
STEPS: Settings = {"class": {"epochs": 4, "batch_size": 64}, "sample": {"epochs": 1, "batch_size": 64}}


def experiment(seed: int = 0) -> Experiment:
    """The digits, the residual network, and its recipe.

    Example:
        >>> len(experiment().classes)
        10
    """
    data = load_digits()
    return Experiment(
        "digits",
        lambda: digits_net(seed),
        f"DigitsNet(10) seed {seed}",
        data.train,
        data.test,
        data.classes,
        {**RECIPE, "seed": seed},
    )


def run(
    *,
    forget_class: str = "3",
    samples: int = 64,
    mode: Mode = "residual",
    seed: int = 0,
    output: str | os.PathLike[str] | None = None,
    say: Say = print,
    progress: bool = True,
) -> RunReport:
    """Forget a digit, then some samples; compare with the model before and with one trained without them.

    Args:
        forget_class: the digit.
        samples: how many random training images to forget in the second scenario; 0 leaves it out.
        mode: of RFA.
        seed: of everything drawn.
        output: folder for `report.json`, `report.html` and `table.txt`, which replace those of an
            earlier demo; `None` writes nothing.
        say: is told what happens, a sentence each.
        progress: show bars on standard error.

    Returns:
        The report; printing it is the caller's.

    Raises:
        ValueError: no such digit, an unknown mode, or as many samples as there are; nothing has been
            trained then.
        OSError: `output` cannot be written.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(get_args(Mode))}")
    base = experiment(seed)
    wanted = [f"class:{forget_class}", *([f"sample:{samples}"] if samples else [])]
    splits = [scenario_split(base, text, seed) for text in wanted]
    models = ModelCache(None)
    found = []
    for split in splits:
        say(title_of(split))
        run = ScenarioRun(base, split, cache=models, say=say, progress=progress)
        method = Method("RFA", {"mode": mode, "seed": seed, **SETTINGS[split.scenario], **STEPS[split.scenario]})
        found.append(run.scenario(title_of(split), [method]))
    summary = (
        f"{len(labels_of(base.train)):,} images of handwritten digits, a residual network of three stages. "
        "Retrain never saw what is to be forgotten: the closer RFA comes to it, the better."
    )
    report = RunReport(
        "Handwritten digits", found, seed=seed, command=command_line(), summary=summary, machine=machine()
    )
    return deliver(report, output, say)
