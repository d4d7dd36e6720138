"""What the loaders of the user's own files check and say alike: options, labels, names, the share held out.

Options come as they were typed, or from the command line as JSON, where `label=5` is a number and
`classes=a,b` a text. What is found wrong here would otherwise show after hours: in a table of millions of
classes, or in a report that cannot be written.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, SupportsIndex


def class_names(name: str, classes: Any) -> tuple[str, ...]:
    """A list of class names by index, as strings; an integer in it is the name that it spells.

    Args:
        name: of the option, or of the place in a file.
        classes: what was given, (n,).

    Raises:
        TypeError: no list, or something in it that is no name.
        ValueError: a single text, something without an order, no name, or one that UTF-8 cannot hold.

    Example:
        >>> class_names("classes", ["neg", 2015])
        ('neg', '2015')
    """
    expected = 'expected a list of names by index, on the command line --data-option \'classes=["a", "b"]\''
    if isinstance(classes, str | bytes | Mapping | Set):
        raise ValueError(f"{name}: got {classes!r}, {expected}")
    try:
        names = list(classes)
    except TypeError as error:
        raise TypeError(f"{name}: got {classes!r}, {expected}") from error
    if not names:
        raise ValueError(f"{name}: got {classes!r}, {expected}")
    for each in names:
        if isinstance(each, bool) or not isinstance(each, str | SupportsIndex):
            raise TypeError(f"{name}: got {each!r} among them, {expected}")
        if not encodes(str(each)):
            raise ValueError(f"{name}: got {each!r}, half of a character, expected Unicode text; mend the name")
    return tuple(str(each) for each in names)


def spelled(name: str, value: Any, expected: str) -> str:
    """An option that is a text; an integer is the text that it spells.

    Raises:
        TypeError: something else.

    Example:
        >>> spelled("label", 5, "the name of a field")
        '5'
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(f"{name}: got {value!r}, expected {expected}")
    return str(value)


def largest_index(samples: int) -> int:
    """The largest integer that is taken for a class index where nobody listed the classes.

    Every index up to the largest label becomes a class. A customer's number or a postcode would make millions
    of them, so an index is at most 1,000 or the number of samples, and below 100,000.

    Args:
        samples: how many labels there are.

    Example:
        >>> largest_index(60), largest_index(5_000), largest_index(10**7)
        (1000, 5000, 99999)
    """
    return min(99_999, max(1_000, samples))


def encodes(text: str) -> bool:
    """Whether UTF-8 can hold a text, as every report, split and list of ids is written.

    It cannot where JSON named half of a character, or a file name is in another encoding.

    Example:
        >>> encodes("naïve"), encodes("na\\udcefve")
        (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def named_in_unicode(path: Path) -> Path:
    """`path`, whose name a report can hold.

    Raises:
        ValueError: it is not UTF-8; the message spells the name as Python does.

    Example:
        >>> named_in_unicode(Path("caf\\udce9.png"))
        Traceback (most recent call last):
        ...
        ValueError: 'caf\\udce9.png': got a name that is not UTF-8, expected one that a report can hold; rename it
    """
    if not encodes(str(path)):
        raise ValueError(f"{str(path)!r}: got a name that is not UTF-8, expected one that a report can hold; rename it")
    return path


def held_out(test: int, samples: int, what: str, instead: str) -> str:
    """The note on a test set that the data did not have.

    Args:
        test, samples: how many were held out, and of how many.
        what: the samples, in the plural.
        instead: how a test set is given.

    Example:
        >>> held_out(12, 60, "records", "name a test set with test=")[:45]
        '12 of 60 records held out as the test set: wh'
    """
    return (
        f"{test} of {samples} {what} held out as the test set: what is to be forgotten among them is not shown to the "
        f"method; {instead}"
    )
