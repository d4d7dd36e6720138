"""Weights from files that cannot run code: safetensors, and the .pth files that torchvision publishes.

A pickle runs code when it is read. A .pth file is one, but torch reads it with an unpickler that makes
tensors and plain containers and nothing else (`weights_only=True`; sound from torch 2.6 on, the oldest that
this package runs with). That is accepted for .pth alone, because torchvision publishes its weights in no
other form; every other pickle has to be converted once by who trusts it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

# Named to be caught: what torch's own unpickler raises. Nothing is unpickled here.
from pickle import UnpicklingError  # noqa: TID251
from typing import Any

import torch
from torch import Tensor, nn

from rfa_fast.names import some

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
READ = (".safetensors", ".pth")
# Where training scripts put the state dict when they save more than that.
INSIDE = ("state_dict", "model")


def check_weights_file(path: str | os.PathLike[str], suffixes: Sequence[str] = (".safetensors",)) -> Path:
    """The path of a weights file that exists and has one of `suffixes`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format; a pickle is refused with the reason.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    expected = f"expected a {' or '.join(suffixes)} file"
    if suffix in PICKLES and suffix not in suffixes:
        raise ValueError(
            f"weights: got {file}, a pickle, which runs code when it is read; {expected}. Where you "
            f"trust it, convert it once: safetensors.torch.save_file(state_dict, {file.stem + '.safetensors'!r})"
        )
    if not file.is_file():
        raise FileNotFoundError(f"weights: {file} does not exist, {expected}")
    if suffix not in suffixes:
        raise ValueError(f"weights: got {file}, {expected}")
    return file


def require_safetensors(folder: Path) -> None:
    """Check that a folder of transformers' has its weights as safetensors.

    Raises:
        FileNotFoundError: it has none.
        ValueError: it has them as a pickle only.
    """
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in PICKLES)
    if pickles:
        raise ValueError(
            f"{folder}: got weights in {', '.join(pickles)}, a pickle, which runs code when it is read; expected "
            "model.safetensors. Where you trust it, convert it once: load it in transformers and save_pretrained()"
        )
    raise FileNotFoundError(f"{folder}: holds no weights, expected model.safetensors beside config.json")


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file by name, on the CPU.

    Raises:
        FileNotFoundError, ValueError: as :func:`check_weights_file`; a file that is cut short, or a .pth with
            anything but tensors in it.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "linear.pth"
        >>> torch.save(nn.Linear(2, 3).state_dict(), file)
        >>> sorted(read_state(file))
        ['bias', 'weight']
    """
    file = check_weights_file(path, READ)
    if file.suffix.lower() == ".safetensors":
        return read_safetensors(file, "weights")
    try:
        values: Any = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251 - see the module
    except (UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"weights: {file} cannot be read as tensors alone ({one_line(error).partition('. ')[0]}); is it cut short, "
            "or more than a state dict?"
        ) from error
    if isinstance(values, Mapping):
        values = next((values[key] for key in INSIDE if isinstance(values.get(key), Mapping)), values)
    if not isinstance(values, Mapping) or not values or not all(isinstance(v, Tensor) for v in values.values()):
        got = some(sorted(map(str, values))) if isinstance(values, Mapping) else type(values).__name__
        raise ValueError(f"weights: {file} holds {got or 'nothing'}, expected a state dict: tensors by name")
    # A plain dict: without the version that a state dict carries, old BatchNorms may lack their step counter.
    return {str(name): tensor for name, tensor in values.items()}


def read_safetensors(file: str | os.PathLike[str], name: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file by name, on the CPU; `name` begins the message of an error.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is cut short.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "cut.safetensors"
        >>> _ = file.write_bytes(b"")
        >>> read_safetensors(file, "initial")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: initial: ...cut.safetensors cannot be read (...); is it cut short?
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{name}: {file} cannot be read ({one_line(error)}); is it cut short?") from error


def fill(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load a whole state dict, or say what does not fit and leave the model alone.

    Args:
        model: takes the values, in its own dtypes.
        state: every parameter and buffer by name; of tensors that modules share one name is enough, and the step
            counters of BatchNorm, which nothing reads in eval mode, may be missing.
        origin: the file, for messages.

    Raises:
        ValueError: a name or a shape that the model does not have, or one of its own that is missing.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> fill(layer, {"weight": torch.ones(1, 1)}, "w.safetensors")
        Traceback (most recent call last):
        ...
        ValueError: weights: w.safetensors does not fill Linear (it lacks bias)
    """
    own = model.state_dict(keep_vars=True)
    for key, value in state.items():
        if key in own and own[key].shape != value.shape:
            shapes = f"{key} of shape {tuple(value.shape)}, expected {tuple(own[key].shape)}, the model's"
            raise ValueError(f"weights: {origin} has {shapes}")
    kind = type(model).__name__
    if unknown := sorted(set(state) - set(own)):
        raise ValueError(f"weights: {origin} has {some(unknown)}, which {kind} has not")
    given = {id(own[key]) for key in state}
    lacking = [key for key, value in own.items() if id(value) not in given and not key.endswith("num_batches_tracked")]
    if lacking:
        raise ValueError(f"weights: {origin} does not fill {kind} (it lacks {some(lacking)})")
    model.load_state_dict(dict(state), strict=False)


def one_line(error: Exception) -> str:
    """An error's text on one line.

    Example:
        >>> one_line(ValueError("a\\n  b"))
        'a b'
    """
    return " ".join(str(error).split())
