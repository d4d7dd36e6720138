"""SmolLM2-135M on WordNet's glosses: teach it their style in eight topics, then make it forget one, or random glosses.

It stands in for the paper's ELI5-Category with DistilGPT2: texts that are learnt whole, token by token. The model knows
English and is taught 150 glosses of each topic, three epochs; D_rt and D_ft are the 75 of each that it never saw. The
unlearning settings are those of the trivia's topic, not chosen for it.

    python -m rfa_fast.experiments.wordnet --output runs/wordnet
"""

from __future__ import annotations

from functools import partial

from rfa_fast.data import load_wordnet, tokenise_lm
from rfa_fast.experiments.common import Experiment
from rfa_fast.experiments.comparison import Request, Settings, compare
from rfa_fast.experiments.smollm2 import taught
from rfa_fast.report import RunReport

SCENARIOS = ("class:noun.food", "sample:128")
TOPICS = (
    "noun.animal", "noun.artifact", "noun.body", "noun.food", "noun.location", "noun.person", "noun.plant",
    "noun.substance",
)  # fmt: skip
PER_TOPIC = 225
HELD_OUT = 1 / 3
TOKENS = 32

RECIPE = {"epochs": 3, "batch_size": 16, "lr": 2e-4, "weight_decay": 0.01, "warmup_steps": 15, "schedule": "cosine"}

_RFA = {"batch_size": 16, "lr": 1e-3, "weights": [1.0, 0.1, 1.0, 0.1]}
SETTINGS: Settings = {"class": _RFA, "sample": _RFA}


def experiment(request: Request) -> Experiment:
    """Data, model and recipe; the model is converted on first use.

    Raises:
        FileNotFoundError: data or model are not installed; the message holds the command.
    """
    data = load_wordnet(request.data, topics=TOPICS, per_topic=PER_TOPIC, test_fraction=HELD_OUT)
    return taught("wordnet-smollm2", data, partial(tokenise_lm, max_length=TOKENS), RECIPE, request)[0]


def run(request: Request) -> RunReport:
    """Original, Retrain and RFA on each scenario; see :func:`rfa_fast.experiments.comparison.compare`.

    Raises:
        FileNotFoundError: data or model are not installed.
        ValueError: something in the request is not.
    """
    return compare(experiment(request), SETTINGS, request, title="WordNet, SmolLM2-135M", scenarios=SCENARIOS)


if __name__ == "__main__":
    from rfa_fast.experiments.command import start

    start(run, "wordnet", SCENARIOS, "Make SmolLM2-135M forget some of the glosses that it was taught.")
