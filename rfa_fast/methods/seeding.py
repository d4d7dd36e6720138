"""Random numbers that belong to one run and to one step of it.

A run that is killed and resumed has to draw what the uninterrupted run would have drawn. Saving the
generators' states would do for torch alone; data augmentation also draws from `random` and numpy,
and a resumed run enters its data at another point. So nothing is saved: every step is seeded anew
from (seed, step), which costs microseconds. The caller's generators are put back afterwards.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all of `parts` and on nothing else.

    Example:
        >>> derive_seed(0, "step", 1) == derive_seed(0, "step", 1)
        True
        >>> derive_seed(0, "step", 1) == derive_seed(0, "step", 2)
        False
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's CPU generator, the generator of `device`, numpy's legacy one and `random`.

    `torch.manual_seed` would also reach accelerators that the run does not use and does not restore.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[_index(device)].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def isolated_generators(device: torch.device) -> Iterator[None]:
    """A context after which every generator that :func:`seed_generators` touches is as before.

    Example:
        >>> state = torch.get_rng_state()
        >>> with isolated_generators(torch.device("cpu")):
        ...     seed_generators(7, torch.device("cpu"))
        >>> torch.equal(state, torch.get_rng_state())
        True
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices=[_index(device)] if device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
