"""A model from a word on the command line, and a model back to disk.

Three kinds of words: a folder that transformers wrote (or a name on the Hugging Face hub that was fetched
before), `torchvision:NAME`, or `package.module:factory` for everything else. Weights come from files that
cannot run code (:mod:`rfa_fast.weights`), and from this machine alone, because a name that silently turns
into a download is a name that silently turns into another model.

Weights that do not fill the model are an error here, where transformers would draw the missing ones at
random and go on: unlearning from a random head looks like success.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rfa_fast.files import full_disk_as_os_error, read_object, save_tensors
from rfa_fast.hub import fetch_command, hub_folder, is_name
from rfa_fast.names import some
from rfa_fast.weights import PICKLES, READ, fill, one_line, read_state, require_safetensors
from rfa_fast.weights import check_weights_file as check_weights_file

Task = Literal["text", "image", "language", "unknown"]

WEIGHTS_FILE = "model.safetensors"
_TASKS: tuple[tuple[str, Task], ...] = (
    ("ForSequenceClassification", "text"),
    ("ForImageClassification", "image"),
    ("ForCausalLM", "language"),
    ("LMHeadModel", "language"),
)
_AUTO = {
    "text": "AutoModelForSequenceClassification",
    "image": "AutoModelForImageClassification",
    "language": "AutoModelForCausalLM",
}
_FORMS = "a folder with config.json and safetensors weights (transformers), torchvision:NAME, or package.module:factory"
_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class OpenedModel:
    """A model and what is known about it.

    Attributes:
        model: in eval mode, on the CPU.
        name: the word it was opened by.
        source: `"transformers"`, `"torchvision"` or `"factory"`.
        task: what it is for: `"text"` or `"image"` classification, a causal `"language"` model, or
            `"unknown"` where neither the class nor the configuration says.
        labels: class names by index, where its configuration names them.
        tokenizer: of transformers, `None` without one.
    """

    model: nn.Module
    name: str
    source: Literal["transformers", "torchvision", "factory"]
    task: Task
    labels: tuple[str, ...] = ()
    tokenizer: Any = None


def open_model(
    name: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    classes: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> OpenedModel:
    """The model that a name stands for, with its weights.

    Args:
        name: a transformers folder, or the name of one in the hub's local cache (`"distilbert/…"`);
            `torchvision:resnet18` or any other classification model of torchvision; or
            `package.module:factory`, a callable without arguments that returns a module, or a module, of
            which a copy is taken, looked for in the current folder too.
        weights: a .safetensors or .pth file with the whole state dict, for the last two kinds.
        classes: number of outputs of a torchvision model (its own default when not given).
        tokenizer: folder of the tokenizer; by default the model's own folder.
        dtype: `"auto"` (as the weights are stored, whatever their configuration says; where they are of several
            dtypes, or quantised, as it says), `"float32"`, `"bfloat16"` or `"float16"`.
        trust_remote_code: let a transformers folder bring Python code of its own, which is then run.

    Raises:
        FileNotFoundError: the folder or the file does not exist, or holds no weights.
        ValueError: an unknown name, an unsupported architecture, a pickle, or weights that do not fit.
        TypeError: the factory cannot be called, or returns no module; or a module that cannot be copied.

    Example:
        >>> opened = open_model("torchvision:resnet18", classes=10)
        >>> type(opened.model).__name__, opened.model.fc.out_features, opened.task
        ('ResNet', 10, 'image')
    """
    text = os.fspath(name)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(_DTYPES)}")
    if weights is not None:
        weights = check_weights_file(weights, READ)
    labels: tuple[str, ...] = ()
    source: Literal["transformers", "torchvision", "factory"]
    if text.startswith("torchvision:"):
        source, model = "torchvision", _from_torchvision(text.partition(":")[2], classes)
    elif (folder := Path(text) if Path(text).is_dir() else hub_folder(text)) is not None:
        if weights is not None:
            raise ValueError(
                f"weights: got {weights} beside the folder {folder}, expected none: the folder has its own"
            )
        source, model = "transformers", _from_folder(folder, dtype, trust_remote_code=trust_remote_code)
        labels = _own_labels(model)
        tokenizer = _tokenizer_folder(folder) if tokenizer is None else tokenizer
    elif re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text) and not Path(text).exists():
        source, model = "factory", _from_factory(text)
    else:
        raise _no_model(text)
    if weights is not None:
        fill(model, read_state(weights), str(weights))
    wanted = _DTYPES[dtype]
    if wanted is not None:
        model.to(wanted)
    task: Task = "image" if source == "torchvision" else _task_of(type(model).__name__)
    opened = None if tokenizer is None else open_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    return OpenedModel(model.eval(), text, source, task, labels, opened)


def open_tokenizer(folder: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder, from this machine alone.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder holds none that can be read.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"tokenizer: {os.fspath(folder)} is no folder, expected one with a tokenizer")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"tokenizer: {os.fspath(folder)} has none that can be read ({one_line(error)})") from error


def save_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    preprocessing: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a model so that :func:`open_model` reads it back; the folder appears whole or not at all.

    A transformers model goes through its own `save_pretrained`, with the tokenizer beside it; any other
    becomes `model.safetensors`, its whole state dict. A folder of the same name is replaced.

    Args:
        model: what is written.
        folder: where to.
        tokenizer: of a transformers model.
        preprocessing: a `preprocessor_config.json` that is copied beside a transformers model: without it, nobody knows
            how images were shown to the model.

    Raises:
        FileExistsError: `folder` is a file.
        OSError: it cannot be written; what was there is untouched.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     [file.name for file in save_model(nn.Linear(2, 2), Path(place) / "model").iterdir()]
        ['model.safetensors']
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target}: is a file, expected a folder or a new name")
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        if _is_transformers(model):
            with without_bars(), full_disk_as_os_error(target):
                model.save_pretrained(partial)  # type: ignore[operator]
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            if preprocessing is not None:
                shutil.copyfile(preprocessing, partial / Path(preprocessing).name)
        else:
            save_tensors(model, partial / WEIGHTS_FILE)
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _from_folder(folder: Path, dtype: str, *, trust_remote_code: bool) -> nn.Module:
    config = _read_config(folder)
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    task = "unknown" if name is None else _task_of(name)
    if name is None or task == "unknown":
        expected = ", ".join(f"…{ending}" for ending, _ in _TASKS)
        raise ValueError(f"{folder}/config.json: architectures: got {names!r}, expected one class, of {expected}")
    require_safetensors(folder)
    import transformers

    if isinstance(config.get("auto_map"), dict) and not hasattr(transformers, name):
        if not trust_remote_code:
            raise ValueError(
                f"{folder}: {name} is Python code in that folder, which would be run; read it, then say "
                "trust_remote_code=True (--trust-remote-code)"
            )
        name = _AUTO[task]
    if not hasattr(transformers, name):
        raise ValueError(
            f"{folder}/config.json: architectures: got {name!r}, which transformers {transformers.__version__} does "
            "not have; upgrade transformers"
        )
    from safetensors import SafetensorError

    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    try:
        wanted = _DTYPES[dtype] or ("auto" if "quantization_config" in config else _stored_dtype(folder) or "auto")
        with without_bars():
            model, info = getattr(transformers, name).from_pretrained(
                folder, dtype=wanted, output_loading_info=True, **options
            )
    except (SafetensorError, RuntimeError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"{folder}: cannot be read as {name} ({one_line(error)}); is a file cut short?") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{folder}: its weights lack {some(missing)} of {name}; expected a trained model with all of its weights"
        )
    found: nn.Module = model
    return found


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of the floating weights, from the headers of their files; `None` where they have several or another."""
    from safetensors import safe_open

    index = folder / f"{WEIGHTS_FILE}.index.json"
    names = {WEIGHTS_FILE}
    if not (folder / WEIGHTS_FILE).is_file():
        if not index.is_file():
            return None
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    found: set[str] = set()
    for name in names:
        with safe_open(folder / name, "pt") as file:
            found |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - no mapping
    floating = {kind for kind in found if "F" in kind}
    return _STORED.get(floating.pop()) if len(floating) == 1 else None


