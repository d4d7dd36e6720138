"""CIFAR-10, IMDB, ELI5-Category and WMDP on small files of their published formats."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rfa_fast.data import (
    available,
    ids_of,
    load,
    load_cifar_10,
    load_eli5_category,
    load_imdb,
    load_wmdp,
    load_wmdp_corpora,
    resized,
)
from rfa_fast.data.cifar import CIFAR_CLASSES
from rfa_fast.data.eli5 import ELI5_TOPICS, even_shares
from rfa_fast.data.resize import Resize

NAMES = ("cifar-10", "imdb", "eli5-category", "wmdp", "wmdp-corpora")


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's local cache, with nothing in it, and no folder of the user's own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("RFA_FAST_DATA", raising=False)
    return tmp_path / "hub"


def cached(cache: Path, repository: str) -> Path:
    """The folder of a data set's files in the hub's cache, as a download leaves it."""
    place = cache / f"datasets--{repository.replace('/', '--')}"
    revision = "0123456789" * 4
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(revision)
    (place / "snapshots" / revision).mkdir(parents=True)
    return place / "snapshots" / revision


def write_lines(file: Path, rows: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_says_what_to_fetch_and_where_to_put_it(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    info = {info.name: info for info in available()}[name]
    assert info.found is None
    assert info.get.startswith(("curl -L", "hf download"))
    with pytest.raises(FileNotFoundError) as caught:
        load(name)
    message = str(caught.value)
    assert message.startswith(f"{name}: not found; looked in ")
    assert f"Get it with `{info.get}`, or put " in message
    assert message.endswith(f"into $RFA_FAST_DATA/{name} (RFA_FAST_DATA: a folder of your choice; it is not set)")
    monkeypatch.setenv("RFA_FAST_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"looked in {tmp_path}/{name}.*RFA_FAST_DATA/{name}$"):
        load(name)
    (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/{name}/.* does not exist. Get it with `{info.get[:8]}"):
        load(name)


@pytest.fixture
def cifar(tmp_path: Path) -> dict[str, Any]:
    """A folder in the binary format: two images in each of six files."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    files = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    pixels, labels = rng.integers(0, 256, (6, 2, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, (6, 2))
    for file, images, its in zip(files, pixels, labels, strict=True):
        content = b"".join(bytes([y]) + x.tobytes() for x, y in zip(images, its.tolist(), strict=True))
        (folder / file).write_bytes(content)
    return {"folder": folder, "pixels": pixels, "labels": labels.reshape(-1).tolist()}


def test_cifar_10_is_read_as_it_was_written(cifar: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_cifar_10(cifar["folder"], normalise="none")
    train = cifar["pixels"][:5].reshape(10, 3, 32, 32)
    assert torch.equal(data.train.images, torch.from_numpy(train.astype(np.float32) / 255))
    assert torch.equal(data.test.images, torch.from_numpy(cifar["pixels"][5].astype(np.float32) / 255))
    assert data.train.labels + data.test.labels == cifar["labels"]
    assert (data.classes, data.kind) == (CIFAR_CLASSES, "image")
    assert ids_of(data.train)[2] == "data_batch_2/0"
    assert ids_of(data.test) == ["test_batch/0", "test_batch/1"]
    monkeypatch.setenv("RFA_FAST_DATA", str(cifar["folder"].parent))
    normalised = load("cifar-10", pad_to=32, channels=3)
    assert normalised.source == str(cifar["folder"])
    truth = torch.from_numpy(train / 255)
    mean, std = truth.mean(dim=(0, 2, 3)), truth.std(dim=(0, 2, 3), correction=0)
    expected = (truth - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(normalised.train.images.double(), expected, rtol=0, atol=2e-6)
    cifar["folder"].rename(cifar["folder"].parent / "mine")
    (cifar["folder"].parent / "cifar-10").mkdir()
    (cifar["folder"].parent / "mine").rename(cifar["folder"].parent / "cifar-10" / "cifar-10-batches-bin")
    assert load("cifar-10").train.labels == data.train.labels


def test_the_pickled_cifar_10_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("batches.meta", "data_batch_1", "test_batch"):
        # A pickle that would write a file: os.system("touch …").
        (folder / name).write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "was-run").encode() + b"'\ntR.")
    monkeypatch.setenv("RFA_FAST_DATA", str(tmp_path))
    for root in (folder, tmp_path, None):
        with pytest.raises(
            ValueError, match=r"are pickles, which run code.*`curl -L .*cifar-10-binary\.tar\.gz \| tar"
        ):
            load_cifar_10(root)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("data_batch_3.bin", bytes(3072), "got 3072 bytes, expected a multiple of 3073"),
        ("test_batch.bin", b"", "got 0 bytes, expected a multiple of 3073"),
        ("data_batch_1.bin", bytes([10]) + bytes(3072), "labels: got 10 at position 0, expected 0 to 9"),
    ],
    ids=["cut-short", "empty", "no-class"],
)
def test_a_damaged_cifar_10_is_named(cifar: dict[str, Any], file: str, content: bytes, message: str) -> None:
    (cifar["folder"] / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file}: {message}"):
        load_cifar_10(cifar["folder"])
    (cifar["folder"] / file).unlink()
    (cifar["folder"] / "data_batch_2.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_[12]\.bin.* does not exist. Get it with `curl"):
        load_cifar_10(cifar["folder"])


