"""Items, batches and names of samples: shapes, padding, tokens of a question and its answer."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset
from transformers import PreTrainedTokenizerFast

from rfa_fast.data import (
    ImageDataset,
    MixedDataset,
    QADataset,
    TextDataset,
    TokenDataset,
    collate,
    collate_mixed,
    collate_text,
    ids_of,
    load,
    tokenise_lm,
    tokenise_qa,
    tokenise_texts,
)

WORDS = ["[PAD]", "[UNK]", "<s>", "</s>", "what", "is", "gold", "lead", "?", "Au", "Pb", "Q", ":", "A"]
ID = {word: i for i, word in enumerate(WORDS)}


def word_tokenizer(*, special: bool = False, pad: bool = True, end: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; `special`: it puts <s> in front of a text and </s> behind it."""
    words = Tokenizer(models.WordLevel(ID, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        words.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", ID["<s>"]), ("</s>", ID["</s>"])]
        )
    options = {"unk_token": "[UNK]"} | ({"pad_token": "[PAD]"} if pad else {}) | ({"eos_token": "</s>"} if end else {})
    return PreTrainedTokenizerFast(tokenizer_object=words, **options)


def ids(text: str) -> list[int]:
    return [ID[word] for word in text.split()]


TEXTS = TextDataset(["what is gold", "lead"], [1, 0], classes=("lead", "gold"), ids=["first", "second"])
QA = QADataset(
    ["what is gold?", "what is lead?"], [["Au", "AU"], ["Pb"]], [1, 0], classes=("lead", "gold"), ids=["q1", "q2"]
)


def test_image_dataset_items() -> None:
    images = torch.randn(4, 1, 5, 3)
    data = ImageDataset(images, torch.tensor([0, 1, 1, 0]), ["a", "b"], torch.neg, channels=3, ids=["w", "x", "y", "z"])
    image, label = data[2]
    assert torch.equal(image, -images[2].expand(3, 5, 3))
    assert label == 1
    assert type(label) is int
    assert (data.labels, data.classes, len(data)) == ([0, 1, 1, 0], ("a", "b"), 4)
    with pytest.raises(IndexError):
        data[4]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([[0.0]], [0], ["a"]), {}, TypeError, "images: got list"),
        ((torch.zeros(1, 1, 2, 2, dtype=torch.uint8), [0], ["a"]), {}, TypeError, "images: got torch.uint8"),
        ((torch.zeros(1, 2, 2), [0], ["a"]), {}, ValueError, r"images: got shape \(1, 2, 2\)"),
        ((torch.zeros(0, 1, 2, 2), [], ["a"]), {}, ValueError, r"images: got shape \(0, 1, 2, 2\)"),
        ((torch.zeros(2, 1, 2, 2), [0], ["a"]), {}, ValueError, "labels: got 1, expected one for each of the 2"),
        ((torch.zeros(2, 1, 2, 2), [0, 1], ["a"]), {}, ValueError, "labels: got 1 at position 1, expected 0 to 0"),
        ((torch.zeros(2, 1, 2, 2), [0, -1], ["a"]), {}, ValueError, "labels: got -1 at position 1"),
        ((torch.zeros(2, 1, 2, 2), [0, 0.5], ["a"]), {}, TypeError, "labels: got 0.5"),
        ((torch.zeros(2, 2, 2, 2), [0, 0], ["a"]), {"channels": 3}, ValueError, "channels: got 3, expected 2"),
        ((torch.zeros(2, 1, 2, 2), [0, 0], ["a"]), {"ids": ["x"]}, ValueError, "ids: got 1, expected one for each"),
    ],
)
def test_image_dataset_of_something_else(arguments, options, error, message) -> None:
    with pytest.raises(error, match=message):
        ImageDataset(*arguments, **options)


def test_text_datasets_of_something_else() -> None:
    with pytest.raises(ValueError, match="texts: got none"):
        TextDataset([], [], classes=("a",))
    with pytest.raises(TypeError, match="texts: got None, expected strings"):
        TextDataset(["a", None], [0, 0], classes=("a",))  # type: ignore[list-item]
    with pytest.raises(ValueError, match="answers: got 1, expected one list for each of 2"):
        QADataset(["a", "b"], [["x"]], [0, 0], classes=("a",))
    for empty in ([], [""], [" "], [3]):
        with pytest.raises(ValueError, match="answers: got .*for 'b', expected at least one"):
            QADataset(["a", "b"], [["x"], empty], [0, 0], classes=("a",))


