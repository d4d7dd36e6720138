"""What the commands make of texts, ids and prompts, on models of a few thousand weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import place, run
from torch import nn

from rfa_fast.commands.inputs import ForgetRequest, Prepared, prepare
from rfa_fast.commands.measure import Measuring
from rfa_fast.commands.texts import tokens_of
from rfa_fast.data import DataBundle, QADataset, TextDataset, load
from rfa_fast.models import OpenedModel, open_model

__all__ = ["place"]

WORDS = ("[PAD]", "[UNK]", "[EOS]", "Question", "Answer", ":", "who", "what", "gold", "iron", "is")


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=512
    )


def llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=32, eos_token_id=2, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def roberta(folder: Path, padding: int) -> Path:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(1)
    config = RobertaConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12, num_labels=2, pad_token_id=padding,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def notes(path: Path, count: int = 8, words: int = 3) -> Path:
    """A .jsonl with two classes, a text per line."""
    lines = [json.dumps({"text": " ".join(["gold"] * words), "label": "ab"[i % 2]}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def quiz(name: str, questions: list[str], answers: list[str]) -> DataBundle:
    classes, labels = ("x", "y"), [i % 2 for i in range(len(questions))]
    train, test = (QADataset(questions, answers, labels, classes) for _ in range(2))
    return DataBundle(name, train, test, classes, "text", "", "")


def prepared(data: DataBundle, folder: Path, max_length: int) -> Prepared:
    return prepare(data, ForgetRequest("x"), open_model(folder), max_length=max_length, channels=None)


def test_questions_are_cut_and_counted_and_answers_never(place: Path) -> None:
    # "Question: … Answer:" is 4 tokens beside the question; an answer ends with [EOS].
    data = quiz("quiz", ["who " * 9, "who", "what", "what"], ["gold", "gold iron", "iron", "iron"])
    folder = llama(place / "llama")
    shown = prepared(data, folder, 8)
    assert shown.notes == [
        f"1 of 4 {side} questions cut at the beginning, to fit with their answers into 8 tokens"
        for side in ("training", "test")
    ]
    item = shown.subsets["D_f"][0]
    assert item["labels"].tolist() == [-100] * 6 + [WORDS.index("gold"), WORDS.index("[EOS]")]
    assert item["input_ids"].tolist()[:4] == [WORDS.index("who")] * 4
    said = "--max-length: got 2, which 1 of 4 answers do not fit; expected at least 3, the length of 'who'"
    with pytest.raises(ValueError, match=f"^{said}$"):
        prepared(data, folder, 2)


def test_long_answers_are_learnt_as_one_text_with_their_questions(place: Path) -> None:
    data = quiz("eli5-category", ["who " * 9, "what", "who", "what"], ["gold " * 50, "iron " * 40, "gold", "gold"])
    shown = prepared(data, llama(place / "llama"), 8)
    assert shown.notes == [
        note
        for side in ("training", "test")
        for note in (
            f"2 of 4 {side} texts cut to 8 tokens",
            f"1 {side} questions fill that without their answers; --max-length sets it",
        )
    ]
    whole = shown.subsets["D_rt"][0]  # the second of all
    assert whole["labels"].tolist() == [WORDS.index("what"), *[WORDS.index("iron")] * 7]


@pytest.mark.parametrize("padding", [0, 1])
def test_the_longest_text_is_what_a_model_has_places_for(padding: int, place: Path) -> None:
    folder = roberta(place / "roberta", padding)
    words = ["evaluate", str(folder), "--data", str(notes(place / "n.jsonl", words=20)), "--forget-class", "a",
             "--no-progress", "--max-length"]  # fmt: skip
    most = 12 - padding - 1
    refused = run(*words, str(most + 1), code=2)
    assert f"--max-length: got {most + 1}, expected at most {most}, what {folder} takes" in refused.stderr
    run(*words, str(most))


class Short(nn.Module):
    """Takes up to four tokens, and says so nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        if int(attention_mask.sum(1).max()) > 4:
            raise RuntimeError("no place for it")
        return self.head(input_ids[:, :1].float())


def test_the_longest_text_is_tried_before_anything_is_measured() -> None:
    train = TextDataset(["gold", "gold", "iron", "iron " * 3], [0, 1, 0, 1], ("x", "y"))
    opened = OpenedModel(Short(), "short", "factory", "unknown", tokenizer=tokenizer())
    for test, long in (("gold", False), ("gold " * 9, True)):
        texts = TextDataset([test, "iron"], [0, 1], ("x", "y"))
        data = DataBundle("words", train, texts, ("x", "y"), "text", "", "")
        if not long:
            assert len(prepare(data, ForgetRequest("x"), opened, max_length=8, channels=None).subsets["D_f"]) == 2
            continue
        with pytest.raises(ValueError, match=r"short: cannot take a sample of words \(no place for it\); .*max-length"):
            prepare(data, ForgetRequest("x"), opened, max_length=8, channels=None)


