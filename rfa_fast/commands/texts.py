"""Texts as a model takes them: what is learnt of a question and its answer, and how long a text may be.

An answer is learnt alone, after its question, where answers are short. Those of ELI5 are pages, and a model's places
would not hold one of them in ten: there question and answer are one text that is cut, as the paper has it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from rfa_fast.data import QADataset, TokenDataset, tokenise_lm, tokenise_qa, tokenise_texts
from rfa_fast.models import OpenedModel

_ONE_TEXT = ("eli5-category",)


def tokens_of(part: Any, opened: OpenedModel, max_length: int, name: str) -> TokenDataset:
    """The texts of a data set as tokens, for a classifier or a language model.

    Args:
        part: the texts.
        opened: the model.
        max_length: of a text, in tokens.
        name: of the data.

    Raises:
        ValueError: no tokenizer, a length that the model has no places for, or one that answers do not fit.
    """
    if opened.tokenizer is None:
        raise ValueError(f"{opened.name}: got texts but no tokenizer, expected --tokenizer FOLDER")
    most = longest(opened.model)
    if most is not None and max_length > most:
        raise ValueError(f"--max-length: got {max_length}, expected at most {most}, what {opened.name} takes")
    if opened.task != "language":
        return tokenise_texts(part, opened.tokenizer, max_length)
    if name in _ONE_TEXT or not isinstance(part, QADataset):
        return tokenise_lm(part, opened.tokenizer, max_length)
    try:
        return tokenise_qa(part, opened.tokenizer, max_length, truncate=True)
    except ValueError as error:
        if not str(error).startswith("max_length:"):
            raise
        said = str(error).partition(", or a dataset.select()")[0]  # which a command line has not
        raise ValueError(f"--max-length:{said.removeprefix('max_length:')}") from error


def cut_notes(part: Any, tokens: TokenDataset, opened: OpenedModel, side: str) -> list[str]:
    """What was cut to fit, as notes.

    Args:
        part: the texts.
        tokens: what :func:`tokens_of` made of them.
        opened: the model.
        side: `"training"` or `"test"`.
    """
    if not tokens.truncated:
        return []
    count, length = f"{tokens.truncated} of {len(tokens)} {side}", tokens.input_ids.shape[1]
    if tokens.prompts is not None:
        return [f"{count} questions cut at the beginning, to fit with their answers into {length} tokens"]
    notes = [f"{count} texts cut to {length} tokens"]
    if opened.task == "language" and isinstance(part, QADataset):
        rows = opened.tokenizer(part.questions, verbose=False)["input_ids"]
        lost = sum(len(row) >= length for row in rows)
        notes += [f"{lost} {side} questions fill that without their answers; --max-length sets it"] if lost else []
    return notes


def longest(model: nn.Module) -> int | None:
    """The tokens that a model has places for; `None` where its configuration does not say.

    Example:
        >>> longest(nn.Linear(2, 2)) is None
        True
    """
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    for name, module in model.named_modules():
        # RoBERTa and its kin keep the places up to that of padding free, and number the tokens from there.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return most - int(module.padding_idx) - 1
    return most
