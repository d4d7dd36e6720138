"""SmolLM2-135M on trivia: teach it three topics, then make it forget one, or random questions of all.

A small real language model that is first taught answers it does not know, so that there is something to
forget and a yardstick for having forgotten it: questions of the same topics that were never taught
(D_rt, D_ft). Accuracy is of whole answers, perplexity of the answers' tokens. The pretrained weights are
de-quantised from four bits once and kept in the cache. The unlearning settings were chosen on held-out questions
and another topic (docs/results.md): a higher rate forgets the topic as well, but makes its answers far less likely
than they are for a model that was never taught them.

To forget 128 questions takes more than the 144 that a topic's run teaches: with `--scenario sample:128` all 727
questions of the three topics are in, a quarter of them held out, and four times as long is taught. Its unlearning
settings are the topic's, not chosen for it.

    python -m rfa_fast.experiments.smollm2 --output runs/smollm2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from rfa_fast.data import DataBundle, TokenDataset, load_trivia, tokenise_qa
from rfa_fast.experiments.cache import cache_folder
from rfa_fast.experiments.common import Experiment
from rfa_fast.experiments.comparison import Request, Settings, compare
from rfa_fast.experiments.models import smollm2, smollm2_model, smollm2_tokenizer
from rfa_fast.metrics import generate_text
from rfa_fast.report import RunReport

SCENARIOS = ("class:starwars",)
TOPICS = ("greekmyth", "harrypotter", "starwars")
PER_TOPIC = 72
HELD_OUT = 1 / 3
HELD_OUT_OF_ALL = 1 / 4
TOKENS = 40
WRITTEN = 12  # tokens, more than any answer that is taught needs

RECIPE = {"epochs": 6, "batch_size": 16, "lr": 2e-4, "weight_decay": 0.01, "warmup_steps": 5, "schedule": "cosine"}

UNLEARNING: dict[str, Any] = {"epochs": 6, "batch_size": 16}
_RFA = {**UNLEARNING, "lr": 5e-4, "weights": [1.0, 0.1, 1.0, 0.1]}
# Residual mode of three over three seeds, teacher mode of three over one.
_RESIDUAL = {"lr": 1e-3, "weights": [1.0, 0.03, 1.0, 0.03]}
SETTINGS: Settings = {"class": _RFA, "class residual": _RESIDUAL, "sample": _RFA, "sample residual": _RESIDUAL}


def experiment(request: Request) -> Experiment:
    """Data, model and recipe; the model is converted on first use.

    Raises:
        ValueError: random samples and topics are asked for together, which need different data.
        FileNotFoundError: data or model are not installed; the message holds the command.
    """
    kinds = {scenario.partition(":")[0] == "sample" for scenario in request.scenarios or SCENARIOS}
    if len(kinds) > 1:
        raise ValueError(
            f"scenarios: got {', '.join(request.scenarios or ())}, expected sample:… alone: it takes all questions"
        )
    per_topic, held_out = (None, HELD_OUT_OF_ALL) if True in kinds else (PER_TOPIC, HELD_OUT)
    data = load_trivia(request.data, topics=TOPICS, per_topic=per_topic, test_fraction=held_out)
    made, tokenizer = taught("smollm2", data, partial(tokenise_qa, max_length=TOKENS, truncate=True), RECIPE, request)
    prompts = first_prompts(made.train)  # type: ignore[arg-type]

    def write(model: nn.Module) -> Mapping[str, str]:
        return {prompt: generate_text(model, tokenizer, prompt, WRITTEN) for prompt in prompts}

    return replace(made, write=write)


def taught(
    name: str, data: DataBundle, tokenise: Callable[[Any, Any], TokenDataset], recipe: Mapping[str, Any],
    request: Request,
) -> tuple[Experiment, Any]:  # fmt: skip
    """SmolLM2-135M on the texts of a bundle, and its tokenizer; the model is converted on first use.

    Args:
        name: of the experiment.
        data: what it is taught.
        tokenise: a part of the data and the tokenizer -> its tokens.
        recipe: of Original and Retrain.
        request: which epochs and which cache.

    Raises:
        FileNotFoundError: the model is not installed; the message holds the command.
    """
    converted = smollm2(cache_folder(request.cache))
    tokenizer = smollm2_tokenizer(converted)
    train, test = (tokenise(part, tokenizer) for part in (data.train, data.test))
    made = Experiment(
        name,
        lambda: smollm2_model(converted),
        "SmolLM2-135M-Instruct, de-quantised from Q4_1",
        train,
        test,
        data.classes,
        request.recipe(recipe),
        kind="language",
        evaluation_batch=32,
    )
    return made, tokenizer


def first_prompts(dataset: TokenDataset) -> list[str]:
    """The prompt of the first question of each topic.

    Raises:
        ValueError: a dataset without prompts.

    Example:
        >>> import torch
        >>> ids = torch.ones(3, 2, dtype=torch.int64)
        >>> data = TokenDataset(ids, ids, [0, 0, 1], ("a", "b"), texts=["x", "y", "z"], prompts=["x?", "y?", "z?"])
        >>> first_prompts(data)
        ['x?', 'z?']
    """
    if dataset.prompts is None:
        raise ValueError("dataset: got one without prompts, expected one of tokenise_qa")
    found: dict[int, Any] = {}
    for label, prompt in zip(dataset.labels, dataset.prompts, strict=True):
        found.setdefault(label, prompt)
    return list(found.values())


def run(request: Request) -> RunReport:
    """Original, Retrain and RFA on each scenario; see :func:`rfa_fast.experiments.comparison.compare`.

    Raises:
        FileNotFoundError: data or model are not installed.
        ValueError: something in the request is not.
    """
    return compare(experiment(request), SETTINGS, request, title="Trivia, SmolLM2-135M", scenarios=SCENARIOS)


if __name__ == "__main__":
    from rfa_fast.experiments.command import start

    start(run, "smollm2", SCENARIOS, "Make SmolLM2-135M forget some of the trivia that it was taught.")
