"""The order of chosen samples: some of those of a set of shards, each once an epoch or as often as its weight says.

As `SampleOrder` a pure function, here of (samples, weights, seed, epoch, position). It mixes over all of the data at
once, so that samples of one shard do not stay near each other: remote shards should fit their cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from bridle.seeds import Shuffle

AHEAD = 256
"""Positions whose shards are worth fetching."""


class ChosenOrder:
    """Which sample stands at which position; see `bridle.data.order.Order`.

    Args:
        counts: samples of each shard.
        chosen: numbers of the samples, at least one.
        seed: from 0.
        weights: of the chosen; an epoch draws as many as there are, with replacement, each in proportion to its weight.
            None: each comes once an epoch.
        shuffle: false gives them in their own order in every epoch.
        origin: position at which epoch 0 begins.
    """

    def __init__(
        self,
        counts: Sequence[int],
        chosen: Sequence[int] | npt.NDArray[np.int64],
        seed: int,
        *,
        weights: npt.NDArray[np.float64] | None = None,
        shuffle: bool = True,
        origin: int = 0,
    ) -> None:
        self._chosen = np.asarray(chosen, dtype=np.int64)
        if not len(self._chosen):
            raise ValueError("no samples to put in order")
        self.seed, self.shuffle, self.origin = seed, shuffle, origin
        self._firsts = np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64))])
        self._sums = None if weights is None else np.cumsum(weights / np.sum(weights))
        self._epochs: OrderedDict[int, npt.NDArray[np.int64]] = OrderedDict()
        self.samples_per_epoch = Fraction(len(self._chosen))

    def begin(self, epoch: int) -> int:
        """First position of an epoch."""
        return self.origin + epoch * len(self._chosen)

    def locate(self, position: int) -> tuple[int, int]:
        """Epoch of a position, and the number of the sample that stands there."""
        if position < self.origin:
            raise ValueError(f"position {position} stands before {self.origin}, where this order begins")
        epoch, place = divmod(position - self.origin, len(self._chosen))
        return epoch, int(self._epoch(epoch)[place])

    def upcoming_shards(self, position: int) -> list[int]:
        """Shards that the next positions read, in their order, each once."""
        samples = [self.locate(ahead)[1] for ahead in range(position, position + min(AHEAD, len(self._chosen)))]
        shards = np.searchsorted(self._firsts, samples, side="right") - 1
        return list(dict.fromkeys(int(shard) for shard in shards))

    def _epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self._epochs:
            self._epochs[epoch] = self._drawn(epoch)
            while len(self._epochs) > 2:  # a batch may stand across two epochs
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _drawn(self, epoch: int) -> npt.NDArray[np.int64]:
        if not self.shuffle:
            return self._chosen
        rng = np.random.default_rng((self.seed, epoch, Shuffle.CHOSEN))
        if self._sums is None:
            return rng.permutation(self._chosen)
        places = np.searchsorted(self._sums, rng.random(len(self._chosen)), side="right")
        return self._chosen[np.minimum(places, len(self._chosen) - 1)]
