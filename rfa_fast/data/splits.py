"""Which samples are to be forgotten and which are kept: the subsets of section V-A4 as plain indices.

A split holds indices, not data: it is small enough to be written beside every run, its digest says
whether two runs worked on the same samples, and every method and every model of an experiment takes
the same one. What its indices mean is said by a digest of the data, where it was given one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor
from torch.utils.data import Dataset, Subset

from rfa_fast.data.draws import integer, permutation
from rfa_fast.files import write_atomically

Scenario = Literal["class", "sample", "keyword"]
Item = TypeVar("Item")

FORMAT = "rfa-fast split 1"
SUBSETS = ("retain", "forget", "retain_test", "forget_test")
PAPER_NAMES = {"retain": "D_r", "forget": "D_f", "retain_test": "D_rt", "forget_test": "D_ft"}


@dataclass(frozen=True)
class Split:
    """The four subsets of one unlearning request, as indices into the training and the test set.

    Attributes:
        scenario: `"class"`, `"sample"` or `"keyword"`.
        target: what is forgotten: a class, a number of samples, a keyword.
        retain, forget: D_r and D_f, indices into the training set.
        retain_test, forget_test: D_rt and D_ft, indices into the test set; a sample split has no D_ft.
        seed: what the choice was drawn with (0 where nothing was drawn).
        data: :meth:`rfa_fast.data.DataBundle.digest` of what the indices are of, if it is known; equal splits may
            differ in it.

    Raises:
        ValueError: a subset is empty, holds an index twice or a negative one, or two overlap.

    Example:
        >>> split = split_by_class([0, 1, 1, 2], [2, 1], target=1)
        >>> split.retain, split.forget, split.retain_test, split.forget_test
        ((0, 3), (1, 2), (0,), (1,))
    """

    scenario: Scenario
    target: str
    retain: tuple[int, ...]
    forget: tuple[int, ...]
    retain_test: tuple[int, ...]
    forget_test: tuple[int, ...] = ()
    seed: int = 0
    data: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.scenario not in get_args(Scenario):
            raise ValueError(f"scenario: got {self.scenario!r}, expected one of {', '.join(get_args(Scenario))}")
        if not isinstance(self.target, str):
            raise TypeError(f"target: got {self.target!r}, expected a string")
        if self.data is not None and not isinstance(self.data, str):
            raise TypeError(f"data: got {self.data!r}, expected a digest or None")
        integer("seed", self.seed)
        for name in SUBSETS:
            indices = tuple(integer(name, index, minimum=0) for index in getattr(self, name))
            object.__setattr__(self, name, indices)
            if len(set(indices)) != len(indices):
                raise ValueError(f"{name}: got index {_most_common(indices)} twice, expected each index once")
            if not indices and not (name == "forget_test" and self.scenario == "sample"):
                raise ValueError(f"{name}: got no index for {self.scenario} {self.target!r}, expected at least one")
        for kept, forgotten in (("retain", "forget"), ("retain_test", "forget_test")):
            if common := set(getattr(self, kept)) & set(getattr(self, forgotten)):
                raise ValueError(f"{kept}, {forgotten}: got index {min(common)} in both, expected no common index")

    def digest(self) -> str:
        """SHA-256 of the split's content: equal in every process for equal subsets, target and seed.

        Example:
            >>> split_by_sample(10, 5, count=2, seed=0).digest() == split_by_sample(10, 5, count=2, seed=0).digest()
            True
        """
        content = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "data"}

    def apply(self, train: Dataset[Item], test: Dataset[Item]) -> dict[str, Subset[Item]]:
        """The subsets of two datasets by name, `retain` to `forget_test`, without those that are empty.

        Raises:
            ValueError: an index lies outside its dataset: the split is of other data.

        Example:
            >>> from rfa_fast.data import TextDataset
            >>> texts = TextDataset(["a", "b", "c"], [0, 1, 1], classes=("x", "y"))
            >>> split = split_by_class(texts.labels, texts.labels, target=1)
            >>> split.apply(texts, texts)["forget"][0]
            ('b', 1)
        """
        subsets: dict[str, Subset[Item]] = {}
        for name in SUBSETS:
            dataset, label = (test, "test") if name.endswith("_test") else (train, "train")
            indices = getattr(self, name)
            size = len(dataset)  # type: ignore[arg-type]  # Dataset does not declare __len__
            if indices and max(indices) >= size:
                raise ValueError(
                    f"{label}: got a dataset of {size} samples, expected more than {max(indices)}, the largest index "
                    f"of {name}; was the split made on other data?"
                )
            if indices:
                subsets[name] = Subset(dataset, indices)
        return subsets

    def named(self, train: Dataset[Item], test: Dataset[Item]) -> dict[str, Subset[Item]]:
        """What :meth:`apply` gives, by the paper's names: D_r, D_f, D_rt and D_ft, or D_t for the whole test set.

        Raises:
            ValueError: as :meth:`apply`.

        Example:
            >>> from rfa_fast.data import TextDataset
            >>> texts = TextDataset(["a", "b", "c"], [0, 1, 1], classes=("x", "y"))
            >>> list(split_by_sample(3, 3, count=1).named(texts, texts))
            ['D_r', 'D_f', 'D_t']
        """
        names = PAPER_NAMES if self.forget_test else {**PAPER_NAMES, "retain_test": "D_t"}
        return {names[name]: subset for name, subset in self.apply(train, test).items()}

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the split as JSON; the file appears whole or not at all, with its folder.

        Methods that share a split share its file: each saves the one it works on, the first writes it, and
        a later one with another split is stopped.

        Raises:
            FileExistsError: the file holds another split (the same one is left as it is).

        Example:
            >>> import tempfile
            >>> file = Path(tempfile.mkdtemp()) / "split.json"
            >>> split = split_by_sample(10, 5, count=2, seed=0)
            >>> split.save(file)
            >>> Split.load(file) == split
            True
        """
        path = Path(path)
        data = {} if self.data is None else {"data": self.data}
        content = json.dumps({"format": FORMAT, "digest": self.digest(), **self._content(), **data}, indent=1) + "\n"
        if path.exists() and not overwrite:
            if path.read_bytes() == content.encode() or self._held_by(path):
                return
            raise FileExistsError(f"{path} holds another split; choose another file or say overwrite=True")
        write_atomically(path, content)

    def _held_by(self, path: Path) -> bool:
        """Whether a file holds this split without the data that it is of, as those of before did."""
        try:
            there = Split.load(path)
        except ValueError:
            return False
        return there == self and (there.data is None or self.data is None)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Split:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a split, a field missing or malformed, or changed since it was written.
        """
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: got {error}, expected the JSON of a split; is the file cut short?") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            got = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"{path}: got format {got!r}, expected {FORMAT!r}")
        names = [each.name for each in fields(cls) if each.name != "data"]
        if missing := [name for name in (*names, "digest") if name not in values]:
            raise ValueError(f"{path}: got no field {missing[0]!r}, expected {', '.join(names)} and digest")
        if wrong := [name for name in SUBSETS if not isinstance(values[name], list)]:
            raise ValueError(f"{path}: {wrong[0]}: got {values[wrong[0]]!r}, expected a list of indices")
        try:
            split = cls(**{name: values[name] for name in names}, data=values.get("data"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        if split.digest() != values["digest"]:
            raise ValueError(f"{path}: got digest {values['digest']!r}, expected {split.digest()!r}: it was edited")
        return split


def split_by_class(
    train_labels: Sequence[int] | Tensor,
    test_labels: Sequence[int] | Tensor,
    target: int | str,
    classes: Sequence[str] | None = None,
) -> Split:
    """Forget every sample of one class (class unlearning, section V-A4).

    Args:
        train_labels, test_labels: class index of each sample, (n,).
        target: the class index, as a number or its digits, or its name when `classes` is given.
        classes: class names by index.

    Raises:
        ValueError: the class is unknown (the message lists the known ones), or a subset would be empty.

    Example:
        >>> split_by_class([0, 1, 1], [1, 0], target="cat", classes=("dog", "cat")).forget
        (1, 2)
    """
    train, test = _labels("train_labels", train_labels), _labels("test_labels", test_labels)
    index = _class_index(target, classes, known=sorted(set(train)))
    name = classes[index] if classes is not None else str(index)
    return split_where("class", name, [label == index for label in train], [label == index for label in test])


def split_by_sample(n_train: int, n_test: int, count: int, seed: int = 0) -> Split:
    """Forget `count` random training samples (sample unlearning, section V-A4).

    The test set is retained whole, `forget_test` is empty: no test sample was ever learnt.

    Raises:
        ValueError: `count` leaves nothing to forget or nothing to retain, or there is no test sample.

    Example:
        >>> split = split_by_sample(100, 20, count=3, seed=0)
        >>> len(split.retain), len(split.forget), len(split.retain_test), len(split.forget_test)
        (97, 3, 20, 0)
    """
    n_train, n_test = integer("n_train", n_train, minimum=0), integer("n_test", n_test, minimum=0)
    integer("count", count, minimum=1)
    if count >= n_train:
        raise ValueError(f"count: got {count}, expected fewer than the {n_train} training samples")
    order = permutation(n_train, seed, "sample")
    forget = tuple(sorted(order[:count]))
    return Split("sample", str(count), tuple(sorted(order[count:])), forget, tuple(range(n_test)), (), seed)


def validation_split(
    indices: Sequence[int] | Tensor, fraction: float = 0.1, seed: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Set part of `indices` aside, so that settings are chosen there and never on the test set.

    Args:
        indices: of training samples, such as `range(len(train))` or `split.retain`.
        fraction: share set aside, in (0, 1); rounded, at least one index on either side.

    Returns:
        (kept, validation), each ascending, together exactly `indices`.

    Raises:
        ValueError: fewer than two indices, one given twice, or the fraction out of range.

    Example:
        >>> kept, validation = validation_split(range(10), fraction=0.2, seed=0)
        >>> len(kept), len(validation), sorted(kept + validation) == list(range(10))
        (8, 2, True)
    """
    chosen = _labels("indices", indices)
    if len(chosen) < 2 or len(set(chosen)) != len(chosen):
        raise ValueError(f"indices: got {len(set(chosen))} distinct of {len(chosen)}, expected two or more, each once")
    count = _share(len(chosen), fraction)
    order = [chosen[i] for i in permutation(len(chosen), seed, "validation")]
    return tuple(sorted(order[count:])), tuple(sorted(order[:count]))


