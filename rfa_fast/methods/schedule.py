"""The learning rate of a step, for training and for unlearning."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

Schedule = Literal["constant", "linear", "cosine"]


def check_schedule(schedule: str, *, warmup_steps: int = 0) -> None:
    """Refuse what no run can have, before anything is read.

    Raises:
        ValueError: an unknown schedule or a negative warm-up.

    Example:
        >>> check_schedule("cosine", warmup_steps=500)
    """
    if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise ValueError(f"warmup_steps: got {warmup_steps!r}, expected an integer >= 0")
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule: got {schedule!r}, expected 'constant', 'linear' or 'cosine'")


def steps_in_all(steps: int | None, max_steps: int | None) -> int | None:
    """At which step a run ends: that of its last epoch, or `max_steps` where that comes first; `None`: not known.

    Example:
        >>> steps_in_all(10, 4), steps_in_all(None, 4), steps_in_all(10, None)
        (4, 4, 10)
    """
    if steps is None or max_steps is None:
        return max_steps if steps is None else steps
    return min(steps, max_steps)


def learning_rates(
    lr: float, schedule: str = "constant", *, warmup_steps: int = 0, total: int | None
) -> Callable[[int], float]:
    """The learning rate of a step, by its number from 0 on.

    Args:
        lr: the rate after the warm-up.
        schedule: afterwards `"constant"`, or falling to 0 behind the last step, linearly or as a cosine.
        warmup_steps: steps in which the rate rises linearly from 0 to `lr`.
        total: steps in all, behind which the rate stays 0; `None` where that is not known, which only `"constant"`
            does without.

    Raises:
        ValueError: what :func:`check_schedule` refuses, or a falling rate without an end.

    Example:
        >>> rate = learning_rates(0.4, "linear", warmup_steps=1, total=5)
        >>> [round(rate(step), 3) for step in range(5)]
        [0.4, 0.4, 0.3, 0.2, 0.1]
    """
    check_schedule(schedule, warmup_steps=warmup_steps)
    if schedule != "constant" and total is None:
        raise ValueError(f"schedule: got {schedule!r} for a loader without length, expected max_steps=… as well")
    return partial(_rate, lr=lr, warmup=warmup_steps, schedule=schedule, total=total)


def _rate(step: int, *, lr: float, warmup: int, schedule: str, total: int | None) -> float:
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant" or total is None:
        return lr
    done = min(1.0, (step - warmup) / max(1, total - warmup))  # a loader may give more than it said
    return lr * (1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