def test_some_of_the_texts_keep_their_names() -> None:
    part = QA.select([1])
    assert (part.questions, part.answers, part.labels, ids_of(part)) == (["what is lead?"], [["Pb"]], [0], ["q2"])
    assert part.texts == ["what is lead? Pb"]
    plain = TEXTS.select([1, 0])
    assert ([plain[i] for i in range(2)], ids_of(plain)) == ([("lead", 0), ("what is gold", 1)], ["second", "first"])
    with pytest.raises(ValueError, match="texts: got none"):
        TEXTS.select([])


def test_collate_images_and_what_does_not_stack() -> None:
    inputs, labels = collate([(torch.ones(3, 2, 2), 1), (torch.zeros(3, 2, 2), 0)])
    assert inputs.shape == (2, 3, 2, 2)
    assert (labels.dtype, labels.tolist()) == (torch.int64, [1, 0])
    with pytest.raises(ValueError, match=r"inputs: got shapes \(3, 2, 2\) and \(3, 4, 4\) in one batch"):
        collate([(torch.ones(3, 4, 4), 1), (torch.zeros(3, 2, 2), 0)])
    with pytest.raises(ValueError, match=r"input_ids: got shapes \(1,\) and \(2,\)"):
        collate([{"input_ids": torch.ones(2)}, {"input_ids": torch.ones(1)}])
    with pytest.raises(ValueError, match="items: got none"):
        collate([])


def ragged(*lengths: int) -> list[dict[str, torch.Tensor]]:
    return [
        {
            "input_ids": torch.arange(10, 10 + n),
            "attention_mask": torch.ones(n, dtype=torch.int64),
            "labels": torch.arange(n),
            "weight": torch.tensor(0.5),
        }
        for n in lengths
    ]


def test_collate_text_pads_on_the_right() -> None:
    batch = collate_text(ragged(1, 3), pad_token_id=9)
    assert batch["input_ids"].tolist() == [[10, 9, 9], [10, 11, 12]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[0, -100, -100], [0, 1, 2]]
    assert batch["weight"].tolist() == [0.5, 0.5]
    fixed = collate_text(ragged(1, 3), pad_token_id=9, length=4)
    assert fixed["labels"].tolist() == [[0, -100, -100, -100], [0, 1, 2, -100]]
    assert torch.equal(fixed["input_ids"][:, :3], batch["input_ids"])


def test_collate_text_cuts_off_what_no_text_of_the_batch_reaches() -> None:
    data = tokenise_lm(TEXTS, word_tokenizer(), max_length=9)
    batch = collate_text([data[0], data[1]])
    assert batch["input_ids"].tolist() == [ids("what is gold"), ids("lead [PAD] [PAD]")]
    assert collate_text([data[1]])["labels"].tolist() == [ids("lead")]
    # A class index stays one, and padding on the left is no end.
    assert collate_text([tokenise_texts(TEXTS, word_tokenizer(), 9)[0]])["labels"].tolist() == [1]
    left = {"input_ids": torch.tensor([0, 5]), "attention_mask": torch.tensor([0, 1]), "labels": torch.tensor(1)}
    assert collate_text([left])["input_ids"].tolist() == [[0, 5]]
    empty = {**left, "attention_mask": torch.tensor([0, 0])}
    assert collate_text([empty])["input_ids"].tolist() == [[0]]


def test_collate_text_of_something_else() -> None:
    with pytest.raises(ValueError, match="items: got none"):
        collate_text([])
    with pytest.raises(ValueError, match=r"items: got one with the keys \['input_ids'\], expected 'attention_mask'"):
        collate_text([{"input_ids": torch.ones(2)}])
    with pytest.raises(ValueError, match="length: got 2, expected at least 3"):
        collate_text(ragged(1, 3), length=2)


def test_mixed_batches_of_tuples_and_dicts() -> None:
    images = ImageDataset(torch.zeros(2, 1, 2, 2), [0, 1], classes=("a", "b"))
    mixed = MixedDataset(images, Subset(images, [1]))
    assert len(mixed) == 3
    inputs, labels, forget = collate_mixed([mixed[0], mixed[-1], mixed[1]])
    assert inputs.shape == (3, 1, 2, 2)
    assert (labels.tolist(), forget.tolist(), forget.dtype) == ([0, 1, 1], [False, True, False], torch.bool)
    with pytest.raises(IndexError, match="index: got 3, expected less than 3"):
        mixed[3]
    tokens = tokenise_lm(TEXTS, word_tokenizer(), max_length=4)
    loader = DataLoader(MixedDataset(Subset(tokens, [0]), Subset(tokens, [1])), 2, collate_fn=collate_mixed)
    inputs, labels, forget = next(iter(loader))
    assert sorted(inputs) == ["attention_mask", "input_ids"]
    assert labels.tolist() == [[*ids("what is gold"), -100], [*ids("lead"), -100, -100, -100]]
    assert forget.tolist() == [False, True]


