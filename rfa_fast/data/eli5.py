"""ELI5-Category: questions to r/explainlikeimfive with their answers, by category.

The files that its authors publish divide the data by category: Culture is in the first validation file
alone, Engineering in the test file alone. Neither can be learnt and forgotten that way, so all files
are read together, a balanced number of questions is taken of each category, and the same share of
each is held out, as the paper does it (section V-A2: 10,000 samples of 10 categories).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rfa_fast.data.bundle import DataBundle
from rfa_fast.data.datasets import QADataset
from rfa_fast.data.draws import integer, permutation
from rfa_fast.data.sources import DATA_VARIABLE, Source
from rfa_fast.data.splits import stratified_split
from rfa_fast.data.tables import Row, find_tables, read_rows
from rfa_fast.data.texts import known_names

ADDRESS = "https://jingshensn2.github.io/eli5c/datasets"
PARTS = ("train", "validation-1", "validation-2", "test")
ELI5_CATEGORY = Source(
    "eli5-category",
    f'curl -L --create-dirs --output-dir "${DATA_VARIABLE}/eli5-category" --remote-name-all '
    f"{ADDRESS}/eli5-category-{{train,validation-1,validation-2,test}}.json.gz",
    put="the files eli5-category-….json.gz",
)
# Its twelve without "Other" and "Repost", which are no topics: the paper's ten.
ELI5_TOPICS = (
    "Biology", "Chemistry", "Culture", "Earth Science", "Economics", "Engineering", "Mathematics", "Physics",
    "Psychology", "Technology",
)  # fmt: skip
REMOVED = ("[removed]", "[deleted]")
FIELDS = ("q_id", "title", "selftext", "category", "answers")


def load_eli5_category(
    root: str | os.PathLike[str] | None = None,
    *,
    topics: Sequence[str] = ELI5_TOPICS,
    samples: int | None = 10_000,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> DataBundle:
    """ELI5-Category: questions with their answers in 10 categories, as :class:`QADataset`, the best answer first.

    A question is its title and, after an empty line, its text where it has one. `texts` is question and
    best answer, what :func:`~rfa_fast.data.tokenise_lm` makes a language model learn.

    Args:
        root: folder with `eli5-category-train.json.gz` and the three others, unpacked or not, or as JSON
            lines; else `$RFA_FAST_DATA/eli5-category`.
        topics: categories to take, in this order.
        samples: at most this many questions, as evenly over the categories as their sizes allow; `None`: all.
        test_fraction, seed: this share of each category is the test set.

    Raises:
        FileNotFoundError: not there; the message holds the command that fetches it.
        ValueError: a category without a question (the message lists those that there are), or a malformed
            row; names file, line and field.

    Example:
        >>> load_eli5_category("/nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FileNotFoundError: eli5-category: /nowhere does not exist. Get it with `curl -L --create-dirs ...
    """
    folder = ELI5_CATEGORY.require(root)
    if samples is not None:
        integer("samples", samples, 2 * len(topics))
    files = [file for part in PARTS for file in find_tables(folder, f"eli5-category-{part}")]
    if not files:
        raise FileNotFoundError(ELI5_CATEGORY.missing(f"{folder}/eli5-category-train.json.gz"))
    found: dict[str, list[tuple[str, str, list[str]]]] = {}
    seen: set[str] = set()
    repeated = unanswered = 0
    for row in _rows(files):
        name, answers = row.text("q_id"), _answers(row)
        if name in seen:
            repeated += 1
        elif not answers:
            unanswered += 1
        else:
            seen.add(name)
            found.setdefault(row.text("category"), []).append((name, _question(row), answers))
    try:
        known_names("topics", topics, sorted(found))
    except ValueError as error:
        raise ValueError(f"{error}; read {', '.join(file.name for file in files)} in {folder}") from error
    sizes = [len(found[topic]) for topic in topics]
    shares = sizes if samples is None else even_shares(sizes, samples)
    chosen = [
        (label, *found[topic][position])
        for label, (topic, share) in enumerate(zip(topics, shares, strict=True))
        for position in sorted(permutation(len(found[topic]), seed, "per topic", topic)[:share])
    ]
    labels, ids, questions, accepted = zip(*chosen, strict=True)
    whole = QADataset(questions, accepted, labels, tuple(topics), ids=ids)
    train, test = (whole.select(side) for side in stratified_split(whole.labels, test_fraction, seed))
    notes = (
        f"{len(whole)} of {sum(map(len, found.values()))} questions taken, by category "
        + ", ".join(f"{topic} {share}" for topic, share in zip(topics, shares, strict=True)),
        f"{unanswered} questions without an answer and {repeated} that were read before left out",
    )
    licence = "not stated by its authors"
    return DataBundle("eli5-category", train, test, tuple(topics), "text", str(folder), licence, notes)


def even_shares(sizes: Sequence[int], total: int) -> list[int]:
    """How many to take of each of several groups, `total` together, the largest share as small as can be.

    Example:
        >>> even_shares([5, 100, 200], 105), even_shares([1, 2], 10)
        ([5, 50, 50], [1, 2])
    """
    shares = [0] * len(sizes)
    left = total
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
    for done, i in enumerate(order):
        shares[i] = min(sizes[i], left // (len(order) - done))
        left -= shares[i]
    return shares


def _rows(files: Sequence[Path]) -> Iterator[Row]:
    for file in files:
        yield from read_rows(file, FIELDS, ELI5_CATEGORY)


def _question(row: Row) -> str:
    title, text = row.text("title").strip(), row.text("selftext").strip()
    if not title:
        raise row.error("title", title, "a question")
    return f"{title}\n\n{text}" if text and text not in REMOVED else title


def _answers(row: Row) -> list[str]:
    """The answers that are still there, the one with the highest score first."""
    texts, scores = row.texts("text", within="answers"), row.integers("score", within="answers")
    if len(texts) != len(scores):
        raise row.error("answers", {"score": scores}, f"a score for each of the {len(texts)} texts")
    order = sorted(range(len(texts)), key=lambda i: -scores[i])
    return [texts[i].strip() for i in order if texts[i].strip() and texts[i].strip() not in REMOVED]
