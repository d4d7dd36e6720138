"""Multiple choice: questions that also know the answers they are not.

To a language model a question with four choices is text like any other; to a metric it is a choice
among four. The data set holds both, so that one loader serves perplexity and multiple-choice accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

from rfa_fast.data.datasets import QADataset, ids_of


class ChoiceDataset(QADataset):
    """Questions with several choices, one of them right.

    Args:
        questions: (n,), without their choices.
        choices: of each question, two or more, at most 26.
        correct: index of the right one, (n,).
        labels: topic index of each question, (n,).
        classes: topic names by index.
        listed: whether a question's text lists its choices, "A." to "Z.", a line each; its answer then
            has the letter in front.
        ids: as for :class:`~rfa_fast.data.TextDataset`.

    Attributes:
        questions, answers, texts: as the model reads them, see `listed`.
        stems: the questions without their choices.

    Raises:
        TypeError, ValueError: lengths differ, too few or too many choices, an empty one, an index out of range.

    Example:
        >>> data = ChoiceDataset(["2 + 2?"], [["3", "4"]], [1], [0], classes=("sums",))
        >>> print(data.texts[0])
        2 + 2?
        A. 3
        B. 4
        Answer: B. 4
    """

    def __init__(
        self,
        questions: Sequence[str],
        choices: Sequence[Sequence[str]],
        correct: Sequence[int],
        labels: Sequence[int],
        classes: Sequence[str],
        *,
        listed: bool = True,
        ids: Sequence[str | int] | None = None,
    ) -> None:
        self.stems = list(questions)
        self.choices = [list(options) for options in choices]
        self.correct = list(correct)
        self.listed = listed
        for name, values in (("choices", self.choices), ("correct", self.correct)):
            if len(values) != len(self.stems):
                raise ValueError(f"{name}: got {len(values)}, expected one for each of the {len(self.stems)} questions")
        for question, options, right in zip(self.stems, self.choices, self.correct, strict=True):
            if not 2 <= len(options) <= len(ascii_uppercase) or not all(option.strip() for option in options):
                raise ValueError(f"choices: got {options!r} for {question!r}, expected 2 to 26, none empty")
            if not 0 <= right < len(options):
                raise ValueError(f"correct: got {right} for {question!r}, expected 0 to {len(options) - 1}")
        super().__init__(
            [choice_prompt(q, o) if listed else q for q, o in zip(self.stems, self.choices, strict=True)],
            [[lettered(o, c) if listed else o[c]] for o, c in zip(self.choices, self.correct, strict=True)],
            labels,
            classes,
            ids=ids,
        )
        if listed:
            self.texts = [
                f"{question}\nAnswer: {answer[0]}"
                for question, answer in zip(self.questions, self.answers, strict=True)
            ]

    def select(self, indices: Sequence[int]) -> ChoiceDataset:
        """Some of the questions, in the order given, under the names that they have here.

        Example:
            >>> data = ChoiceDataset(["a?", "b?"], [["1", "2"], ["3", "4"]], [0, 1], [0, 0], classes=("x",))
            >>> data.select([1]).choices
            [['3', '4']]
        """
        names = ids_of(self)
        return ChoiceDataset(
            [self.stems[i] for i in indices],
            [self.choices[i] for i in indices],
            [self.correct[i] for i in indices],
            [self.labels[i] for i in indices],
            self.classes,
            listed=self.listed,
            ids=[names[i] for i in indices],
        )


def choice_prompt(question: str, choices: Sequence[str]) -> str:
    """The question and its choices with a letter each, a line each.

    Example:
        >>> choice_prompt("2 + 2?", ["3", "4"])
        '2 + 2?\\nA. 3\\nB. 4'
    """
    return "\n".join([question, *(lettered(choices, i) for i in range(len(choices)))])


def lettered(choices: Sequence[str], index: int) -> str:
    """One choice with its letter.

    Example:
        >>> lettered(["3", "4"], 1)
        'B. 4'
    """
    return f"{ascii_uppercase[index]}. {choices[index]}"