def test_mixed_batches_through_the_users_collate_fn() -> None:
    batch = [((torch.ones(1), 2), False), ((torch.zeros(1), 3), True)]
    inputs, labels, forget = collate_mixed(batch, lambda items: [len(items), "labels"])
    assert (inputs, labels, forget.tolist()) == (2, "labels", [False, True])
    for made, got in (
        ({"input_ids": 1}, r"a dict with \['input_ids'\]"),
        (torch.zeros(2), "a Tensor"),
        ((1,), "tuple"),
    ):
        with pytest.raises(TypeError, match=f"collate_fn: got {got}|collate_fn: got a {got}"):
            collate_mixed(batch, lambda items, made=made: made)
    with pytest.raises(ValueError, match="batch: got no item"):
        collate_mixed([])


def test_names_of_samples() -> None:
    first, second = list(zip("ab", "cd", strict=True)), TEXTS
    assert ids_of(first) == ["0", "1"]
    assert ids_of(Subset(Subset(second, [1, 0]), torch.tensor([1]))) == ["first"]
    assert ids_of(ConcatDataset([Subset(second, [1]), Subset(second, [0])])) == ["second", "first"]
    # Two datasets without names share positions: the part tells them apart.
    assert ids_of(ConcatDataset([first, first])) == ["0/0", "0/1", "1/0", "1/1"]
    assert ids_of(MixedDataset(Subset(second, [1]), Subset(second, [0]))) == ["second", "first"]
    assert ids_of(TextDataset(["a", "b"], [0, 0], classes=("x",), ids=[7, 7])) == ["7", "7"]


def test_names_that_are_not_as_many_as_the_samples() -> None:
    data = TextDataset(["a", "b"], [0, 0], classes=("x",))
    data.ids = ["only one"]
    with pytest.raises(ValueError, match="ids: got 1, expected one for each of the 2"):
        ids_of(data)

    class Stream(IterableDataset):
        def __iter__(self):
            yield from ()

    with pytest.raises(TypeError, match="dataset: got Stream without a length"):
        ids_of(Stream())


def test_tokens_for_a_classifier_are_the_tokenizers_own() -> None:
    tokenizer = word_tokenizer(special=True)
    data = tokenise_texts(TEXTS, tokenizer, max_length=6)
    truth = tokenizer(TEXTS.texts, padding="max_length", max_length=6, return_tensors="pt")
    assert torch.equal(data.input_ids, truth["input_ids"])
    assert torch.equal(data.attention_mask, truth["attention_mask"])
    assert (data.labels, data.classes, data.texts, data.ids) == ([1, 0], TEXTS.classes, TEXTS.texts, TEXTS.ids)
    assert [data[i]["labels"].item() for i in range(2)] == [1, 0]
    assert data[0]["labels"].dtype == torch.int64
    assert data.truncated == 0


def test_a_text_that_is_cut_keeps_its_last_special_token() -> None:
    data = tokenise_texts(TEXTS, word_tokenizer(special=True), max_length=4)
    assert data.input_ids.tolist() == [ids("<s> what is </s>"), ids("<s> lead </s> [PAD]")]
    assert data.truncated == 1


def test_tokens_for_a_language_model() -> None:
    data = tokenise_lm(TEXTS, word_tokenizer(pad=False), max_length=4)
    # Without a padding token the end-of-text token pads; it is neither attended to nor taught.
    assert data.input_ids.tolist() == [ids("what is gold </s>"), ids("lead </s> </s> </s>")]
    assert data.attention_mask.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert [data[i]["labels"].tolist() for i in range(2)] == [[*ids("what is gold"), -100], [*ids("lead"), *[-100] * 3]]
    assert data.labels == [1, 0]
    with pytest.raises(ValueError, match=r"set tokenizer\.pad_token"):
        tokenise_lm(TEXTS, word_tokenizer(pad=False, end=False), max_length=4)
    with pytest.raises(ValueError, match="max_length: got 0"):
        tokenise_lm(TEXTS, word_tokenizer(), max_length=0)


@pytest.mark.parametrize(
    ("special", "end", "prompt", "answer"),
    [
        (False, True, "Q : what is gold ? A :", "Au </s>"),
        (True, True, "<s> Q : what is gold ? A :", "Au </s>"),
        (False, False, "Q : what is gold ? A :", "Au"),
    ],
)
def test_only_the_answer_is_taught(special: bool, end: bool, prompt: str, answer: str) -> None:
    data = tokenise_qa(QA, word_tokenizer(special=special, end=end), 12, template="Q: {question} A: {answer}")
    tokens, target = ids(prompt), ids(answer)
    rest = 12 - len(tokens) - len(target)
    assert data[0]["input_ids"].tolist() == tokens + target + [0] * rest
    assert data[0]["labels"].tolist() == [-100] * len(tokens) + target + [-100] * rest
    assert data[0]["attention_mask"].tolist() == [1] * (12 - rest) + [0] * rest
    assert data.prompts == ["Q: what is gold? A:", "Q: what is lead? A:"]
    assert (data.labels, data.ids, data.truncated) == ([1, 0], ["q1", "q2"], 0)