def test_images_are_scaled_when_taken(cifar: dict[str, Any]) -> None:
    data = load_cifar_10(cifar["folder"])
    large = resized(data, 64)
    image, label = large.train[3]
    assert image.shape == (3, 64, 64)
    assert label == data.train.labels[3]
    assert large.train.images is data.train.images
    assert data.train[3][0].shape == (3, 32, 32)
    # A ramp stays one: pixel i of the large image lies at (i + 0.5) / 2 − 0.5 of the small one.
    ramp = torch.arange(4.0).expand(1, 4, 4)
    wide = Resize(8, before=lambda image: image + 1)(ramp)
    torch.testing.assert_close(wide[0, 3, 1:7], (torch.arange(1.0, 7.0) + 0.5) / 2 - 0.5 + 1)
    with pytest.raises(TypeError, match="expected ImageDataset"):
        resized(load_imdb(imdb_tree(cifar["folder"].parent)), 64)


def imdb_tree(root: Path) -> Path:
    reviews = {
        "train/neg/0_2": "Dull.<br /><br />A comedy?", "train/neg/1_1": "never again",
        "train/pos/10_9": "A fine comedy", "train/pos/2_10": "never again", "train/unsup/0_0": "who knows",
        "test/neg/0_3": "no", "test/pos/0_8": " yes\n", "test/pos/1_8": "A fine comedy",
    }  # fmt: skip
    for name, text in reviews.items():
        file = root / "aclImdb" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root / "aclImdb"


def test_imdb_from_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_imdb(imdb_tree(tmp_path))
    assert data.train.texts == ["Dull.\n\nA comedy?", "never again", "A fine comedy"]
    assert (data.train.labels, data.classes) == ([0, 0, 1], ("neg", "pos"))
    assert ids_of(data.train) == ["train/neg/0_2", "train/neg/1_1", "train/pos/10_9"]
    assert (data.test.texts, data.test.labels) == (["no", "yes"], [0, 1])
    assert data.notes == ("2 reviews left out as copies of others",)
    monkeypatch.setenv("RFA_FAST_DATA", str(tmp_path))
    assert load("imdb").train.texts == load_imdb(tmp_path).train.texts == data.train.texts
    (tmp_path / "aclImdb" / "test" / "neg" / "0_3.txt").write_text("<br />")
    with pytest.raises(ValueError, match=r"test/neg/0_3\.txt: got an empty review"):
        load("imdb")
    (tmp_path / "aclImdb" / "test" / "neg" / "0_3.txt").unlink()
    with pytest.raises(ValueError, match=r"test/neg: got no review"):
        load("imdb")
    (tmp_path / "aclImdb" / "test" / "neg").rmdir()
    with pytest.raises(FileNotFoundError, match=r"test/neg does not exist. Get it with `hf download stanfordnlp/imdb"):
        load("imdb")


def test_imdb_from_rows(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [{"text": "bad", "label": 0}, {"text": "good<br>so good", "label": 1}])
    write_lines(tmp_path / "test.jsonl", [{"text": "bad", "label": 0}, {"text": "fair", "label": 1}])
    write_lines(tmp_path / "unsupervised.jsonl", [{"text": "?", "label": -1}])
    data = load_imdb(tmp_path)
    assert (data.train.texts, data.train.labels) == (["bad", "good\nso good"], [0, 1])
    assert (data.test.texts, ids_of(data.test)) == (["fair"], ["test/1"])
    write_lines(tmp_path / "train.jsonl", [{"text": "bad", "label": -1}])
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: label: got -1, expected an integer from 0 to 1"):
        load_imdb(tmp_path)
    write_lines(tmp_path / "train.jsonl", [{"text": "fair", "label": 0}, {"text": "bad", "label": 0}])
    with pytest.raises(ValueError, match="got no review in test that is not in train"):
        load_imdb(tmp_path)


def question(name: str, category: str, answers: dict[str, int], **more: Any) -> dict[str, Any]:
    """A row of ELI5-Category; `answers` are texts with their scores."""
    its = {"a_id": [f"{name}{i}" for i in range(len(answers))], "text": list(answers), "score": list(answers.values()),
           "text_urls": [[] for _ in answers]}  # fmt: skip
    row = {"q_id": name, "title": f"Why {name}?", "selftext": "", "category": category, "subreddit": "x",
           "answers": its, "title_urls": [], "selftext_urls": []}  # fmt: skip
    return {**row, **more}


