"""Texts as token ids: for classification, for language modelling, for question and answer.

Everything is tokenised once and padded to one length, so that an epoch costs no tokenizer and a
compiled step sees one shape. The price is 24 bytes per token of padding.

A text that is too long is not an accident in classification (an article is cut and still tells its
topic; the number cut is kept), but it is one in question and answer, where the cut takes the answer:
there it is an error unless the caller says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rfa_fast.data.datasets import QADataset, TextDataset, check_ids, check_labels
from rfa_fast.data.draws import integer
from rfa_fast.objective import IGNORED_LABEL

QA_TEMPLATE = "Question: {question}\nAnswer: {answer}"


class TokenDataset(Dataset[dict[str, Tensor]]):
    """Tokenised texts in memory; an item is a dict with `input_ids`, `attention_mask` and `labels`.

    Args:
        input_ids: (n, T) int64, padded on the right.
        attention_mask: (n, T) int64, 0 on the padding.
        labels: class index of each text, (n,), which splits are made by.
        classes: class names by index.
        targets: (n, T) int64, the items' `labels` for a language model, −100 where there is nothing to
            predict; `None`: the items' `labels` are the class indices.
        texts: the texts themselves, (n,), where a keyword is looked for.
        prompts: what stands before each answer, (n,), for generation; `None` when there is none.
        truncated: how many texts did not fit into T.
        ids: names of the samples, for the deletion record; positions when not given.

    Raises:
        ValueError: shapes differ, no text, a label out of range.

    Example:
        >>> ids = torch.tensor([[5, 6]])
        >>> data = TokenDataset(ids, torch.ones_like(ids), [0], classes=("news",), texts=["hi"])
        >>> data[0]["labels"]
        tensor(0)
    """

    def __init__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Sequence[int],
        classes: Sequence[str],
        *,
        texts: Sequence[str],
        targets: Tensor | None = None,
        prompts: Sequence[str] | None = None,
        truncated: int = 0,
        ids: Sequence[str | int] | None = None,
    ) -> None:
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, expected (n, T), neither of them 0")
        for name, value in (("attention_mask", attention_mask), ("targets", targets)):
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(input_ids.shape)}")
        for name, values in (("texts", texts), ("prompts", prompts)):
            if values is not None and len(values) != len(input_ids):
                raise ValueError(f"{name}: got {len(values)}, expected one for each of the {len(input_ids)} samples")
        self.input_ids, self.attention_mask, self.targets = input_ids, attention_mask, targets
        self.classes = tuple(classes)
        self.labels = check_labels(labels, len(input_ids), self.classes)
        self.texts = list(texts)
        self.prompts = None if prompts is None else list(prompts)
        self.truncated = truncated
        self.ids = check_ids(ids, len(input_ids))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = torch.tensor(self.labels[index]) if self.targets is None else self.targets[index]
        return {"input_ids": self.input_ids[index], "attention_mask": self.attention_mask[index], "labels": labels}


def tokenise_texts(dataset: TextDataset, tokenizer: Any, max_length: int) -> TokenDataset:
    """The texts for a classifier: `labels` of an item is its class index, ().

    Args:
        dataset: the texts.
        tokenizer: a transformers tokenizer; it adds its own special tokens.
        max_length: T of every item. Longer texts are cut; `truncated` of the result counts them.

    Raises:
        ValueError: `max_length` below 1, or a tokenizer with no token to pad with.

    Example:
        >>> from transformers import PreTrainedTokenizerFast
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "late": 2, "goal": 3}, unk_token="[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
        >>> data = tokenise_texts(TextDataset(["a late goal"], [0], classes=("sports",)), tokenizer, max_length=4)
        >>> data[0]["input_ids"], data[0]["labels"]
        (tensor([1, 2, 3, 0]), tensor(0))
    """
    rows, truncated = _encode(dataset.texts, tokenizer, integer("max_length", max_length, 1))
    input_ids, attention_mask = _padded(rows, max_length, _pad_token(tokenizer))
    return TokenDataset(
        input_ids,
        attention_mask,
        dataset.labels,
        dataset.classes,
        texts=dataset.texts,
        truncated=truncated,
        ids=dataset.ids,
    )


def tokenise_lm(dataset: TextDataset, tokenizer: Any, max_length: int) -> TokenDataset:
    """The texts for a language model: `labels` of an item is its `input_ids`, −100 on the padding, (T,).

    Labels are not shifted, as transformers' models expect. Arguments, errors and cutting are those of
    :func:`tokenise_texts`.

    Example:
        >>> from transformers import PreTrainedTokenizerFast
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "late": 2, "goal": 3}, unk_token="[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
        >>> tokenise_lm(TextDataset(["late goal"], [0], classes=("sports",)), tokenizer, max_length=3)[0]["labels"]
        tensor([   2,    3, -100])
    """
    data = tokenise_texts(dataset, tokenizer, max_length)
    data.targets = data.input_ids.masked_fill(data.attention_mask == 0, IGNORED_LABEL)
    return data


def tokenise_qa(
    dataset: QADataset, tokenizer: Any, max_length: int, template: str = QA_TEMPLATE, *, truncate: bool = False
) -> TokenDataset:
    """Question and first answer for a causal language model, which is taught the answer alone.

    Prompt and answer are tokenised apart, so that the prompt's tokens are those that it has when a
    model is asked for the answer; a space before the answer goes with the answer, as byte-pair
    vocabularies have it. The end-of-text token, where the tokenizer has one, closes the answer and
    is taught too. `labels` of an item is (T,), unshifted, −100 on prompt and padding.

    Args:
        dataset: the questions; see :class:`~rfa_fast.data.QADataset`.
        tokenizer: a transformers tokenizer; what it puts in front of a text, it puts in front here.
        max_length: T of every item.
        template: a text with `{question}` and, after it, `{answer}`, each once. What follows the answer
            is taught with it.
        truncate: cut the beginning of a prompt that is too long, never the answer, and count it in
            `truncated`; otherwise it is an error.

    Raises:
        ValueError: a template without the two fields; an item, or with `truncate` an answer, that is longer
            than `max_length` (the message says how many are, and the longest).

    Example:
        >>> from transformers import PreTrainedTokenizerFast
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> vocabulary = {"[PAD]": 0, "[UNK]": 1, "</s>": 2, "gold": 3, "?": 4, "Au": 5}
        >>> words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="</s>")
        >>> data = QADataset(["gold?"], [["Au"]], [0], classes=("elements",))
        >>> item = tokenise_qa(data, tokenizer, max_length=5, template="{question} {answer}")[0]
        >>> item["input_ids"], item["labels"]
        (tensor([3, 4, 5, 2, 0]), tensor([-100, -100,    5,    2, -100]))
    """
    integer("max_length", max_length, 1)
    before, space, after = _template_parts(template)
    prompts = [before.replace("{question}", question) for question in dataset.questions]
    prompt_rows = _encode(prompts, tokenizer, None, add_special_tokens=False)[0]
    lead = _leading_tokens(tokenizer, prompts[0])
    prompt_rows = [lead + row for row in prompt_rows]
    endings = [space + accepted[0] + after for accepted in dataset.answers]
    answer_rows = _encode(endings, tokenizer, None, add_special_tokens=False)[0]
    if (end := tokenizer.eos_token_id) is not None:
        answer_rows = [row if row[-1:] == [end] else [*row, end] for row in answer_rows]

    lengths = [len(a) + (0 if truncate else len(p)) for p, a in zip(prompt_rows, answer_rows, strict=True)]
    if too_long := [i for i, length in enumerate(lengths) if length > max_length]:
        worst = max(too_long, key=lengths.__getitem__)
        what = "answers" if truncate else "items"
        hint = "" if truncate else ", truncate=True to cut their prompts"
        raise ValueError(
            f"max_length: got {max_length}, which {len(too_long)} of {len(dataset)} {what} do not fit; expected at "
            f"least {lengths[worst]}, the length of {dataset.questions[worst]!r}{hint}, "
            "or a dataset.select() without them"
        )
    pairs = [(p[max(0, len(p) + len(a) - max_length) :], a) for p, a in zip(prompt_rows, answer_rows, strict=True)]
    input_ids, attention_mask = _padded([p + a for p, a in pairs], max_length, _pad_token(tokenizer))
    targets, _ = _padded([[IGNORED_LABEL] * len(p) + a for p, a in pairs], max_length, IGNORED_LABEL)
    return TokenDataset(
        input_ids,
        attention_mask,
        dataset.labels,
        dataset.classes,
        texts=dataset.texts,
        targets=targets,
        prompts=prompts,
        truncated=sum(len(cut) < len(row) for (cut, _), row in zip(pairs, prompt_rows, strict=True)),
        ids=dataset.ids,
    )


def _template_parts(template: str) -> tuple[str, str, str]:
    """The template up to the answer, the white space right before the answer, and what follows it."""
    for field in ("{question}", "{answer}"):
        if template.count(field) != 1:
            raise ValueError(f"template: got {template!r} with {template.count(field)} times {field}, expected it once")
    before, after = template.split("{answer}")
    if "{question}" not in before:
        raise ValueError(f"template: got {template!r}, expected {{question}} before {{answer}}")
    prompt = before.rstrip(" ")
    return prompt, before[len(prompt) :], after


def _encode(
    texts: Sequence[str], tokenizer: Any, max_length: int | None, *, add_special_tokens: bool = True
) -> tuple[list[list[int]], int]:
    """The token ids of each text, cut to `max_length`, and how many texts were cut."""
    options = {"add_special_tokens": add_special_tokens, "verbose": False}
    rows: list[list[int]] = tokenizer(list(texts), truncation=False, **options)["input_ids"]
    long = [] if max_length is None else [i for i, row in enumerate(rows) if len(row) > max_length]
    if long:
        # The tokenizer cuts, not we: the special token at the end has to stay.
        cut = tokenizer([texts[i] for i in long], truncation=True, max_length=max_length, **options)["input_ids"]
        for i, row in zip(long, cut, strict=True):
            rows[i] = row
    return rows, len(long)


def _leading_tokens(tokenizer: Any, text: str) -> list[int]:
    """What the tokenizer puts in front of a text by itself, such as a beginning-of-text token."""
    plain = _encode([text], tokenizer, None, add_special_tokens=False)[0][0]
    full = _encode([text], tokenizer, None)[0][0]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    raise ValueError(
        f"tokenizer: got other tokens for {text!r} with special tokens than without, expected the same tokens "
        "with special ones around them"
    )


def _pad_token(tokenizer: Any) -> int:
    """What to pad with: padding is attended to by nothing, so that another special token will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("tokenizer: got neither a padding nor an end-of-text token, expected one; set tokenizer.pad_token")


def _padded(rows: Sequence[Sequence[int]], length: int, fill: int) -> tuple[Tensor, Tensor]:
    """The rows as (n, length) int64, padded on the right, and their attention mask."""
    values = torch.full((len(rows), length), fill, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        values[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = 1
    return values, mask
