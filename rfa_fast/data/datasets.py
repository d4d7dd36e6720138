"""Datasets in memory, the mix of two of them, and the names of their samples.

A data set of this project's size (60,000 images of 28 × 28, 100,000 short texts) is a few hundred
megabytes as one tensor: held whole, it needs no worker processes, no file handles, and an item costs
an index. Nothing is stored twice: the grey image that a three-channel network wants is expanded to a
view when it is asked for. What does not fit in memory comes as any other map-style dataset.

An item is `(input, label)`, or a dict of tensors with `labels` for transformers models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from rfa_fast.data.draws import integer


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images in memory.

    Args:
        images: (n, C, H, W), floating point, normalised as the model expects.
        labels: class index of each image, (n,).
        classes: class names by index.
        transform: applied to each image (C, H, W) when it is taken, for augmentation.
        channels: show a stored single channel as this many; a view, no copy.
        ids: names of the samples, for the deletion record; positions when not given.

    Raises:
        TypeError, ValueError: shapes or dtype differ from the above, no image, a label out of range.

    Example:
        >>> import torch
        >>> data = ImageDataset(torch.zeros(2, 1, 8, 8), [0, 1], classes=("cat", "dog"), channels=3)
        >>> image, label = data[1]
        >>> image.shape, label
        (torch.Size([3, 8, 8]), 1)
    """

    def __init__(
        self,
        images: Tensor,
        labels: Sequence[int],
        classes: Sequence[str],
        transform: Callable[[Tensor], Tensor] | None = None,
        *,
        channels: int | None = None,
        ids: Sequence[str | int] | None = None,
    ) -> None:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images: got {got}, expected a floating point tensor (n, C, H, W)")
        if images.dim() != 4 or 0 in images.shape:
            raise ValueError(f"images: got shape {tuple(images.shape)}, expected (n, C, H, W), none of them 0")
        if channels is not None and integer("channels", channels, 1) != images.shape[1] and images.shape[1] != 1:
            raise ValueError(f"channels: got {channels}, expected {images.shape[1]}, the number that is stored")
        self.images = images
        self.classes = tuple(classes)
        self.labels = check_labels(labels, len(images), self.classes)
        self.transform = transform
        self.channels = channels if channels is not None else images.shape[1]
        self.ids = check_ids(ids, len(images))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index].expand(self.channels, -1, -1)
        return (image if self.transform is None else self.transform(image)), self.labels[index]


