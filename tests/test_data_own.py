"""The user's own files: what counts as a test set, which files and labels are taken, and what is said of the rest."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rfa_fast.data import ids_of, load, load_image_folder, load_npz, load_records
from rfa_fast.data.own import class_names


def images(root: Path, *names: str) -> Path:
    """Image files of 4 × 4 pixels below `root`."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name)
    return root


def pets(*folders: str, n: int = 5) -> list[str]:
    return [f"{folder}{name}/{i}.png" for folder in folders for name in ("cat", "dog") for i in range(n)]


def folder_data(root: Path, **options: Any) -> Any:
    return load_image_folder(root, size=4, normalise="none", **options)


def csv_of(labels: list[object], file: Path) -> Path:
    file.write_text("text,label\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(labels)))
    return file


HELD = "held out as the test set: what is to be forgotten among them is not shown to the method"


def test_a_share_that_is_held_out_is_noted(tmp_path: Path) -> None:
    file = csv_of([i % 2 for i in range(60)], tmp_path / "mail.csv")
    data = load(file)
    assert (len(data.train), len(data.test)) == (48, 12)
    assert data.notes == (f"12 of 60 records {HELD}; name a file as the test set with test= (--data-option test=FILE)",)
    assert load(file, test=file).notes == ()
    x, y = np.zeros((20, 5, 5), np.uint8), np.arange(20) % 2
    np.savez(tmp_path / "a.npz", x=x, y=y)
    note = f"4 of 20 images {HELD}; put a test set into the file as x_test and y_test"
    assert load(tmp_path / "a.npz").notes[1:] == (note,)
    np.savez(tmp_path / "a.npz", x=x, y=y, x_test=x, y_test=y)
    assert len(load(tmp_path / "a.npz").notes) == 1
    data = folder_data(images(tmp_path / "photos", *pets("")))
    assert data.notes[1:] == (f"2 of 10 images {HELD}; put a test set in a folder test beside train",)


@pytest.mark.parametrize(
    ("training", "testing"),
    [
        ("train", "test"),
        ("train", "valid"),
        ("Train", "Test"),
        ("training", "validation"),
        ("TRAIN", "testing"),
        ("train", "dev"),
        ("train", "Val"),
    ],
)
def test_folders_named_like_a_split(tmp_path: Path, training: str, testing: str) -> None:
    data = folder_data(images(tmp_path, *pets(f"{training}/"), *pets(f"{testing}/", n=1)))
    assert data.classes == ("cat", "dog")
    assert data.train.labels == [0] * 5 + [1] * 5
    assert ids_of(data.test) == [f"{testing}/cat/0.png", f"{testing}/dog/0.png"]
    assert len(data.notes) == 1


def test_train_alone_is_divided(tmp_path: Path) -> None:
    data = folder_data(images(tmp_path, *pets("Train/")), test_fraction=0.4)
    assert data.classes == ("cat", "dog")
    assert sorted(data.test.labels) == [0, 0, 1, 1]
    assert all(name.startswith("Train/") for name in ids_of(data.train))
    assert data.notes[1] == f"4 of 10 images {HELD}; put a test set in a folder test beside Train"


def test_of_several_test_folders_the_first_counts(tmp_path: Path) -> None:
    data = folder_data(images(tmp_path, *pets("train/", "val/"), *pets("test/", n=1), "more/1.png"))
    assert ids_of(data.test) == ["test/cat/0.png", "test/dog/0.png"]
    assert data.notes[1:] == ("folders beside train and test left out: more, val",)
    images(tmp_path, *pets("Training/"))
    with pytest.raises(ValueError, match="got Training, train, expected one training folder; move the images"):
        folder_data(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([*pets("train/"), "fox/1.png"], "train: got a folder per class among the classes of .*train alone"),
        ([*pets("test/"), *pets("")], "test: got a folder per class among the classes of .*side by side"),
        (pets("valid/"), "valid: got a folder per class among the classes"),
        (pets("photos/train/", "photos/test/"), "photos: got folders and no image, .*give the folder whose folders"),
        ([f"{pet}/{day}/1.png" for pet in ("cat", "dog") for day in "ab"], "cat: got folders and no image, expected"),
        (["train/1.png", "valid/1.png"], "train: got no folder, expected one folder of images per class"),
        (["train/1.png"], "train: got no folder"),
    ],
    ids=["train-and-class", "test-and-classes", "test-alone", "too-high", "nested", "flat", "flat-alone"],
)
def test_a_layout_that_cannot_be_meant_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        folder_data(images(tmp_path, *names))