def test_what_follows_the_answer_is_taught_with_it_and_the_end_only_once() -> None:
    data = tokenise_qa(QA, word_tokenizer(), 8, template="{question}{answer}: </s>")
    assert data[1]["input_ids"].tolist() == ids("what is lead ? Pb : </s> [PAD]")
    assert data[1]["labels"].tolist() == [-100] * 4 + ids("Pb : </s>") + [-100]


def test_braces_in_a_question_are_text() -> None:
    data = QADataset(["{answer} {0} {question}"], [["{question}"]], [0], classes=("x",))
    assert tokenise_qa(data, word_tokenizer(), 40).prompts == ["Question: {answer} {0} {question}\nAnswer:"]


def test_a_space_before_the_answer_goes_with_it() -> None:
    class Letters:
        """A tokenizer of letters, to see spaces."""

        pad_token_id, eos_token_id = 0, None

        def __call__(self, texts: list[str], **options: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    item = tokenise_qa(QADataset(["q"], [["yes"]], [0], classes=("x",)), Letters(), 30)[0]
    taught = [chr(token) for token in item["labels"].tolist() if token != -100]
    assert "".join(taught) == " yes"
    assert "".join(map(chr, item["input_ids"][: item["attention_mask"].sum()])) == "Question: q\nAnswer: yes"


def test_an_item_that_does_not_fit() -> None:
    tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match=r"max_length: got 5, which 2 of 2 items .*at least 6.*truncate=True"):
        tokenise_qa(QA, tokenizer, 5, template="{question} {answer}")
    data = tokenise_qa(QA, tokenizer, 5, template="{question} {answer}", truncate=True)
    assert data[0]["input_ids"].tolist() == ids("is gold ? Au </s>")
    assert data[0]["labels"].tolist() == [-100] * 3 + ids("Au </s>")
    assert data.truncated == 2
    with pytest.raises(ValueError, match="max_length: got 1, which 2 of 2 answers do not fit; expected at least 2"):
        tokenise_qa(QA, tokenizer, 1, template="{question} {answer}", truncate=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question}", "0 times {answer}"),
        ("{answer}", "0 times {question}"),
        ("{question} {answer} {answer}", "2 times {answer}"),
        ("{answer} {question}", "expected {question} before {answer}"),
    ],
)
def test_a_template_without_its_fields(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"template: got .*{message}"):
        tokenise_qa(QA, word_tokenizer(), 9, template=template)


def test_a_tokenizer_that_reads_a_text_otherwise_with_special_tokens() -> None:
    class Odd:
        pad_token_id = eos_token_id = 0

        def __call__(
            self, texts: list[str], *, add_special_tokens: bool, **options: object
        ) -> dict[str, list[list[int]]]:
            return {"input_ids": [[1 + add_special_tokens] * 3 for _ in texts]}

    with pytest.raises(ValueError, match="tokenizer: got other tokens for"):
        tokenise_qa(QA, Odd(), 9)


def test_token_dataset_of_something_else() -> None:
    two = torch.ones(2, 3, dtype=torch.int64)
    for arguments, options, message in [
        ((two[0], two[0], [0], ["a"]), {"texts": ["x"]}, r"input_ids: got shape \(3,\)"),
        ((two, two[:1], [0, 0], ["a"]), {"texts": ["x", "y"]}, r"attention_mask: got shape \(1, 3\)"),
        ((two, two, [0, 0], ["a"]), {"texts": ["x", "y"], "targets": two[:, :2]}, r"targets: got shape \(2, 2\)"),
        ((two, two, [0, 0], ["a"]), {"texts": ["x"]}, "texts: got 1"),
        ((two, two, [0, 0], ["a"]), {"texts": ["x", "y"], "prompts": ["x"]}, "prompts: got 1"),
        ((two, two, [0, 1], ["a"]), {"texts": ["x", "y"]}, "labels: got 1 at position 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            TokenDataset(*arguments, **options)


def test_importing_the_data_section_imports_no_reader() -> None:
    code = (
        "import rfa_fast.data, sys; print([m for m in ('sklearn', 'yaml', 'PIL', 'transformers') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    baseline = "import torch, sys; print([m for m in ('sklearn', 'yaml', 'PIL', 'transformers') if m in sys.modules])"
    assert (
        printed == subprocess.run([sys.executable, "-c", baseline], capture_output=True, text=True, check=True).stdout
    )
    assert load("digits").kind == "image"
