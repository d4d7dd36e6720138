"""Splits: the right subsets, the same in every process, and a clear word where there is none."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfa_fast.data import (
    ImageDataset,
    Split,
    split_by_class,
    split_by_keyword,
    split_by_sample,
    stratified_split,
    validation_split,
)

labels = st.lists(st.integers(0, 3), min_size=2, max_size=30)


@settings(deadline=None)
@given(train=labels, test=labels, target=st.integers(0, 3))
def test_class_split_is_what_the_labels_say(train: list[int], test: list[int], target: int) -> None:
    possible = all(target in part and set(part) != {target} for part in (train, test))
    if not possible:
        with pytest.raises(ValueError, match=r"target: got class|got no index"):
            split_by_class(train, test, target)
        return
    split = split_by_class(train, torch.tensor(test), target)
    assert split.forget == tuple(i for i, label in enumerate(train) if label == target)
    assert split.forget_test == tuple(i for i, label in enumerate(test) if label == target)
    assert sorted(split.retain + split.forget) == list(range(len(train)))
    assert sorted(split.retain_test + split.forget_test) == list(range(len(test)))
    assert (split.scenario, split.target, split.seed) == ("class", str(target), 0)


@pytest.mark.parametrize("target", [2, "2", "bird"])
def test_class_by_index_digits_or_name(target: int | str) -> None:
    split = split_by_class([0, 1, 2, 2], [2, 0], target, classes=("cat", "dog", "bird"))
    assert split.forget == (2, 3)
    assert split.target == "bird"


def test_a_class_called_by_a_number_is_meant_by_its_name() -> None:
    assert split_by_class([0, 1], [0, 1], "0", classes=("1", "0")).forget == (1,)
    assert split_by_class([0, 1], [0, 1], 0, classes=("1", "0")).forget == (0,)


@pytest.mark.parametrize("target", [7, -1, "7", "fish", "1"])
def test_unknown_class_lists_the_known_ones(target: int | str) -> None:
    # Index 1 is named but no training sample has it.
    with pytest.raises(ValueError, match=rf"target: got class {target!r}, expected .*0 \(cat\), 2 \(bird\)"):
        split_by_class([0, 2], [0, 2], target, classes=("cat", "dog", "bird"))


@pytest.mark.parametrize(
    ("train", "test", "subset"),
    [([1, 1], [0, 1], "retain"), ([0, 1], [1], "retain_test"), ([0, 1], [0], "forget_test"), ([0, 1], [], "_test")],
)
def test_an_empty_subset_is_named(train: list[int], test: list[int], subset: str) -> None:
    with pytest.raises(ValueError, match=rf"{subset}: got no index for class '1'"):
        split_by_class(train, test, 1)


@pytest.mark.parametrize("bad", [[0, 1.0], [0, True], ["0", 1], [0, None]])
def test_labels_have_to_be_integers(bad: list[object]) -> None:
    with pytest.raises(TypeError, match="train_labels: got .*expected an integer"):
        split_by_class(bad, [0, 1], 0)  # type: ignore[arg-type]


@settings(deadline=None)
@given(n=st.integers(2, 60), data=st.data(), seed=st.integers(-5, 2**40))
def test_sample_split_takes_count_and_keeps_the_test_set(n: int, data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(1, n - 1))
    split = split_by_sample(n, 7, count, seed)
    assert len(split.forget) == count
    assert sorted(split.retain + split.forget) == list(range(n))
    assert (split.retain_test, split.forget_test) == (tuple(range(7)), ())
    assert split == split_by_sample(n, 7, count, seed)


def test_sample_split_draws_each_sample_alike() -> None:
    drawn = torch.zeros(20)
    for seed in range(400):
        drawn[list(split_by_sample(20, 5, 5, seed).forget)] += 1
    # 100 expected of each, with a standard deviation of 8.7.
    assert 60 < drawn.min() < 100 < drawn.max() < 140


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 5, 10), "count: got 10, expected fewer than the 10"),
        ((10, 5, 0), "count: got 0, expected an integer >= 1"),
        ((0, 5, 1), "count: got 1, expected fewer than the 0"),
        ((10, 0, 1), "retain_test: got no index"),
        ((-1, 5, 1), "n_train: got -1"),
    ],
)
def test_sample_split_of_too_few(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_by_sample(*arguments)


@pytest.mark.parametrize(
    ("keyword", "forget"),
    [
        ("horror", (0, 1, 5)),
        ("HORROR", (0, 1, 5)),
        ("slow burn", (2, 3)),
        ("c++", (4,)),
        ("café", (6,)),
    ],
)
def test_keyword_is_a_whole_word_in_either_case(keyword: str, forget: tuple[int, ...]) -> None:
    texts = ["Pure horror.", "(Horror) film", "a slow\n burn", "Slow  Burn", "I like C++!", "horror", "CAFÉ noir"]
    texts += ["horrors", "nonhorror", "slowburn", "c+", "cafés", "horror_film"]
    split = split_by_keyword(texts, [*texts, "fun"], keyword)
    assert split.forget == forget
    assert split.forget_test == forget
    assert len(split.retain_test) == len(texts) + 1 - len(forget)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (["apples", "pineapple", "pear"], ["apple", "x"], r"none of the 3 training texts .*\(2 have it inside"),
        (["apple", "x"], ["pear", "y"], r"none of the 2 test texts .*\(0 have it inside"),
        (["apple", "an apple"], ["apple", "x"], "retain: got no index"),
    ],
)
def test_keyword_that_splits_nothing(train: list[str], test: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_by_keyword(train, test, "apple")


@pytest.mark.parametrize("keyword", ["", "  ", None])
def test_keyword_has_to_be_a_word(keyword: str) -> None:
    with pytest.raises(ValueError, match="keyword: got"):
        split_by_keyword(["a"], ["a"], keyword)


def test_digest_is_the_hash_of_the_content() -> None:
    split = Split("class", "1", (0, 2), (1,), (0,), (1,), 3)
    content = (
        '{"forget":[1],"forget_test":[1],"retain":[0,2],"retain_test":[0],"scenario":"class","seed":3,"target":"1"}'
    )
    assert split.digest() == hashlib.sha256(content.encode()).hexdigest()


def test_splits_are_the_same_in_another_process() -> None:
    code = (
        "from rfa_fast.data import split_by_sample, stratified_split\n"
        "print(split_by_sample(1000, 10, 64, seed=5).digest(), stratified_split([0, 1, 2] * 9, 0.3, seed=5)[1])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    here = f"{split_by_sample(1000, 10, 64, seed=5).digest()} {stratified_split([0, 1, 2] * 9, 0.3, seed=5)[1]}"
    assert printed == here


def test_every_part_of_a_split_is_in_its_digest() -> None:
    base: dict[str, object] = {
        "scenario": "class", "target": "1", "retain": (0, 2), "forget": (1,), "retain_test": (0,), "forget_test": (1,),
    }  # fmt: skip
    changes = [
        {"scenario": "keyword"}, {"target": "2"}, {"retain": (0,)}, {"forget": (1, 3)}, {"retain_test": (0, 4)},
        {"forget_test": (2,)}, {"seed": 1},
    ]  # fmt: skip
    digests = {Split(**{**base, **change}).digest() for change in [{}, *changes]}  # type: ignore[arg-type]
    assert len(digests) == len(changes) + 1


def test_save_and_load(tmp_path) -> None:
    split = split_by_sample(20, 5, 3, seed=9)
    file = tmp_path / "split.json"
    split.save(file)
    split.save(file)
    assert Split.load(file) == split
    assert [path.name for path in tmp_path.iterdir()] == ["split.json"]


def test_save_keeps_another_split(tmp_path) -> None:
    file, other = tmp_path / "split.json", split_by_sample(20, 5, 4)
    split_by_sample(20, 5, 3).save(file)
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match="holds another split"):
        other.save(file)
    assert file.read_bytes() == before
    other.save(file, overwrite=True)
    assert Split.load(file) == other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forget": None}, "forget: got None, expected a list"),
        ({"forget": [0, "x"]}, "forget: got 'x', expected an integer"),
        ({"forget": [-1]}, "forget: got -1"),
        ({"forget": [3, 3]}, "forget: got index 3 twice"),
        ({"retain": [3, 4]}, "retain, forget: got index 3 in both"),
        ({"scenario": "topic"}, "scenario: got 'topic', expected one of class, sample, keyword"),
        ({"target": 1}, "target: got 1, expected a string"),
        ({"forget": [4]}, "digest.*it was edited"),
        ({"format": "rfa-fast split 9"}, "got format 'rfa-fast split 9'"),
    ],
)
def test_load_refuses_what_was_changed(tmp_path, change: dict[str, object], message: str) -> None:
    file = tmp_path / "split.json"
    Split("class", "1", (0, 1), (3,), (0,), (1,)).save(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        Split.load(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("field", ["digest", "forget", "seed"])
def test_load_names_a_missing_field(tmp_path, field: str) -> None:
    file = tmp_path / "split.json"
    Split("class", "1", (0, 1), (3,), (0,), (1,)).save(file)
    values = json.loads(file.read_text())
    del values[field]
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"no field '{field}'"):
        Split.load(file)


@pytest.mark.parametrize("content", [b"", b'{"format": "rfa-fa', b"[1]", b"\xff\xfe\x00"])
def test_load_refuses_another_file(tmp_path, content: bytes) -> None:
    file = tmp_path / "split.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"split\.json: got"):
        Split.load(file)
    with pytest.raises(FileNotFoundError):
        Split.load(tmp_path / "nothing.json")


def test_apply_gives_the_subsets_of_the_data() -> None:
    data = ImageDataset(torch.arange(6.0).reshape(6, 1, 1, 1), [0, 1, 2, 0, 1, 2], classes=("a", "b", "c"))
    parts = split_by_class(data.labels, data.labels, 1).apply(data, data)
    assert list(parts) == ["retain", "forget", "retain_test", "forget_test"]
    assert [parts["forget"][i][0].item() for i in range(2)] == [1.0, 4.0]
    assert [parts["retain_test"][i][1] for i in range(4)] == [0, 2, 0, 2]
    assert list(split_by_sample(6, 6, 2).apply(data, data)) == ["retain", "forget", "retain_test"]


def test_apply_refuses_other_data() -> None:
    data = ImageDataset(torch.zeros(6, 1, 1, 1), [0] * 6, classes=("a",))
    with pytest.raises(ValueError, match="test: got a dataset of 6 samples, expected more than 6.*retain_test"):
        split_by_sample(6, 7, 2).apply(data, data)


@settings(deadline=None)
@given(
    chosen=st.lists(st.integers(0, 500), min_size=2, max_size=60, unique=True),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 100),
)
def test_validation_split_divides_the_indices(chosen: list[int], fraction: float, seed: int) -> None:
    kept, validation = validation_split(chosen, fraction, seed)
    assert sorted(kept + validation) == sorted(chosen)
    assert kept
    assert validation
    assert abs(len(validation) - fraction * len(chosen)) <= 1
    assert (kept, validation) == validation_split(chosen, fraction, seed)


@pytest.mark.parametrize(
    ("indices", "fraction", "message"),
    [
        ([1], 0.5, "indices: got 1 distinct of 1"),
        ([1, 1, 2], 0.5, "indices: got 2 distinct of 3"),
        ([1, 2], 0, "fraction: got 0,"),
        ([1, 2], 1.0, "fraction: got 1.0"),
        ([1, 2], float("nan"), "fraction: got nan"),
        ([1, 2], "half", "fraction: got 'half'"),
    ],
)
def test_validation_split_of_nothing(indices: list[int], fraction: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validation_split(indices, fraction)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(2, 20), min_size=1, max_size=5), fraction=st.floats(0.05, 0.95))
def test_stratified_split_takes_the_same_share_of_each_class(sizes: list[int], fraction: float) -> None:
    classes = [label for label, size in enumerate(sizes) for _ in range(size)]
    train, test = stratified_split(classes, fraction, seed=1)
    assert sorted(train + test) == list(range(len(classes)))
    for label, size in enumerate(sizes):
        taken = sum(classes[i] == label for i in test)
        assert 1 <= taken <= size - 1
        assert abs(taken - fraction * size) <= 1


def test_stratified_split_of_a_class_with_one_sample() -> None:
    with pytest.raises(ValueError, match="got one sample of class 2"):
        stratified_split([0, 0, 2], 0.5)


def test_subsets_have_the_papers_names() -> None:
    data = ImageDataset(torch.zeros(4, 1, 1, 1), [0, 1, 1, 0], ("a", "b"))
    by_class = split_by_class(data.labels, data.labels, 1).named(data, data)
    assert {name: list(part.indices) for name, part in by_class.items()} == {
        "D_r": [0, 3], "D_f": [1, 2], "D_rt": [0, 3], "D_ft": [1, 2]
    }  # fmt: skip
    by_sample = split_by_sample(4, 4, count=1).named(data, data)
    assert list(by_sample) == ["D_r", "D_f", "D_t"]
    assert list(by_sample["D_t"].indices) == [0, 1, 2, 3]


def test_methods_that_share_a_file_share_the_split(tmp_path) -> None:
    split = split_by_sample(10, 5, count=2, seed=0)
    file = tmp_path / "run" / "splits" / "sample.json"
    for _ in range(2):
        split.save(file)
    assert Split.load(file) == split
    with pytest.raises(FileExistsError, match="holds another split"):
        split_by_sample(10, 5, count=2, seed=1).save(file)
    assert Split.load(file).digest() == split.digest()


def test_a_split_saved_by_several_processes_is_written_once_and_leaves_nothing_behind(tmp_path, monkeypatch) -> None:
    file, split = tmp_path / "split.json", split_by_sample(10, 5, count=2, seed=0)
    split.save(file)
    monkeypatch.setattr("os.replace", lambda *names: pytest.fail("written again"))
    split.save(file)
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(FileExistsError, match="another split"):
        split_by_sample(10, 5, count=3, seed=0).save(file)


def test_a_split_knows_the_data_that_it_is_of(tmp_path) -> None:
    labels = [0, 1, 1, 0]
    plain, known = (replace(split_by_class(labels, labels, 1), data=data) for data in (None, "abc"))
    assert plain == known
    assert plain.digest() == known.digest()
    plain.save(tmp_path / "plain.json")
    assert "data" not in json.loads((tmp_path / "plain.json").read_text())
    known.save(tmp_path / "plain.json")  # a file of before stays as it is
    assert Split.load(tmp_path / "plain.json").data is None
    known.save(tmp_path / "known.json")
    assert Split.load(tmp_path / "known.json").data == "abc"
    with pytest.raises(FileExistsError, match="another split"):
        replace(known, data="def").save(tmp_path / "known.json")
    with pytest.raises(TypeError, match="data: got 3"):
        replace(known, data=3)