def _read_config(folder: Path) -> Mapping[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{folder}: holds an adapter, expected a model; name the model that it was trained on")
        raise FileNotFoundError(f"{folder}: holds no config.json, expected {_FORMS}")
    return read_object(file, "a model's configuration")


def _from_torchvision(name: str, classes: int | None) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "torchvision.models.list_models() lists them"
        raise ValueError(f"torchvision: got {name!r}, expected one of its classification models; {hint}")
    options = {} if classes is None else {"num_classes": classes}
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = models.get_model(name, weights=None, **options)
    return model


def _from_factory(text: str) -> nn.Module:
    module_name, _, path = text.partition(":")
    here = os.getcwd()
    # Last, not first: a file of the user's should not hide an installed package of the same name.
    sys.path.append(here)
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{text}: got module {module_name!r}, which cannot be imported ({error}); expected an installed module "
            f"or a file in {here}"
        ) from error
    finally:
        sys.path.remove(here)
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{text}: {module_name} has no {path!r}, expected a callable that returns the model")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        try:
            return copy.deepcopy(found)  # opened twice, to compare, it has to be two models
        except (RuntimeError, TypeError) as error:
            raise TypeError(
                f"{text}: got a {type(found).__name__} that cannot be copied ({one_line(error)}); expected a callable "
                "that returns a new one"
            ) from error
    if not callable(found):
        raise TypeError(f"{text}: got {type(found).__name__}, expected a callable without arguments")
    needed = [
        p.name
        for p in inspect.signature(found).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise TypeError(f"{text}: needs the arguments {', '.join(needed)}, expected a callable without arguments")
    model = found()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{text}: returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def _no_model(text: str) -> Exception:
    path = Path(text)
    if path.suffix.lower() in PICKLES:
        return ValueError(f"model: got {text}, a pickle, which runs code when it is read; expected {_FORMS}")
    if path.is_file():
        return ValueError(f"model: got the file {text}, expected {_FORMS}; weights alone go to weights= (--weights)")
    known = is_name(text) and not path.suffix
    hint = f"; a name on the hub is found once `{fetch_command(text)}` has fetched it" if known else ""
    return FileNotFoundError(f"model: {text} is no folder here, and nothing is downloaded; expected {_FORMS}{hint}")


def _task_of(name: str) -> Task:
    return next((task for ending, task in _TASKS if name.endswith(ending)), "unknown")


def _own_labels(model: nn.Module) -> tuple[str, ...]:
    """The configuration's class names, unless they are transformers' placeholders."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(names, Mapping) or sorted(names) != list(range(len(names))):
        return ()
    labels = tuple(str(names[i]) for i in range(len(names)))
    return () if all(re.fullmatch(r"LABEL_\d+", label) for label in labels) else labels


def _tokenizer_folder(folder: Path) -> Path | None:
    return folder if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file() else None


def _is_transformers(model: nn.Module) -> bool:
    return hasattr(model, "config") and callable(getattr(model, "save_pretrained", None))


@contextmanager
def without_bars() -> Iterator[None]:
    """No bar of transformers' for reading a file; its setting is as before afterwards.

    Example:
        >>> from transformers.utils import logging
        >>> with without_bars():
        ...     logging.is_progress_bar_enabled()
        False
    """
    from transformers.utils import logging

    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