def test_images_of_a_class_may_lie_in_one_folder_within(tmp_path: Path) -> None:
    """As in Tiny ImageNet: train/n01443537/images/0.png. Or in several, where other classes show what a class is."""
    found = folder_data(images(tmp_path / "one", *(name.replace("/", "/images/", 1) for name in pets(""))))
    assert found.classes == ("cat", "dog")
    assert len(found.train) + len(found.test) == 10
    found = folder_data(images(tmp_path / "some", "fox/a/1.png", "fox/b/1.png", *pets("")))
    assert found.classes == ("cat", "dog", "fox")
    assert [*found.train.labels, *found.test.labels].count(2) == 2


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    names = [f"{name}/{i}.png" for name in ("car", "train") for i in range(2)]
    data = folder_data(images(tmp_path, *names, "train/steam/2.png"), test_fraction=0.5)
    assert data.classes == ("car", "train")
    assert "train/steam/2.png" in ids_of(data.train) + ids_of(data.test)
    assert data.notes[1] == "taken as classes, as they hold images and not a folder per class: train"


def test_files_that_are_left_out_are_counted(tmp_path: Path) -> None:
    images(tmp_path, *pets(""), "beside.png", "cat/._0.png", "cat/.ipynb_checkpoints/0.png", "@eaDir/cat/0.png")
    for name in ("cat/Thumbs.db", "dog/.DS_Store", "cat/x.txt", "dog/more/y.avif", "labels.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    data = folder_data(tmp_path)
    assert sorted(ids_of(data.train) + ids_of(data.test)) == sorted(pets(""))
    assert data.notes[2:] == (
        "3 files that are no images left out: labels.csv, cat/x.txt, dog/more/y.avif",
        "1 images that lie in no class left out: beside.png",
    )
    for i in range(4):
        (tmp_path / "cat" / f"{i}.csv").touch()
    assert folder_data(tmp_path).notes[2].startswith("7 files that are no images left out: labels.csv, cat/0.csv, ")
    assert folder_data(tmp_path).notes[2].endswith(", cat/3.csv and 2 more")


def test_left_out_beside_train_and_test(tmp_path: Path) -> None:
    images(tmp_path, *pets("train/", "test/"))
    for name in ("README", "train/x.json", "test/dog/y.json"):
        (tmp_path / name).touch()
    note = "3 files that are no images left out: train/x.json, README, test/dog/y.json"
    assert folder_data(tmp_path).notes[1:] == (note,)


def test_gif_and_jfif(tmp_path: Path) -> None:
    """The first frame, in the palette's colours; a transparent pixel has the colour that is stored."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        frames = [Image.new("P", (4, 4), index) for index in (1, 2)]
        for frame in frames:
            frame.putpalette([0, 0, 0, 255, 0, 51, 0, 255, 0])
        frames[0].save(tmp_path / name / "1.gif", save_all=True, append_images=frames[1:], transparency=1)
        Image.new("RGB", (4, 4), (200, 200, 200)).save(tmp_path / name / "2.jfif", "JPEG")
    data = folder_data(tmp_path, test_fraction=0.5)
    shown = {name: part[i][0] for part in (data.train, data.test) for i, name in enumerate(ids_of(part))}
    assert sorted(shown) == ["a/1.gif", "a/2.jfif", "b/1.gif", "b/2.jfif"]
    for name in ("a", "b"):
        assert torch.equal(shown[f"{name}/1.gif"][:, 0, 0], torch.tensor([255.0, 0.0, 51.0]) / 255)
        assert torch.allclose(shown[f"{name}/2.jfif"], torch.full((3, 4, 4), 200 / 255), atol=2 / 255)


def test_an_image_of_too_many_pixels_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    with pytest.raises(ValueError, match=r"cat/\d\.png: got too large an image \(.*16 pixels.*; scale it down"):
        load_image_folder(images(tmp_path, *pets("")), size=4)


@pytest.mark.parametrize("label", ["10.0", "-1.000"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_an_integer_written_as_a_float_is_refused(tmp_path: Path, suffix: str, label: str) -> None:
    file = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        file.write_text(f"text,label\na,{label}\nb,2.0\n")
    else:
        file.write_text("\n".join(json.dumps({"text": "a", "label": each}) for each in (label, "2.0")))
    place = 2 if suffix == ".csv" else 1
    with pytest.raises(
        ValueError, match=rf"line {place}: label: got '{label}', expected an integer .*astype.*classes="
    ):
        load(file, test_fraction=0.5)
    data = load(file, classes=["2.0", label], test=file)
    assert (data.classes, data.train.labels, data.notes) == (("2.0", label), [1, 0], ())


def test_names_are_numbered_alphabetically_and_the_note_says_so(tmp_path: Path) -> None:
    file = csv_of(["positive", "negative"] * 2, tmp_path / "a.csv")
    data = load(file, test=file)
    assert data.train.labels == [1, 0, 1, 0]
    assert data.notes == ("labels numbered alphabetically: negative 0, positive 1",)
    assert load(file, test=file, classes=["positive", "negative"]).notes == ()
    csv_of(list("gfedcba"), file)
    assert load(file, test=file).notes == ("labels numbered alphabetically: a 0, b 1, c 2, d 3, e 4 and 2 more",)


@pytest.mark.parametrize(
    ("labels", "most"),
    [
        ([0, 30_000_001, 7], 1_000),
        ([1_001, 0], 1_000),
        ([10**30, 0], 1_000),
        ([1_201] + [0] * 1_199, 1_200),
    ],
    ids=["customer", "year", "huge", "above-the-number"],
)
def test_a_label_that_is_no_class_index_is_refused(tmp_path: Path, labels: list[int], most: int) -> None:
    file = csv_of(list(labels), tmp_path / "a.csv")
    largest = max(labels)
    line = labels.index(largest) + 2
    expected = f"at most {most} among {len(labels)} records; list the labels with classes=, or .*label="
    with pytest.raises(ValueError, match=rf"a\.csv, line {line}: label: got {largest}, .*{expected}"):
        load(file, test=file)
    names = sorted({str(label) for label in labels})
    assert load(file, test=file, classes=names).train.labels == [names.index(str(label)) for label in labels]


def test_indices_up_to_the_limit_are_classes(tmp_path: Path) -> None:
    file = csv_of([1_000, 0], tmp_path / "a.csv")
    assert len(load(file, test=file).classes) == 1_001
    csv_of([1_200, *[0] * 1_199], file)
    assert load(file, test=file).classes[-1] == "1200"
    with pytest.raises(ValueError, match="expected one of 0, 1, .*, 19 and 1181 more$"):
        load(file, test=csv_of([1_201], tmp_path / "b.csv"))


def test_npz_labels_that_are_no_class_index(tmp_path: Path) -> None:
    x = np.zeros((4, 5, 5), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.array([0, 0, 30_000_001, 1]))
    with pytest.raises(
        ValueError, match=r"y: got 30000001 at position 2, expected a class index, at most 1000 among 4"
    ):
        load(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", x=x, y=np.array([0, 0, 1000, 1000], np.uint16))
    assert len(load(tmp_path / "a.npz").classes) == 1_001


@pytest.mark.parametrize(
    ("classes", "error", "got"),
    [
        ("pos,neg", ValueError, "'pos,neg'"),
        ({"pos": 0}, ValueError, "{'pos': 0}"),
        ({"pos"}, ValueError, "{'pos'}"),
        ([], ValueError, r"\[\]"),
        (5, TypeError, "5"),
        (["a", None], TypeError, "None among them"),
        ([True, "b"], TypeError, "True among them"),
        ([0.5, "b"], TypeError, "0.5 among them"),
        (["a", "\ud83d"], ValueError, r"'\\ud83d', half of a character"),
    ],
)
def test_classes_are_a_list_of_names(tmp_path: Path, classes: Any, error: type[Exception], got: str) -> None:
    file = csv_of([0, 1] * 2, tmp_path / "a.csv")
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 5, 5), np.uint8), y=np.array([0, 0, 1, 1]))
    for path in (file, tmp_path / "a.npz"):
        with pytest.raises(error, match=f"^classes: got {got}, expected"):
            load(path, classes=classes)
    assert load(file, test=file, classes=[2015, "b"]).classes == ("2015", "b")
    assert class_names("classes", np.array(["a", "b"])) == ("a", "b")


@pytest.mark.parametrize("classes", [np.array("pos"), np.array([b"a", b"b"]), np.array([["a", "b"]]), np.array([0.5])])
def test_classes_of_an_npz_are_a_row_of_names(tmp_path: Path, classes: Any) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 5, 5), np.uint8), y=np.array([0, 1]), classes=classes)
    with pytest.raises(ValueError, match=r"a\.npz: classes: got .*expected strings \(n,\)"):
        load_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("normalise", [[0.5, 0.5], 5, None, [["a"], ["b"]], [[0.5], [None]], [[0.5]], {"mean": [0.5]}])
def test_a_normalisation_of_another_form(tmp_path: Path, normalise: Any) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 5, 5), np.uint8), y=np.array([0, 0, 1, 1]))
    for path in (tmp_path / "a.npz", images(tmp_path / "photos", *pets(""))):
        with pytest.raises(ValueError, match="^normalise: got .*expected 'train', 'none' or .mean, std. with"):
            load(path, normalise=normalise)


def test_a_number_is_the_name_that_it_spells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"4": f"text {i}", "5": i % 2} for i in range(4)]
    for name in ("a.jsonl", "5.jsonl"):
        Path(name).write_text("\n".join(map(json.dumps, rows)))
    data = load("a.jsonl", text=4, label=5, test_fraction=0.5)
    assert sorted(data.train.texts + data.test.texts) == [f"text {i}" for i in range(4)]
    with pytest.raises(FileNotFoundError, match="^5 does not exist"):
        load("a.jsonl", text=4, label=5, test=5)
    assert len(load("a.jsonl", text=4, label=5, test=Path("5.jsonl")).test) == 4
    for option in ("text", "label", "test"):
        for wrong in (True, 0.5, ["a"]):
            with pytest.raises(TypeError, match=rf"^{option}: got .*, expected (the name of a field|a file)"):
                load("a.jsonl", **{option: wrong})


@pytest.mark.parametrize(
    ("name", "spelled"),
    [(b"cat/caf\xe9.png", "cat/caf"), (b"caf\xe9/1.png", "caf")],
    ids=["image", "class"],
)
def test_a_file_name_that_is_not_utf_8(tmp_path: Path, name: bytes, spelled: str) -> None:
    images(tmp_path, *pets(""))
    path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "cat" / "0.png").rename(path)
    message = rf"^'{tmp_path}/{spelled}\\udce9[./a-z0-9]*': got a name that is not UTF-8, .*; rename it$"
    with pytest.raises(ValueError, match=message) as caught:
        folder_data(tmp_path)
    str(caught.value).encode()


def test_a_name_that_is_left_out_anyway_need_not_be_utf_8(tmp_path: Path) -> None:
    images(tmp_path, *pets(""))
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"cat/caf\xe9.txt"))).write_text("x")
    assert r"1 files that are no images left out: 'cat/caf\udce9.txt'" in folder_data(tmp_path).notes


def test_the_path_itself_is_not_utf_8(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    images(odd, *pets(""))
    file = csv_of([0, 1], tmp_path / "a.csv")
    np.savez(odd / "a.npz", x=np.zeros((4, 5, 5), np.uint8), y=np.array([0, 0, 1, 1]))
    for read in (
        lambda: load(odd),
        lambda: load(odd / "a.npz"),
        lambda: load_records(csv_of([0, 1], odd / "a.csv")),
        lambda: load_records(file, test=odd / "a.csv"),
    ):
        with pytest.raises(ValueError, match=r"caf\\udce9.*: got a name that is not UTF-8"):
            read()


@pytest.mark.parametrize("field", ["text", "label"])
def test_half_a_character_is_named_by_its_line(tmp_path: Path, field: str) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"text": "one \U0001f600", "label": "x"}, {"text": "two", "label": "x", field: "cut \ud83d"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert "\\ud83d\\ude00" in file.read_text()
    with pytest.raises(
        ValueError, match=rf"a\.jsonl, line 2: {field}: got half of a character .*mend or drop the line"
    ):
        load(file, test=file)
    file.write_text(json.dumps(rows[0]))
    assert load(file, test=file).train.texts == ["one 😀"]


def test_a_seed_that_is_none_is_refused(tmp_path: Path) -> None:
    file = csv_of(["a", "b"] * 6, tmp_path / "a.csv")
    for seed in ("O", 0.0, True):
        with pytest.raises(TypeError, match=f"seed: got {seed!r}, expected an integer"):
            load(file, seed=seed)


def test_a_layout_is_looked_at_for_grey_images_too(tmp_path: Path) -> None:
    images, labels = np.zeros((6, 6, 6), np.uint8), np.arange(6) % 2
    np.savez(tmp_path / "a.npz", x=images, y=labels, x_test=images, y_test=labels)
    with pytest.raises(ValueError, match="layout: got 'XYZ', expected 'CHW' or 'HWC'"):
        load(tmp_path / "a.npz", layout="XYZ")


@pytest.mark.parametrize("value", ["[" * 100_000, "1" * 5_000], ids=["deep", "long"])
def test_json_that_python_gives_up_on_is_an_error_of_its_line(tmp_path: Path, value: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "x", "label": 0}\n{"text": "y", "label": ' + value + "}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: got .*, expected a JSON object"):
        load(file, test=file)
