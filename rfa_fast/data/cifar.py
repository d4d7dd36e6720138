"""CIFAR-10 in its binary version, whose format is a label byte and 3,072 colour bytes per image.

The version that most tools take, `cifar-10-batches-py`, is made of pickles: reading one runs whatever
code it holds. The binary version has the same images in the same order, so that one is read and the
other refused with the command that gets the right one.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from rfa_fast.data.bundle import DataBundle
from rfa_fast.data.images import Finish, Normalise, Part, file_labels, image_bundle, unit_pixels
from rfa_fast.data.sources import DATA_VARIABLE, Source, read_bytes

ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
BINARY, PICKLED = "cifar-10-batches-bin", "cifar-10-batches-py"
CIFAR_10 = Source(
    "cifar-10",
    f'curl -L {ADDRESS} | tar xz -C "${DATA_VARIABLE}"',
    aliases=(BINARY, PICKLED),
    put=f"the folder {BINARY}",
)
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZE = 32
RECORD = 1 + 3 * SIZE * SIZE
TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILE = "test_batch.bin"


def load_cifar_10(
    root: str | os.PathLike[str] | None = None,
    *,
    pad_to: int | None = None,
    channels: int | None = None,
    normalise: Normalise = "train",
) -> DataBundle:
    """CIFAR-10: 50,000 training and 10,000 test images of 3 × 32 × 32 in 10 classes, from its binary version.

    In memory it takes 740 MB as float32. A ViT for 224 × 224 pixels takes it through
    :func:`~rfa_fast.data.resized`.

    Args:
        root: folder with the six .bin files, or with `cifar-10-batches-bin` in it; else the same below
            `$RFA_FAST_DATA`.
        pad_to: pad to this height and width, in pixels, the image in the middle.
        channels: 3 or `None`; here so that data sets can be exchanged for one another.
        normalise: `"train"`: by mean and standard deviation of the training images; `"none"`: keep [0, 1];
            or `(mean, std)`, three numbers each.

    Raises:
        FileNotFoundError: the files are not there; the message holds the command that fetches them.
        ValueError: the folder holds the pickled version, a file is cut short, or a label is no class.

    Example:
        >>> load_cifar_10("/nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FileNotFoundError: cifar-10: /nowhere does not exist. Get it with `curl -L https://www.cs.toronto.edu/...
    """
    folder = _folder(CIFAR_10.require(root))
    train = [read_cifar(folder / name) for name in TRAIN_FILES]
    pixels = np.concatenate([images for images, _ in train])
    labels = [label for _, batch in train for label in batch]
    ids = [
        f"{name.removesuffix('.bin')}/{i}"
        for name, (_, batch) in zip(TRAIN_FILES, train, strict=True)
        for i in range(len(batch))
    ]
    test_pixels, test_labels = read_cifar(folder / TEST_FILE)
    parts = (
        Part(unit_pixels(pixels), labels, ids),
        Part(unit_pixels(test_pixels), test_labels, [f"test_batch/{i}" for i in range(len(test_labels))]),
    )
    finish = Finish(pad_to, channels, normalise)
    return image_bundle("cifar-10", parts, CIFAR_CLASSES, finish, str(folder), "not stated by its authors")


def read_cifar(path: Path) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], list[int]]:
    """Images (n, 3, 32, 32) and labels of one .bin file: per image a label, then red, green, blue, row by row.

    Raises:
        FileNotFoundError: no such file; with the command that fetches it.
        ValueError: no image, one cut short, or a label that is no class.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "test_batch.bin"
        >>> _ = file.write_bytes(bytes([9]) + bytes(1024) + bytes([7]) * 2048)
        >>> images, labels = read_cifar(file)
        >>> images[0, :, 0, 0].tolist(), labels
        ([0, 7, 7], [9])
    """
    content = read_bytes(path, CIFAR_10)
    if not content or len(content) % RECORD:
        raise ValueError(f"{path}: got {len(content)} bytes, expected a multiple of {RECORD}, those of an image")
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    labels = file_labels(path, records[:, 0].tolist(), CIFAR_CLASSES)
    return records[:, 1:].reshape(-1, 3, SIZE, SIZE), labels


def _folder(place: Path) -> Path:
    """The folder with the .bin files: `place`, or the one that the archive makes in it."""
    for folder in (place, place / BINARY):
        if (folder / TRAIN_FILES[0]).is_file():
            return folder
    for folder in (place, place / PICKLED):
        if (folder / TRAIN_FILES[0].removesuffix(".bin")).is_file():
            raise ValueError(
                f"{folder}: got the Python version of CIFAR-10, whose batches are pickles, which run code when they "
                f"are read; expected the binary version, the same images: `{CIFAR_10.get}`"
            )
    return place
