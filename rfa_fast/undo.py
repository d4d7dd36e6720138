"""What `patch` found and changed besides the layers, so that `merge` and `remove` can put it back."""

from __future__ import annotations

import warnings
from collections import Counter

from torch import nn

from rfa_fast.names import unwrapped
from rfa_fast.targets import Target


class Undo:
    """Remembers `requires_grad`, train and in-place flags and a tied head of a model.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> undo = Undo(net)
        >>> _ = net.requires_grad_(False).eval()
        >>> undo.restore(keep_untied=True)
        >>> net.weight.requires_grad, net.training
        (True, True)
    """

    def __init__(self, model: nn.Module) -> None:
        self._config: object = getattr(unwrapped(model), "config", None)
        # By place: load_state_dict(assign=True) puts other parameters there. By object where the place is empty.
        self._requires_grad = [
            (module, key, parameter, parameter.requires_grad)
            for module in model.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._training = [(m, m.training) for m in model.modules()]
        # The operators keep a layer's output for the backward: an activation must not overwrite it.
        self._in_place = [m for m in model.modules() if getattr(m, "inplace", False) is True]
        self._untied: list[tuple[nn.Module, nn.Parameter]] = []
        self._tie_flag: bool | None = None

    def forbid_in_place(self) -> None:
        """Let activations such as `nn.ReLU(inplace=True)` return a tensor of their own."""
        self._set_in_place(False)

    def _set_in_place(self, flag: bool) -> None:
        for module in self._in_place:
            object.__setattr__(module, "inplace", flag)

    def untie(self, head: nn.Module, target: Target) -> None:
        """Give a tied head a weight of its own, say so, and correct the model's configuration.

        One flag of transformers stands for all the ties of a model. Where there are more (encoder and decoder share
        their embeddings, a head its bias), it stays: what they share is saved once, and without it not found again.
        """
        weight = head._parameters["weight"]
        if weight is None:
            raise TypeError(f"layer {target.name!r}: got no weight, expected a Parameter")
        flagged = hasattr(self._config, "tie_word_embeddings")
        ends = flagged and not self._shared_beside(head)
        said = "the model's configuration says so from now on (tie_word_embeddings=False)"
        if not ends:
            said = "other ties of the model stay, and so does its configuration"
            said += "; transformers 5 leaves the head as it is saved, one before that would tie it again" * flagged
        warnings.warn(
            f"{target.name}: its weight is tied to {target.tied_to}; it gets a copy of its own, and {said}",
            stacklevel=4,
        )
        own = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        self._untied.append((head, weight))
        head._parameters["weight"] = own
        if ends:
            self._tie_flag = bool(self._config.tie_word_embeddings)  # type: ignore[attr-defined]
            self._config.tie_word_embeddings = False  # type: ignore[attr-defined]

    def _shared_beside(self, head: nn.Module) -> bool:
        """Whether parameters have several places even without the head's weight."""
        places = Counter(
            id(parameter) for module, key, parameter, _ in self._requires_grad if (module, key) != (head, "weight")
        )
        return any(count > 1 for count in places.values())

    def restore(self, *, keep_untied: bool) -> None:
        """Put the flags back, and the tied weight unless it was merged into."""
        if not keep_untied:
            for head, weight in self._untied:
                head._parameters["weight"] = weight
            if self._tie_flag is not None and hasattr(self._config, "tie_word_embeddings"):
                self._config.tie_word_embeddings = self._tie_flag
        for module, key, parameter, flag in self._requires_grad:
            now = module._parameters.get(key)
            (parameter if now is None else now).requires_grad_(flag)
        for module, training in self._training:
            module.training = training
        self._set_in_place(True)
