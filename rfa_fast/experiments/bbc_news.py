"""MiniLM on BBC News: forget a topic, or every article with a word, and compare with a model fine-tuned without.

A pretrained BERT of six layers with a new head stands in for the paper's DistilBERT, and five topics
of news for its text classification. The first 64 tokens of an article are used: headline and lead
mostly tell the topic, at a fraction of the time that the whole takes. Of two sets of settings for a topic the nearer to
Retrain on held-out articles was taken (the topic business, seed 0, 600 articles), of three for samples by accuracy and
membership inference; `--validation --scenario class:business --try lr=…` compares others.

The keyword stands for the paper's "comedy" on IMDB. "election" is one of the 272 candidates that
:func:`rfa_fast.data.keyword_candidates` lists for these articles, taken because its share is the same in both
sets, 9.7 % (164 of 1,691 training and 41 of 422 test articles), 145 of the 164 on politics. The whole article
counts; in half of them the word stands in the first 60 words, so that the model never reads it in the others.

    python -m rfa_fast.experiments.bbc_news --output runs/bbc-news
"""

from __future__ import annotations

from rfa_fast.data import load_bbc_news, tokenise_texts
from rfa_fast.experiments.common import Experiment
from rfa_fast.experiments.comparison import Request, Settings, compare
from rfa_fast.experiments.models import minilm, minilm_tokenizer
from rfa_fast.report import RunReport

KEYWORD = "election"
SCENARIOS = ("class:sports", f"keyword:{KEYWORD}")
TOKENS = 64

RECIPE = {"epochs": 2, "batch_size": 32, "lr": 2e-4, "weight_decay": 0.01, "warmup_steps": 15, "schedule": "cosine"}

SETTINGS: Settings = {
    "class": {"lr": 1e-3, "weights": [1.0, 0.1, 1.0, 0.1]},
    "sample": {"lr": 5e-4},
}


def experiment(request: Request) -> Experiment:
    """Data, model and recipe.

    Raises:
        FileNotFoundError: data or model are not installed; the message holds the command.
    """
    data = load_bbc_news(request.data)
    tokenizer = minilm_tokenizer()
    seed, classes = request.seed, len(data.classes)
    return Experiment(
        "bbc-news",
        lambda: minilm(classes=classes, seed=seed),
        f"MiniLM-L6, {classes} classes, head seed {seed}",
        tokenise_texts(data.train, tokenizer, TOKENS),
        tokenise_texts(data.test, tokenizer, TOKENS),
        data.classes,
        request.recipe(RECIPE),
        evaluation_batch=64,
    )


def run(request: Request) -> RunReport:
    """Original, Retrain and RFA on each scenario; see :func:`rfa_fast.experiments.comparison.compare`.

    Raises:
        FileNotFoundError: data or model are not installed.
        ValueError: something in the request is not.
    """
    return compare(experiment(request), SETTINGS, request, title="BBC News, MiniLM", scenarios=SCENARIOS)


if __name__ == "__main__":
    from rfa_fast.experiments.command import start

    start(run, "bbc-news", SCENARIOS, "Forget a topic or a keyword of BBC News with MiniLM.")