class TextDataset(Dataset[tuple[str, int]]):
    """Texts in memory; :func:`rfa_fast.data.tokenise_texts` makes them a model's input.

    Args:
        texts: (n,).
        labels: class index of each text, (n,).
        classes: class names by index.
        ids: names of the samples, for the deletion record; positions when not given.

    Raises:
        TypeError, ValueError: lengths differ, no text, a label out of range.

    Example:
        >>> TextDataset(["shares fell", "a late goal"], [0, 1], classes=("business", "sports"))[1]
        ('a late goal', 1)
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[int],
        classes: Sequence[str],
        *,
        ids: Sequence[str | int] | None = None,
    ) -> None:
        self.texts = list(texts)
        if not self.texts:
            raise ValueError("texts: got none, expected at least one")
        if wrong := [text for text in self.texts if not isinstance(text, str)]:
            raise TypeError(f"texts: got {wrong[0]!r}, expected strings")
        self.classes = tuple(classes)
        self.labels = check_labels(labels, len(self.texts), self.classes)
        self.ids = check_ids(ids, len(self.texts))

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.texts[index], self.labels[index]

    def select(self, indices: Sequence[int]) -> TextDataset:
        """Some of the texts, in the order given, under the names that they have here.

        Example:
            >>> data = TextDataset(["a", "b", "c"], [0, 1, 0], classes=("x", "y"))
            >>> part = data.select([2, 0])
            >>> part.texts, ids_of(part)
            (['c', 'a'], ['2', '0'])
        """
        names = ids_of(self)
        return TextDataset(
            [self.texts[i] for i in indices],
            [self.labels[i] for i in indices],
            self.classes,
            ids=[names[i] for i in indices],
        )


class QADataset(TextDataset):
    """Questions with their accepted answers; :func:`rfa_fast.data.tokenise_qa` makes them a model's input.

    Args:
        questions: (n,).
        answers: the accepted answers of each question; the first is the one that is taught.
        labels: topic index of each question, (n,).
        classes: topic names by index.
        ids: as for :class:`TextDataset`.

    Attributes:
        texts: question and first answer as one text, where a keyword is looked for.

    Raises:
        TypeError, ValueError: lengths differ, a question without an answer, a label out of range.

    Example:
        >>> data = QADataset(["What is the symbol of gold?"], [["Au", "AU"]], [0], classes=("elements",))
        >>> data.texts[0], data.topics[0]
        ('What is the symbol of gold? Au', 'elements')
    """

    def __init__(
        self,
        questions: Sequence[str],
        answers: Sequence[Sequence[str]],
        labels: Sequence[int],
        classes: Sequence[str],
        *,
        ids: Sequence[str | int] | None = None,
    ) -> None:
        self.questions = list(questions)
        self.answers = [[accepted] if isinstance(accepted, str) else list(accepted) for accepted in answers]
        if len(self.answers) != len(self.questions):
            raise ValueError(f"answers: got {len(self.answers)}, expected one list for each of {len(self.questions)}")
        for question, accepted in zip(self.questions, self.answers, strict=True):
            if not accepted or not all(isinstance(answer, str) and answer.strip() for answer in accepted):
                raise ValueError(f"answers: got {accepted!r} for {question!r}, expected at least one, none empty")
        super().__init__(
            [f"{question} {accepted[0]}" for question, accepted in zip(self.questions, self.answers, strict=True)],
            labels,
            classes,
            ids=ids,
        )

    @property
    def topics(self) -> list[str]:
        """Topic name of each question."""
        return [self.classes[label] for label in self.labels]

    def select(self, indices: Sequence[int]) -> QADataset:
        """Some of the questions, in the order given, under the names that they have here.

        Example:
            >>> data = QADataset(["a?", "b?"], [["A"], ["B"]], [0, 0], classes=("x",))
            >>> data.select([1]).answers
            [['B']]
        """
        names = ids_of(self)
        return QADataset(
            [self.questions[i] for i in indices],
            [self.answers[i] for i in indices],
            [self.labels[i] for i in indices],
            self.classes,
            ids=[names[i] for i in indices],
        )


class MixedDataset(Dataset[tuple[Any, bool]]):
    """The retained samples followed by the forget samples, each as `(item, is_forget)`.

    Takes the indices of :class:`~rfa_fast.data.ForgetRetainBatchSampler`; :func:`~rfa_fast.data.collate_mixed`
    makes batches of its items.

    Example:
        >>> mixed = MixedDataset(retain=[("a", 0), ("b", 1)], forget=[("c", 1)])
        >>> mixed[1], mixed[2]
        ((('b', 1), False), (('c', 1), True))
    """

    def __init__(self, retain: Dataset[Any] | Sequence[Any], forget: Dataset[Any] | Sequence[Any]) -> None:
        self.retain = retain
        self.forget = forget
        self.n_retain, self.n_forget = size_of(retain), size_of(forget)

    def __len__(self) -> int:
        return self.n_retain + self.n_forget

    def __getitem__(self, index: int) -> tuple[Any, bool]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: got {index}, expected less than {len(self)}")
        index %= len(self)
        if index < self.n_retain:
            return self.retain[index], False
        return self.forget[index - self.n_retain], True

    @property
    def ids(self) -> list[str]:
        """The samples' names, see :func:`ids_of`."""
        return _joined_ids([self.retain, self.forget])


