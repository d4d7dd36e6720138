"""What all contenders of a benchmark need of a model: a twin on the same weights, its labelled rows."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rfa_fast.head import predicts_next_token
from rfa_fast.objective import IGNORED_LABEL


def sharing_copy(model: nn.Module) -> nn.Module:
    """A second model on the same weights: own modules and `Parameter` objects, the same storages.

    What is done to its modules, flags and hooks does not reach the first. Tied weights stay tied. In-place changes
    of a weight or a buffer do reach it.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3))
        >>> twin = sharing_copy(net)
        >>> twin[0].weight is net[0].weight, twin[0].weight.data_ptr() == net[0].weight.data_ptr()
        (False, True)
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(model, memo)


def quiet(model: nn.Module) -> nn.Module:
    """The model in eval mode, except that layers whose checkpointing is on go on checkpointing.

    transformers checkpoints only in train mode; the flag is set on those layers alone, so that no dropout under them
    wakes up.

    Example:
        >>> quiet(nn.Sequential(nn.Dropout()))[0].training
        False
    """
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            module.training = True
    return model


def labelled_rows(model: nn.Module, labels: Tensor) -> Tensor:
    """Which positions of `(B, T)` labels cost a row of the head, for a causal model shifted by one; bool `(B, T)`.

    Example:
        >>> labelled_rows(nn.Linear(1, 1), torch.tensor([[1, -100, 2]]))
        tensor([[ True, False,  True]])
    """
    labelled = labels != IGNORED_LABEL
    if not predicts_next_token(model):
        return labelled
    return torch.cat([labelled[:, 1:], torch.zeros_like(labelled[:, :1])], 1)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of one copy of the weights: every storage of parameters and buffers once.

    Example:
        >>> weight_bytes(nn.Linear(3, 2))
        32
    """
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())