def test_a_text_without_tokenizer_names_the_option() -> None:
    with pytest.raises(ValueError, match="short: got texts but no tokenizer, expected --tokenizer FOLDER"):
        tokens_of(TextDataset(["a"], [0], ("x",)), OpenedModel(Short(), "short", "factory", "unknown"), 4, "words")


@pytest.mark.parametrize("command", ["evaluate", "unlearn"])
def test_a_prompt_without_a_token_is_refused_before_anything_is_measured(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Measuring, "__call__", lambda *_: pytest.fail("measured"))
    folder = str(llama(place / "llama"))
    words = ["--data", str(notes(place / "n.jsonl")), "--forget-class", "a", "--max-length", "8", "--no-progress"]
    words += ["--retrained", folder, "--prompt", "gold is", "--prompt", ""]
    refused = run(command, folder, *words, code=2)
    assert "--prompt: got '' with no token in it, expected a text to go on from" in refused.stderr


def test_ids_of_held_out_samples_are_told_from_unknown_ones(place: Path) -> None:
    data = load(notes(place / "n.jsonl", count=20))
    held = [str(name) for name in data.test.ids]

    def refusal(bundle: DataBundle, *names: str) -> str:
        (place / "ids.txt").write_text("\n".join(names))
        with pytest.raises(ValueError, match="--forget-ids") as refused:
            ForgetRequest(forget_ids=Path("ids.txt")).make(bundle)
        return str(refused.value)

    some = ", ".join(str(name) for name in data.train.ids[:3])
    assert refusal(data, *held, "99", str(data.train.ids[0])) == (
        f"--forget-ids: ids.txt: {len(held) + 1} of {len(held) + 2} are no training sample of n, the first is "
        f"{held[0]!r} ({len(held)} are in the test set, which is held out of the training: name a test set of its own "
        f"with --data-option test=FILE); expected ids such as {some}"
    )
    assert refusal(data, "99") == (
        f"--forget-ids: ids.txt: 1 of 1 are no training sample of n, the first is '99'; expected ids such as {some}"
    )
    named = DataBundle("set", data.train, data.test, data.classes, "text", "/usr/share/set", "")
    assert "held out of the training: leave them out); expected" in refusal(named, held[0])


def test_a_file_of_ids_may_begin_with_a_byte_order_mark_and_has_to_be_utf_8(place: Path) -> None:
    data = load(notes(place / "n.jsonl", count=20))
    name = str(data.train.ids[1])
    (place / "ids.txt").write_text(f"{name}\n", encoding="utf-8-sig")
    assert ForgetRequest(forget_ids=Path("ids.txt")).make(data).forget == (1,)
    (place / "ids.txt").write_text(f"{name}\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"ids\.txt, line 1: got the byte 0xff that is not UTF-8, expected UTF-8"):
        ForgetRequest(forget_ids=Path("ids.txt")).make(data)


@pytest.mark.parametrize("command", ["info", "bench"])
def test_a_model_has_at_least_one_class(command: str) -> None:
    for number in ("-1", "0"):
        refused = run(command, "torchvision:resnet18", "--classes", number, code=2)
        assert "Invalid value for '--classes': " in refused.stderr


def test_a_split_of_other_samples_is_refused(tmp_path: Path) -> None:
    """Two lines on top, another draw of the test set, or another label: the indices mean other samples."""
    lines = [json.dumps({"text": f"text {i}", "label": i % 2}) for i in range(20)]
    file, moved, relabelled = (tmp_path / f"{name}.jsonl" for name in ("data", "moved", "relabelled"))
    file.write_text("\n".join(lines))
    moved.write_text("\n".join([json.dumps({"text": f"new {i}", "label": i}) for i in range(2)] + lines))
    relabelled.write_text("\n".join([json.dumps({"text": "text 0", "label": 1}), *lines[1:]]))
    split = ForgetRequest(forget_samples=3).make(load(file))
    split.save(tmp_path / "split.json")
    request = ForgetRequest(split=tmp_path / "split.json")
    again = request.make(load(file))
    assert (again, again.data) == (split, split.data)
    renumbered = replace(load(file), classes=("1", "0"))  # the model's order
    for part in (renumbered.train, renumbered.test):
        part.labels = [1 - label for label in part.labels]
    assert request.make(renumbered) == split
    named = load(file, classes=["Ham", "Spam"])
    assert named.digest() == replace(named, classes=("ham", "SPAM")).digest() != load(file).digest()
    for other in (load(moved), load(relabelled), load(file, seed=5)):
        with pytest.raises(ValueError, match=r"--split: .*split\.json was made of other samples than those of"):
            request.make(other)
    replace(split, data=None).save(tmp_path / "old.json")
    assert ForgetRequest(split=tmp_path / "old.json").make(load(moved)) == split