class Repeated(Subset[Any]):
    """A dataset gone through several times over: D_f five times, as in section V-B2, where it is small.

    A `Subset`, so that labels, texts and names are found through it as through any other view; a sample has one
    name however often it comes, and a deletion record counts it once.

    Args:
        dataset: with a length.
        times: how often each sample comes, lap after lap.

    Raises:
        TypeError: a dataset without a length, or `times` no integer.
        ValueError: `times` below 1.

    Example:
        >>> data = Repeated(["a", "b"], times=2)
        >>> list(data), ids_of(data)
        (['a', 'b', 'a', 'b'], ['0', '1', '0', '1'])
    """

    def __init__(self, dataset: Dataset[Any] | Sequence[Any], times: int) -> None:
        self.times = integer("times", times, 1)
        super().__init__(dataset, list(range(size_of(dataset))) * self.times)  # type: ignore[arg-type]


def ids_of(dataset: Any) -> list[str]:
    """The names of a dataset's samples, as the deletion record hashes them.

    They are the attribute `ids` where there is one; those of the parent for a `Subset`; those of the
    parts for a `ConcatDataset`, each with the number of its part in front if they would clash; else
    the position.

    Raises:
        TypeError: the dataset has no length, so that its samples have no positions.
        ValueError: `ids` are not as many as the samples.

    Example:
        >>> from torch.utils.data import Subset
        >>> data = TextDataset(["x", "y", "z"], [0, 0, 0], classes=("c",), ids=["doc-a", "doc-b", "doc-c"])
        >>> ids_of(Subset(data, [2, 0]))
        ['doc-c', 'doc-a']
    """
    ids = getattr(dataset, "ids", None)
    if ids is not None:
        if len(ids) != size_of(dataset):
            raise ValueError(f"ids: got {len(ids)}, expected one for each of the {size_of(dataset)} samples")
        return [str(name) for name in ids]
    if isinstance(dataset, Subset):
        parent = ids_of(dataset.dataset)
        return [parent[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        return _joined_ids(dataset.datasets)
    return [str(position) for position in range(size_of(dataset))]


def _joined_ids(parts: Sequence[Any]) -> list[str]:
    named = [ids_of(part) for part in parts]
    plain = [name for names in named for name in names]
    if len(set(plain)) == sum(len(set(names)) for names in named):
        return plain
    return [f"{part}/{name}" for part, names in enumerate(named) for name in names]


def size_of(dataset: Any) -> int:
    """The number of samples.

    Raises:
        TypeError: the dataset is iterable-style, without a length.

    Example:
        >>> size_of([1, 2, 3])
        3
    """
    if not hasattr(dataset, "__len__"):
        raise TypeError(f"dataset: got {type(dataset).__name__} without a length, expected a map-style dataset")
    return len(dataset)


def check_labels(labels: Sequence[int] | Tensor, n: int, classes: Sequence[str]) -> list[int]:
    """`labels` as a list of ints.

    Raises:
        ValueError: not n of them, or one is not the index of a class.

    Example:
        >>> check_labels([0, 2], 2, classes=("a", "b"))
        Traceback (most recent call last):
        ...
        ValueError: labels: got 2 at position 1, expected 0 to 1 (2 classes)
    """
    values = [integer("labels", label) for label in (labels.tolist() if isinstance(labels, Tensor) else labels)]
    if len(values) != n:
        raise ValueError(f"labels: got {len(values)}, expected one for each of the {n} samples")
    for position, label in enumerate(values):
        if not 0 <= label < len(classes):
            expected = f"0 to {len(classes) - 1} ({len(classes)} classes)"
            raise ValueError(f"labels: got {label} at position {position}, expected {expected}")
    return values


def check_ids(ids: Sequence[str | int] | None, n: int) -> Sequence[str | int] | None:
    """`ids`, of which there must be n or none.

    Raises:
        ValueError: another number of them.
    """
    if ids is not None and len(ids) != n:
        raise ValueError(f"ids: got {len(ids)}, expected one for each of the {n} samples")
    return ids
