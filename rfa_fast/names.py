"""Names: of layers as the user wrote the model, without what compiling or wrapping put in; and a few of many."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "AveragedModel": "module",
    "DeepSpeedEngine": "module",
    "PeftModel": "base_model",
    "BaseTuner": "model",
}


def some(names: Iterable[str], most: int = 3) -> str:
    """The first of them, and how many more there are, for a message.

    Example:
        >>> some(["a", "b", "c", "d"])
        'a, b, c and 1 more'
    """
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Module name -> its name without what compiling or wrapping put in.

    Example:
        >>> canonical_names(nn.DataParallel(nn.Sequential(nn.Linear(1, 1))))
        {'': '', 'module': '', 'module.0': '0'}
    """
    modules, plain = dict(model.named_modules()), {"": ""}
    for name in modules:
        if name:
            parent, _, leaf = name.rpartition(".")
            inside = plain[parent]
            plain[name] = inside if leaf == hidden_child(modules[parent]) else f"{inside}.{leaf}" if inside else leaf
    return plain


def is_a(value: object, class_name: str) -> bool:
    """Whether a class of that name is among the bases; asked by name, it needs no import of what may be absent.

    Example:
        >>> is_a(nn.Linear(1, 1), "Module"), is_a(nn.Linear(1, 1), "DTensor")
        (True, False)
    """
    return any(c.__name__ == class_name for c in type(value).__mro__)


def hidden_child(module: nn.Module) -> str | None:
    """The child that a wrapper hides the model in, or `None` when the module is no wrapper.

    Example:
        >>> hidden_child(nn.DataParallel(nn.Linear(1, 1))), hidden_child(nn.Linear(1, 1))
        ('module', None)
    """
    return next((_WRAPPERS[c.__name__] for c in type(module).__mro__ if c.__name__ in _WRAPPERS), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, which has the configuration and the methods that a wrapper does not pass on.

    Example:
        >>> unwrapped(nn.DataParallel(nn.Linear(1, 1)))
        Linear(in_features=1, out_features=1, bias=True)
    """
    child = hidden_child(model)
    inner = None if child is None else model._modules.get(child)
    return model if inner is None else unwrapped(inner)