def stratified_split(
    labels: Sequence[int] | Tensor, fraction: float = 0.2, seed: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Set the same share of every class aside, as the test set of a source that has none.

    Args:
        labels: class index of each sample, (n,).
        fraction: share of each class, in (0, 1); rounded, at least one sample on either side.

    Returns:
        (train, test), each ascending.

    Raises:
        ValueError: a class has a single sample, which cannot be on both sides.

    Example:
        >>> labels = [0] * 5 + [1] * 10
        >>> train, test = stratified_split(labels, fraction=0.2, seed=0)
        >>> sorted(labels[i] for i in test)
        [0, 1, 1]
    """
    by_class: dict[int, list[int]] = {}
    for position, label in enumerate(_labels("labels", labels)):
        by_class.setdefault(label, []).append(position)
    train: list[int] = []
    test: list[int] = []
    for label, members in sorted(by_class.items()):
        if len(members) < 2:
            raise ValueError(f"labels: got one sample of class {label}, expected two or more to split every class")
        count = _share(len(members), fraction)
        order = [members[i] for i in permutation(len(members), seed, f"class {label}")]
        test.extend(order[:count])
        train.extend(order[count:])
    return tuple(sorted(train)), tuple(sorted(test))


def split_where(scenario: Scenario, target: str, train: Sequence[bool], test: Sequence[bool]) -> Split:
    """The split that forgets where the flags, one per sample, are true.

    Raises:
        ValueError: a subset would be empty.

    Example:
        >>> split_where("keyword", "film", [True, False], [False, True]).forget_test
        (1,)
    """
    kept, forgotten = (
        [tuple(i for i, hit in enumerate(f) if hit is on) for f in (train, test)] for on in (False, True)
    )
    return Split(scenario, target, kept[0], forgotten[0], kept[1], forgotten[1])


def _labels(name: str, values: Iterable[Any] | Tensor) -> list[int]:
    if isinstance(values, Tensor):
        values = values.tolist()
    return [integer(name, value, minimum=0) for value in values]


def _class_index(target: int | str, classes: Sequence[str] | None, known: Sequence[int]) -> int:
    if classes is not None and target in classes:
        index = list(classes).index(str(target))
    elif isinstance(target, str):  # a command line has strings only: its "6" is the index 6 unless a class is called so
        index = int(target) if target.isdecimal() else -1
    else:
        index = integer("target", target)
    if index in known and (classes is None or index < len(classes)):
        return index
    if classes is None:
        names = ", ".join(map(str, known))
    else:
        names = ", ".join(f"{i} ({classes[i]})" if i < len(classes) else str(i) for i in known)
    raise ValueError(f"target: got class {target!r}, expected one of the training set's: {names or '(it is empty)'}")


def _share(n: int, fraction: float) -> int:
    """How many of n samples a fraction is: rounded, at least one, never all."""
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise ValueError(f"fraction: got {fraction!r}, expected a number > 0 and < 1")
    return min(max(1, round(n * fraction)), n - 1)


def _most_common(indices: Iterable[int]) -> int:
    return Counter(indices).most_common(1)[0][0]
