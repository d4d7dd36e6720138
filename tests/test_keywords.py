"""Which words could be forgotten: counted as the split counts, and nothing else listed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rfa_fast.data import Keyword, keyword_candidates, split_by_keyword

TEXTS = [
    "The Comedy wasn't funny.", "comedy, comedy!", "Drama; comedies", "A drama_queen", "COMEDY's 3rd act", "act 3rd",
    "Übung macht", "übung", "of the and", "won it",
]  # fmt: skip


def test_words_are_counted_by_texts_and_sorted() -> None:
    found = keyword_candidates(TEXTS, low=0.1, high=0.3)
    assert found == [
        Keyword("comedy", 3, 0.3), Keyword("act", 2, 0.2), Keyword("übung", 2, 0.2), Keyword("comedies", 1, 0.1),
        Keyword("drama", 1, 0.1), Keyword("funny", 1, 0.1), Keyword("macht", 1, 0.1), Keyword("won", 1, 0.1),
    ]  # fmt: skip


def test_both_bounds_are_included_and_hold_for_the_test_set_too() -> None:
    assert [k.word for k in keyword_candidates(TEXTS, low=0.2, high=0.2)] == ["act", "übung"]
    test = ["act", "comedy act", "the", "an act"]
    assert keyword_candidates(TEXTS, test, low=0.2, high=0.75) == [
        Keyword("comedy", 3, 0.3, 0.25), Keyword("act", 2, 0.2, 0.75),
    ]  # fmt: skip


def test_stop_words_letters_and_nothing_else() -> None:
    words = {k.word for k in keyword_candidates(TEXTS, low=0.0, high=1.0)}
    assert not words & {"the", "of", "and", "wasn", "3rd", "drama_queen", "it", "a", "s", "t"}
    given = {k.word for k in keyword_candidates(TEXTS, low=0.0, high=1.0, letters=1, stop_words={"comedy"})}
    assert {"the", "wasn", "it", "a"} <= given
    assert "comedy" not in given


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 0.2, "high": 0.1}, "low, high: got 0.2 and 0.1"),
        ({"high": 1.5}, "low, high: got 0.05 and 1.5"),
        ({"letters": 0}, "letters: got 0"),
        ({"train_texts": []}, "train_texts: got no text"),
        ({"test_texts": []}, "test_texts: got no text"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keyword_candidates(**{"train_texts": TEXTS, **arguments})  # type: ignore[arg-type]


word = st.text("abcé_7", min_size=1, max_size=3)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(word, max_size=5).map(lambda w: " ,'".join(w)), min_size=2, max_size=8))
def test_a_candidates_share_is_what_the_split_forgets(texts: list[str]) -> None:
    for found in keyword_candidates(texts, texts, low=0.0, high=0.99, letters=1, stop_words=()):
        split = split_by_keyword(texts, texts, found.word)
        assert len(split.forget) == found.texts
        assert len(split.forget_test) / len(texts) == found.test_share == found.share
