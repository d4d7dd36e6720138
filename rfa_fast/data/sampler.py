"""Batches that mix what is to be forgotten with what is to be kept.

In a plain shuffle a small forget set is in few batches: 128 of 50,000 samples at batch size 128 are
missing from about 72 % of them. Each group's loss is a mean over its own samples, so that a lone
forget sample then weighs as much as the 127 retained ones beside it, and in all other batches only
the retain terms act. Putting forget samples into every batch evens that out, at the price of
seeing each of them several times per epoch of the retained data: the more there is to keep, the
more often (128 at batch size 128: 1.8 times with 30,000 samples, 3.7 times with 60,000), so that
settings do not carry over to more data. `"natural"`, the paper's shuffle, shows each once whatever
is beside it.

Retained samples come first in a mixed batch and forget samples last: their places are the same in
every batch, and no loss depends on the order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch.utils.data import Sampler

from rfa_fast.data.draws import generator, integer, permutation

PerBatch = Literal["auto", "natural"] | int


class ForgetRetainBatchSampler(Sampler[list[int]]):
    """Batches of indices into :class:`~rfa_fast.data.MixedDataset` (`retain` first, then `forget`).

    An index below `n_retain` is a retained sample; one from `n_retain` on is forget sample
    `index - n_retain`. An epoch is one pass over the retained data; its last batch may be smaller.
    The order is a function of (seed, epoch) alone.

    Args:
        n_forget, n_retain: sizes of the two sets. When one is empty the batches are those of a plain
            shuffle of the other.
        batch_size: samples per batch.
        forget_per_batch: how many of them are forget samples. `"auto"`: their share of the data, rounded up,
            at least one, at most `n_forget`, and never the whole batch. A number:
            exactly that many. Both cycle through fresh shuffles of the forget set, so that within
            an epoch every forget sample is seen equally often ± 1, and no batch holds one twice
            unless it asks for more than there are. `"natural"`: a plain shuffle of both together,
            each sample once.
        seed, epoch: what the order depends on; :meth:`set_epoch` goes on to another epoch.
        start: batches to leave out at the beginning, to go on where a run stopped; the others are
            those of the full epoch.

    Attributes:
        batches: batches of a full epoch. `len()` is what is left of it from `start` on.

    Raises:
        TypeError, ValueError: an argument out of range; both sets empty; a batch too small for both.

    Example:
        >>> sampler = ForgetRetainBatchSampler(n_forget=2, n_retain=6, batch_size=4, seed=0)
        >>> [[index >= 6 for index in batch] for batch in sampler]
        [[False, False, False, True], [False, False, False, True]]
        >>> rest = ForgetRetainBatchSampler(n_forget=2, n_retain=6, batch_size=4, seed=0, start=1)
        >>> list(rest) == list(sampler)[1:]
        True
    """

    def __init__(
        self,
        n_forget: int,
        n_retain: int,
        batch_size: int,
        *,
        forget_per_batch: PerBatch = "auto",
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
    ) -> None:
        self.n_forget = integer("n_forget", n_forget, minimum=0)
        self.n_retain = integer("n_retain", n_retain, minimum=0)
        self.batch_size = integer("batch_size", batch_size, minimum=1)
        self.seed = integer("seed", seed)
        self.epoch = integer("epoch", epoch, minimum=0)
        self.forget_per_batch = forget_per_batch
        if self.n_forget + self.n_retain == 0:
            raise ValueError("n_forget, n_retain: got 0 and 0, expected at least one sample")
        self.forget_each = self._forget_each()
        self.retain_each = self.batch_size - self.forget_each
        passed_over = self.n_retain if self.forget_each else self.n_retain + self.n_forget
        self.batches = -(-passed_over // self.retain_each)
        self.start = integer("start", start, minimum=0)
        if self.start > self.batches:
            raise ValueError(f"start: got {start}, expected at most the {self.batches} batches of an epoch")

    def _forget_each(self) -> int:
        """Forget samples in every batch; 0 stands for a plain shuffle of whatever there is."""
        asked = self.forget_per_batch
        if isinstance(asked, str):
            if asked not in ("auto", "natural"):
                raise ValueError(f"forget_per_batch: got {asked!r}, expected 'auto', 'natural' or a number")
            if asked == "natural" or not self.n_forget or not self.n_retain:
                return 0
            if self.batch_size == 1:
                raise ValueError(
                    "batch_size: got 1, expected 2 or more, so that a batch holds forget and retain samples; "
                    "forget_per_batch='natural' takes 1"
                )
            share = math.ceil(
                self.batch_size * self.n_forget / (self.n_forget + self.n_retain)
            )  # so that none is missed
            return min(max(1, share), self.n_forget, self.batch_size - 1)
        asked = integer("forget_per_batch", asked, minimum=1)
        for name, size in (("n_forget", self.n_forget), ("n_retain", self.n_retain)):
            if not size:
                raise ValueError(f"{name}: got 0 with forget_per_batch={asked}, expected 1 or more (or 'auto')")
        if asked >= self.batch_size:
            raise ValueError(
                f"forget_per_batch: got {asked}, expected less than batch_size={self.batch_size}: "
                "an epoch is a pass over the retained data"
            )
        return asked

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Go on to another epoch, at batch `start` of it.

        Example:
            >>> sampler = ForgetRetainBatchSampler(2, 6, 4, seed=0)
            >>> first = list(sampler)
            >>> sampler.set_epoch(1)
            >>> list(sampler) == first
            False
        """
        epoch, start = integer("epoch", epoch, minimum=0), integer("start", start, minimum=0)
        if start > self.batches:
            raise ValueError(f"start: got {start}, expected at most the {self.batches} batches of an epoch")
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[int]]:
        each, per_batch = self.retain_each, self.forget_each
        if not per_batch:
            order = permutation(self.n_retain + self.n_forget, self.seed, self.epoch, "all")
            for batch in range(self.start, self.batches):
                yield order[batch * each : (batch + 1) * each]
            return
        retain = permutation(self.n_retain, self.seed, self.epoch, "retain")
        forget = self._forget_order(self.batches * per_batch)
        for batch in range(self.start, self.batches):
            kept = retain[batch * each : (batch + 1) * each]
            yield kept + [self.n_retain + i for i in forget[batch * per_batch : (batch + 1) * per_batch]]

    def _forget_order(self, count: int) -> list[int]:
        """`count` forget samples: one shuffle of the set after another."""
        per_batch, stream = self.forget_each, generator(self.seed, self.epoch, "forget")
        order: list[int] = []
        while len(order) < count:
            lap: list[int] = torch.randperm(self.n_forget, generator=stream).tolist()
            begun = len(order) % per_batch
            if begun and per_batch <= self.n_forget:
                # The batch that the last shuffle left unfinished takes samples it does not hold yet.
                held = set(order[-begun:])
                first = [i for i in lap if i not in held][: per_batch - begun]
                taken = set(first)
                lap = first + [i for i in lap if i not in taken]
            order += lap
        return order[:count]
