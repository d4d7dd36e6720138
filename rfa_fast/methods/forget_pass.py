"""Everything that is to be forgotten, once, beside the run's own order of batches.

Some methods want to see the whole forget set at a certain moment: SalUn before its first step, SCRUB's
rewinding after an epoch. The run's loader cannot be asked for that while it is under way (a persistent
worker would start its epoch anew), so the samples are read here in their own order, one process, under
seeds of their own, and the generators of the run are left as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from rfa_fast.methods.base import Batch
from rfa_fast.methods.parts import parts
from rfa_fast.methods.seeding import derive_seed, isolated_generators, seed_generators

_SIZE = 32  # of a batch where the loader's sampler alone knows it


@dataclass(frozen=True)
class ForgetPass:
    """The forget samples as batches on the CPU; every iteration gives the same.

    Attributes:
        dataset: the samples.
        collate: makes a batch of items.
        size: samples per batch; `None` where an item is a batch already.
        seed, device: of the run.

    Example:
        >>> whole = ForgetPass([(torch.zeros(2), 1)] * 3, torch.utils.data.default_collate, 2, 0, torch.device("cpu"))
        >>> [len(batch.labels) for batch in whole]
        [2, 1]
    """

    dataset: Any
    collate: Callable[[list[Any]], Any]
    size: int | None
    seed: int
    device: torch.device

    @classmethod
    def of_loader(cls, loader: DataLoader[Any], seed: int, device: torch.device) -> ForgetPass:
        """The samples of a loader, without its order."""
        items_are_batches = loader.batch_size is None and loader.batch_sampler is None
        size = None if items_are_batches else loader.batch_size or _SIZE
        return cls(loader.dataset, loader.collate_fn, size, seed, device)

    def __len__(self) -> int:
        """Batches."""
        return -(-len(self.dataset) // (self.size or 1))

    def __iter__(self) -> Iterator[Batch]:
        with isolated_generators(self.device):
            batches = iter(DataLoader(self.dataset, batch_size=self.size, collate_fn=self.collate))
            number = 0
            while True:
                seed_generators(derive_seed(self.seed, "forget pass", number), self.device)
                batch = next(batches, None)
                if batch is None:
                    return
                inputs, labels = parts("forget", batch)
                yield Batch(inputs, labels, torch.ones(len(labels), dtype=torch.bool))
                number += 1
