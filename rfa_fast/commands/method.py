"""From the words about a method on the command line to the keyword arguments of `unlearn`.

The flags `--rank`, `--mode` and so on are RFA's, because it is what the command is mostly used for. Given
to another method they would be ignored, and a comparison would be told otherwise; so they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer

from rfa_fast.commands.inputs import key_and_value
from rfa_fast.methods import METHODS

METHOD_NAMES = ", ".join(METHODS)
_RFA = "rfa"
_FLAGS = ("rank", "alpha", "mode", "norm", "gamma", "loss_weights", "adapter", "rslora", "backend", "keep_adapter")
_KEYWORDS = {"loss_weights": "weights"}  # flags that have another name in Python


def method_options(
    context: typer.Context,
    method: str,
    words: Sequence[str],
    targets: str | list[str] | None,
    adapting: Mapping[str, Any],
) -> dict[str, Any]:
    """The options of a method, checked by it.

    Args:
        context: of the command, which knows the flags that were typed.
        method: its name.
        words: `KEY=VALUE`, the value JSON or a text.
        targets: as typed, `None` when not.
        adapting: what the flags of RFA stand for.

    Raises:
        ValueError, TypeError: an unknown method, a flag of RFA for another one, a word that is no KEY=VALUE, an
            option given twice, one that the method does not have, or a wrong value.
    """
    if method not in METHODS:
        raise ValueError(f"--method: got {method!r}, expected one of {METHOD_NAMES}")
    typed = [flag for flag in _FLAGS if _was_typed(context, flag)]
    if typed and method != _RFA:
        known = ", ".join(METHODS[method].settings({}))
        raise ValueError(
            f"{_flag(typed[0])}: got a value for --method {method}, expected none: it is an option of rfa; those of "
            f"{method} are {known}, as --method-option KEY=VALUE"
        )
    given = {_KEYWORDS.get(flag, flag): _flag(flag) for flag in typed}
    options: dict[str, Any] = dict(adapting) if method == _RFA else {}
    if targets is not None or method == _RFA:
        options["targets"] = "all" if targets is None else targets
    if targets is not None:
        given["targets"] = "--targets"
    for word in words:
        key, value = key_and_value("--method-option", word)
        if key in given:
            raise ValueError(f"--method-option: got {key} beside {given[key]}, expected it once")
        given[key], options[key] = "another --method-option", value
    METHODS[method].settings(options)
    return options


def refuse_typed(context: typer.Context, names: Sequence[str], where: str, expected: str) -> None:
    """Raise for a flag that would be ignored.

    Args:
        context: of the command, which knows the flags that were typed.
        names: of its parameters.
        where: what makes them idle, `"without MODEL"`.
        expected: what they need.

    Raises:
        ValueError: one of them was typed.
    """
    if typed := [_flag(name) for name in names if _was_typed(context, name)]:
        raise ValueError(f"{typed[0]}: got a value {where}, expected {expected}")


def refuse_idle_classes(context: typer.Context, model: str) -> None:
    """Raise for `--classes` beside a model that says itself how many outputs it has.

    Raises:
        ValueError: it was typed, and the model is none of torchvision's.
    """
    if not model.startswith("torchvision:"):
        refuse_typed(context, ("classes",), f"with {model}", "torchvision:NAME: others say how many outputs they have")


def refuse_idle_length(context: typer.Context, kind: str) -> None:
    """Raise for `--max-length` beside data of another kind than text.

    Raises:
        ValueError: it was typed, and the data are `kind`s.
    """
    if kind != "text":
        refuse_typed(context, ("max_length",), f"with {kind}s", "--data of texts")


def _was_typed(context: typer.Context, flag: str) -> bool:
    source = context.get_parameter_source(flag)
    return source is not None and source.name == "COMMANDLINE"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
