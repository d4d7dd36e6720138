"""Forgetting by keyword: the texts with a word, and which words would do.

For data whose classes do not fit, the paper forgets the texts with a keyword, chosen so that it stands in 5 to
10 % of them, and in a similar share of the test set (sections V-A2 and V-A4). Its "comedy" is IMDB's; for
other texts the candidates are counted here. The count is of whole words in either case, exactly as the
split finds them, so that a candidate's share is the share that will be forgotten.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from rfa_fast.data.draws import integer
from rfa_fast.data.splits import Split, split_where

# What is left of "didn't" when the word ends at the apostrophe.
CONTRACTED = frozenset(
    ("ain", "aren", "couldn", "didn", "doesn", "don", "hadn", "hasn", "isn", "mustn", "needn", "shouldn", "wasn",
     "weren", "wouldn")
)  # fmt: skip


@dataclass(frozen=True)
class Keyword:
    """A word that could be forgotten.

    Attributes:
        word: in lower case.
        texts: how many training texts have it.
        share: of the training texts.
        test_share: of the test texts; `None` where none were given.
    """

    word: str
    texts: int
    share: float
    test_share: float | None = None


def split_by_keyword(train_texts: Sequence[str], test_texts: Sequence[str], keyword: str) -> Split:
    """Forget every text with a keyword (the paper's target for data whose classes do not fit, section V-A4).

    The keyword counts as a whole word, in either case; white space in it stands for any white space.

    Raises:
        ValueError: no text has it (the message says how many have it inside another word), or all have.

    Example:
        >>> split_by_keyword(["A Horror film", "horrors", "fun"], ["horror", "fine"], "horror").forget
        (0,)
    """
    words = keyword.split() if isinstance(keyword, str) else []
    if not words:
        raise ValueError(f"keyword: got {keyword!r}, expected a word or several")
    inner = r"\s+".join(map(re.escape, words))
    pattern = re.compile(rf"(?<!\w){inner}(?!\w)", re.IGNORECASE)
    hits = [[bool(pattern.search(text)) for text in texts] for texts in (train_texts, test_texts)]
    for name, texts, hit in (("training", train_texts, hits[0]), ("test", test_texts, hits[1])):
        if not any(hit):
            inside = sum(bool(re.search(inner, text, re.IGNORECASE)) for text in texts)
            raise ValueError(
                f"keyword: got {keyword!r}, which none of the {len(texts)} {name} texts has as a whole word "
                f"({inside} have it inside another word); expected one that the training and the test texts have"
            )
    return split_where("keyword", keyword, *hits)


def keyword_candidates(
    train_texts: Sequence[str],
    test_texts: Sequence[str] | None = None,
    *,
    low: float = 0.05,
    high: float = 0.10,
    letters: int = 3,
    stop_words: Collection[str] | None = None,
) -> list[Keyword]:
    """The words that stand in 5 to 10 % of the training texts, the most frequent first, then by alphabet.

    Args:
        train_texts: (n,).
        test_texts: when given, the share in these has to lie within the same bounds.
        low, high: bounds of the share, both included.
        letters: length of the shortest word; one with digits or underscores is no word.
        stop_words: words in lower case to leave out; `None`: scikit-learn's 318 English ones, and what English
            contractions leave behind, such as "didn".

    Raises:
        ValueError: no text, or bounds out of order or outside [0, 1].

    Example:
        >>> texts = ["The film was fun", "the film", "The game", "a game and a film"]
        >>> [(found.word, found.share) for found in keyword_candidates(texts, low=0.3, high=0.8)]
        [('film', 0.75), ('game', 0.5)]
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low, high: got {low} and {high}, expected 0 <= low <= high <= 1")
    integer("letters", letters, 1)
    for name, texts in (("train_texts", train_texts), ("test_texts", test_texts)):
        if texts is not None and not len(texts):
            raise ValueError(f"{name}: got no text, expected at least one")
    left_out = _english() if stop_words is None else frozenset(stop_words)
    counts = _texts_with(train_texts)
    test_counts = None if test_texts is None else _texts_with(test_texts)
    found: list[Keyword] = []
    for word, count in counts.items():
        share = count / len(train_texts)
        test_share = None if test_counts is None or test_texts is None else test_counts[word] / len(test_texts)
        within = low <= share <= high and (test_share is None or low <= test_share <= high)
        if within and len(word) >= letters and word.isalpha() and word not in left_out:
            found.append(Keyword(word, count, share, test_share))
    return sorted(found, key=lambda each: (-each.texts, each.word))


def _texts_with(texts: Iterable[str]) -> Counter[str]:
    """In how many texts each word stands."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(set(re.findall(r"\w+", text.lower())))
    return counts


def _english() -> frozenset[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return frozenset(ENGLISH_STOP_WORDS) | CONTRACTED