@pytest.fixture
def eli5(tmp_path: Path) -> Path:
    """Its four files, gzipped JSON lists, with 4 to 7 questions in each of the ten topics, and more."""
    parts: dict[str, list[Any]] = {"train": [], "validation-1": [], "validation-2": [], "test": []}
    for i, topic in enumerate(ELI5_TOPICS):
        part = {"Culture": "validation-1", "Engineering": "test"}.get(topic, "train")
        parts[part] += [question(f"{i}-{k}", topic, {f"low {k}": 1, f"high {k}": 5, " ": 9}) for k in range(4 + i % 4)]
    parts["train"] += [
        question("told", "Physics", {"a": 1}, selftext=" I mean it. "),
        question("gone", "Physics", {"a": 1}, selftext="[removed]"),
        question("silent", "Physics", {}), question("o", "Other", {"a": 1}),
    ]  # fmt: skip
    parts["validation-2"] += [question("r", "Repost", {"a": 1}), question("0-0", "Repost", {"a": 1})]
    folder = tmp_path / "eli5-category"
    folder.mkdir()
    for part, rows in parts.items():
        (folder / f"eli5-category-{part}.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    return folder


def test_eli5_category_takes_all_four_files_and_the_best_answer(eli5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_eli5_category(eli5, samples=None, test_fraction=0.25)
    assert data.classes == ELI5_TOPICS
    both = {
        name: (q, answers, topic)
        for part in (data.train, data.test)
        for name, q, answers, topic in zip(ids_of(part), part.questions, part.answers, part.topics, strict=True)
    }
    assert len(both) == sum(4 + i % 4 for i in range(10)) + 2
    assert both["2-3"] == ("Why 2-3?", ["high 3", "low 3"], "Culture")
    assert both["told"] == ("Why told?\n\nI mean it.", ["a"], "Physics")
    assert both["gone"][0] == "Why gone?"
    assert data.train.texts[0].endswith(f"? {data.train.answers[0][0]}")
    assert data.notes[1] == "1 questions without an answer and 1 that were read before left out"
    monkeypatch.setenv("RFA_FAST_DATA", str(eli5.parent))
    even = load("eli5-category", samples=30, seed=1)
    topics = even.train.topics + even.test.topics
    assert [topics.count(topic) for topic in ELI5_TOPICS] == [3] * 10
    assert ids_of(load("eli5-category", samples=30, seed=1).train) == ids_of(even.train)
    assert ids_of(load("eli5-category", samples=30, seed=2).train) != ids_of(even.train)


def test_eli5_category_unpacked_and_as_lines(eli5: Path) -> None:
    before = load_eli5_category(eli5)
    for file in eli5.glob("*.gz"):
        rows = json.loads(gzip.decompress(file.read_bytes()))
        file.unlink()
        if "train" in file.name:
            file.with_suffix("").write_text(json.dumps(rows, indent=1))
        else:
            write_lines(file.with_name(file.name.replace(".json.gz", ".jsonl")), rows)
    after = load_eli5_category(eli5)
    assert (after.train.texts, after.test.texts) == (before.train.texts, before.test.texts)
    assert len(after.train) + len(after.test) == 55


def test_shares_are_as_even_as_the_sizes_allow() -> None:
    sizes = [32769, 6633, 5446, 677, 5901, 5411, 1912, 10196, 338, 14034]
    shares = even_shares(sizes, 10_000)
    assert sum(shares) == 10_000
    assert (shares[3], shares[8]) == (677, 338)
    others = [share for i, share in enumerate(shares) if i not in (3, 8)]
    assert max(others) - min(others) <= 1
    assert even_shares([3, 3], 100) == [3, 3]


def test_a_damaged_or_incomplete_eli5_category(eli5: Path) -> None:
    (eli5 / "eli5-category-validation-1.json.gz").unlink()
    expected = (
        r"topics: got 'Culture', expected some of Biology.*; read eli5-category-train\.json\.gz, .*test\.json\.gz"
    )
    with pytest.raises(ValueError, match=expected):
        load_eli5_category(eli5)
    assert load_eli5_category(eli5, topics=["Biology", "Physics"], samples=4).classes == ("Biology", "Physics")
    with pytest.raises(ValueError, match="samples: got 3, expected an integer >= 4"):
        load_eli5_category(eli5, topics=["Biology", "Physics"], samples=3)
    file = eli5 / "eli5-category-train.json.gz"
    content = file.read_bytes()
    row = question("x", "Biology", {"a": 1})
    for change, message in (
        ({"title": " "}, "row 1: title: got '', expected a question"),
        ({"answers": {"text": ["a"], "score": []}}, "expected a score for each of the 1 texts"),
        ({"answers": ["a"]}, r"answers: got \['a'\], expected an object with 'text'"),
        ({"answers": {"text": [3], "score": [1]}}, "text: got .3., expected a list of strings"),
        ({"answers": {"text": ["a"]}}, "got fields text, expected 'score' among them"),
    ):
        file.write_bytes(gzip.compress(json.dumps([{**row, **change}]).encode()))
        with pytest.raises(ValueError, match=message):
            load_eli5_category(eli5)
    for damaged, message in (
        (content[:40], "a whole gzip file"),
        (gzip.compress(b'[{"q_id": '), "a JSON list of objects"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"train\.json\.gz: got .*expected {message}"):
            load_eli5_category(eli5)


def wmdp_rows(topic: str, n: int = 5) -> list[dict[str, Any]]:
    return [
        {"answer": i % 4, "question": f"{topic} {i}?", "choices": [f"{topic}{i}{letter}" for letter in "abcd"]}
        for i in range(n)
    ]


def test_wmdp(tmp_path: Path, empty_hub_cache: Path) -> None:
    folder = cached(empty_hub_cache, "cais/wmdp")
    for topic in ("bio", "chem"):
        write_lines(folder / f"wmdp-{topic}.jsonl", wmdp_rows(topic))
    (folder / "cyber_questions.json").write_text(json.dumps(wmdp_rows("cyber")))
    data = load("wmdp")
    assert data.source == str(folder)
    assert data.classes == ("bio", "chem", "cyber")
    assert (len(data.train), len(data.test)) == (12, 3)
    part = data.train if "chem/2" in ids_of(data.train) else data.test
    place = ids_of(part).index("chem/2")
    assert part.topics[place] == "chem"
    assert part.stems[place] == "chem 2?"
    assert part.questions[place] == "chem 2?\nA. chem2a\nB. chem2b\nC. chem2c\nD. chem2d"
    assert part.answers[place] == ["C. chem2c"]
    assert part.texts[place] == f"{part.questions[place]}\nAnswer: C. chem2c"
    assert (part.choices[place][part.correct[place]], part.correct[place]) == ("chem2c", 2)
    plain = load_wmdp(folder, topics=["cyber", "bio"], listed=False)
    assert plain.classes == ("cyber", "bio")
    assert re.fullmatch(r"cyber (\d)\? cyber\1[abcd]", plain.train.texts[0])


def test_a_damaged_wmdp(tmp_path: Path) -> None:
    good = wmdp_rows("bio", 1)[0]
    for change, message in (
        ({"answer": 4}, "line 1: answer: got 4, expected an integer from 0 to 3"),
        ({"answer": True}, "answer: got True"),
        ({"choices": ["a"]}, r"choices: got \['a'\], expected two or more"),
        ({"choices": ["a", " "]}, "none of them empty"),
        ({"question": None}, "question: got None, expected a string"),
    ):
        write_lines(tmp_path / "bio_questions.jsonl", [{**good, **change}])
        with pytest.raises(ValueError, match=message):
            load_wmdp(tmp_path, topics=["bio"])
    with pytest.raises(FileNotFoundError, match="wmdp-chem or chem_questions.json does not exist. Get it with `hf"):
        load_wmdp(tmp_path, topics=["chem"])
    with pytest.raises(ValueError, match="topics: got 'Chemistry', expected some of bio, chem, cyber"):
        load_wmdp(tmp_path, topics=["Chemistry"])


def test_wmdp_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "wmdp-corpora"
    papers = [{"title": "t", "abstract": "a", "text": f" paper {i}\u2028 ", "doi": "d"} for i in range(4)]
    write_lines(folder / "bio-forget-corpus.jsonl", papers)
    write_lines(folder / "cyber-retain-corpus.jsonl", [{"text": f"page {i}"} for i in range(5)] + [{"text": " "}])
    monkeypatch.setenv("RFA_FAST_DATA", str(tmp_path))
    data = load("wmdp-corpora", test_fraction=0.25)
    assert data.classes == ("bio-forget", "cyber-retain")
    assert data.notes == ("1 empty texts left out", "not there: bio-retain, cyber-forget")
    texts = dict(zip(ids_of(data.train) + ids_of(data.test), data.train.texts + data.test.texts, strict=True))
    assert texts["bio-forget/3"] == "paper 3"
    assert texts["cyber-retain/4"] == "page 4"
    assert len(texts) == 9
    few = load_wmdp_corpora(folder, corpora=["cyber-retain"], per_corpus=2, test_fraction=0.5)
    assert (len(few.train), len(few.test), few.classes) == (1, 1, ("cyber-retain",))
    with pytest.raises(FileNotFoundError, match=r"bio-retain-corpus\.jsonl does not exist.*on request"):
        load_wmdp_corpora(folder, corpora=["bio-retain"])
