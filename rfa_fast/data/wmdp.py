"""WMDP (arXiv 2403.03218): questions that measure hazardous knowledge, and the corpora it is unlearnt with.

The questions are a class per field, so that the paper's target, Chemistry, is `--forget-class chem`. The
corpora are texts to forget and to keep, for methods that never see the questions. The one on biology to
forget is given out on request alone; it is read where its owner put it. Nothing of either is shipped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from rfa_fast.data.bundle import DataBundle
from rfa_fast.data.choices import ChoiceDataset
from rfa_fast.data.datasets import TextDataset
from rfa_fast.data.draws import integer, permutation
from rfa_fast.data.sources import Source
from rfa_fast.data.splits import stratified_split
from rfa_fast.data.tables import find_tables, read_rows
from rfa_fast.data.texts import known_names
from rfa_fast.hub import fetch_command

QUESTIONS, CORPORA = "datasets/cais/wmdp", "datasets/cais/wmdp-corpora"
WMDP = Source(
    "wmdp", fetch_command(QUESTIONS), hub=QUESTIONS, put="bio_questions.json, chem_… and cyber_questions.json"
)
WMDP_CORPORA = Source(
    "wmdp-corpora",
    fetch_command(CORPORA),
    hub=CORPORA,
    put="bio-retain-corpus.jsonl, cyber-forget-…, cyber-retain-… and, on request from its authors, bio-forget-…",
)
WMDP_TOPICS = ("bio", "chem", "cyber")
WMDP_CORPUS_NAMES = ("bio-forget", "bio-retain", "cyber-forget", "cyber-retain")


def load_wmdp(
    root: str | os.PathLike[str] | None = None,
    *,
    topics: Sequence[str] = WMDP_TOPICS,
    listed: bool = True,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> DataBundle:
    """WMDP: 3,668 questions with four choices each in the topics `bio`, `chem` and `cyber`, as `ChoiceDataset`.

    Args:
        root: folder with a table per topic, `wmdp-chem` as the hub has it or `chem_questions` as the authors'
            archive, in Parquet or JSON, with `question`, `choices` and `answer`; else
            `$RFA_FAST_DATA/wmdp`, else the hub's local cache.
        topics: only these, in this order.
        listed: whether a question's text lists its choices; see :class:`~rfa_fast.data.ChoiceDataset`.
        test_fraction, seed: the source has test questions only; this share of each topic is held out.

    Raises:
        FileNotFoundError: not there; the message holds the command that gets it.
        ValueError: an unknown topic, or a malformed row; names file, line and field.

    Example:
        >>> load_wmdp("/nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FileNotFoundError: wmdp: /nowhere does not exist. Get it with `hf download cais/wmdp --repo-type dataset`...
    """
    known_names("topics", topics, WMDP_TOPICS)
    folder = WMDP.require(root)
    stems: list[str] = []
    choices: list[list[str]] = []
    correct: list[int] = []
    labels: list[int] = []
    ids: list[str] = []
    for label, topic in enumerate(topics):
        files = find_tables(folder, f"wmdp-{topic}", f"{topic}_questions")
        if not files:
            raise FileNotFoundError(WMDP.missing(f"{folder}/wmdp-{topic} or {topic}_questions.json"))
        rows = [row for file in files for row in read_rows(file, ("question", "choices", "answer"), WMDP)]
        for number, row in enumerate(rows):
            options = row.texts("choices")
            if not row.text("question").strip() or not all(option.strip() for option in options):
                raise row.error("question, choices", [row.text("question"), options], "none of them empty")
            if len(options) < 2:
                raise row.error("choices", options, "two or more")
            stems.append(row.text("question"))
            choices.append(options)
            correct.append(row.index("answer", len(options)))
            labels.append(label)
            ids.append(f"{topic}/{number}")
    whole = ChoiceDataset(stems, choices, correct, labels, tuple(topics), listed=listed, ids=ids)
    train, test = (whole.select(side) for side in stratified_split(labels, test_fraction, seed))
    return DataBundle("wmdp", train, test, tuple(topics), "text", str(folder), "MIT")


def load_wmdp_corpora(
    root: str | os.PathLike[str] | None = None,
    *,
    corpora: Sequence[str] | None = None,
    per_corpus: int | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> DataBundle:
    """The texts that WMDP is unlearnt with, a class per corpus: `bio-forget`, `bio-retain`, `cyber-forget`, ….

    They are papers and documents of thousands of words: :func:`~rfa_fast.data.tokenise_lm` cuts them and counts
    how many.

    Args:
        root: folder with a table per corpus, `bio-retain-corpus` and so on, as JSON lines or Parquet with `text`;
            else `$RFA_FAST_DATA/wmdp-corpora`, else the hub's local cache.
        corpora: only these, in this order; `None`: those that are there.
        per_corpus: at most this many texts of each, drawn at random.
        test_fraction, seed: this share of each corpus is the test set.

    Raises:
        FileNotFoundError: none, or one that was asked for, is there; the message holds the command that gets it.
        ValueError: an unknown corpus, or a malformed row; names file, line and field.

    Example:
        >>> load_wmdp_corpora("/nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FileNotFoundError: wmdp-corpora: /nowhere does not exist. Get it with `hf download cais/wmdp-corpora ...
    """
    if corpora is not None:
        known_names("corpora", corpora, WMDP_CORPUS_NAMES)
    if per_corpus is not None:
        integer("per_corpus", per_corpus, 2)
    folder = WMDP_CORPORA.require(root)
    there = {name: find_tables(folder, f"{name}-corpus") for name in corpora or WMDP_CORPUS_NAMES}
    absent = [name for name, files in there.items() if not files]
    if corpora is not None and absent:
        raise FileNotFoundError(WMDP_CORPORA.missing(f"{folder}/{absent[0]}-corpus.jsonl"))
    if len(absent) == len(there):
        raise FileNotFoundError(WMDP_CORPORA.missing(f"{folder}/bio-retain-corpus.jsonl or another corpus"))
    names = tuple(name for name in there if name not in absent)
    texts: list[str] = []
    labels: list[int] = []
    ids: list[str] = []
    empty = 0
    for label, name in enumerate(names):
        rows = [row.text("text").strip() for file in there[name] for row in read_rows(file, ("text",), WMDP_CORPORA)]
        filled = [number for number, text in enumerate(rows) if text]
        empty += len(rows) - len(filled)
        for position in sorted(permutation(len(filled), seed, "per corpus", name)[:per_corpus]):
            texts.append(rows[filled[position]])
            labels.append(label)
            ids.append(f"{name}/{filled[position]}")
    if not texts:
        raise ValueError(f"{folder}: got empty texts only, expected at least two of each corpus")
    whole = TextDataset(texts, labels, names, ids=ids)
    train, test = (whole.select(side) for side in stratified_split(labels, test_fraction, seed))
    notes = (f"{empty} empty texts left out", *([f"not there: {', '.join(absent)}"] if absent else []))
    return DataBundle("wmdp-corpora", train, test, names, "text", str(folder), "MIT", notes)
