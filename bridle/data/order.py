"""The order of the samples: a pure function of (samples in each shard, seed, epoch, position).

An epoch permutes blocks of neighbouring samples over all shards, then mixes the samples of each window of blocks.
Blocks keep reading local, windows keep neighbours apart, and no rank, worker or time enters: whoever asks gets the same
answer.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCKS_OF_EPOCH, SAMPLES_OF_WINDOW = 1, 2
WINDOWS_KEPT = 4


@dataclass(frozen=True)
class _Epoch:
    """blocks: in the epoch's order, int32 or int64 [B]. starts: first position of each window, and the end."""

    blocks: np.ndarray
    starts: np.ndarray


class SampleOrder:
    """Which sample stands at which position.

    Positions count from 0 over all epochs: position p belongs to epoch ``p // samples``. Samples are numbered through
    the shards in their order. The same numpy gives the same order for ever (numpy may change its streams of random
    numbers between versions).

    Args:
        counts: samples of each shard; at least one in all.
        seed: from 0.
        block: neighbouring samples that stay together while blocks are permuted; no block crosses a shard's end.
        window: permuted blocks whose samples are then mixed.
        shuffle: false gives the samples in their own order in every epoch.
    """

    def __init__(self, counts: Sequence[int], seed: int, block: int, window: int, shuffle: bool = True) -> None:
        if block < 1 or window < 1:
            raise ValueError(f"block {block} and window {window} must be at least 1")
        if min(counts, default=0) < 0 or sum(counts) < 1:
            raise ValueError("no samples to put in order")
        self.seed, self.block, self.window, self.shuffle = seed, block, window, shuffle
        self._firsts = np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64))])
        blocks_of_shard = -(-np.asarray(counts, dtype=np.int64) // block)
        self._first_blocks = np.concatenate([[0], np.cumsum(blocks_of_shard)])
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._recent: deque[tuple[int, int, list[int]]] = deque(maxlen=WINDOWS_KEPT)
        """Windows looked into: epoch, first position, sample numbers."""

    def __len__(self) -> int:
        """Samples of an epoch."""
        return int(self._firsts[-1])

    def locate(self, position: int) -> tuple[int, int]:
        """Epoch of a position, and the number of the sample that stands there."""
        for epoch, first, samples in self._recent:
            if 0 <= position - first < len(samples):
                return epoch, samples[position - first]
        epoch, within = divmod(position, len(self))
        starts = self._epoch(epoch).starts
        window = int(np.searchsorted(starts, within, side="right")) - 1
        samples = self._mixed(epoch, window).tolist()
        self._recent.appendleft((epoch, position - within + int(starts[window]), samples))
        return self.locate(position)

    def upcoming_shards(self, position: int) -> list[int]:
        """Shards that the window of a position and the window behind it read, in their order, each once."""
        epoch, within = divmod(position, len(self))
        plan = self._epoch(epoch)
        window = int(np.searchsorted(plan.starts, within, side="right")) - 1
        blocks = plan.blocks[window * self.window : (window + 2) * self.window]
        shards = np.searchsorted(self._first_blocks, blocks, side="right") - 1
        return list(dict.fromkeys(int(shard) for shard in shards))

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            self._epochs[epoch] = self._plan(epoch)
            while len(self._epochs) > 2:  # a batch may stand across two epochs
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _plan(self, epoch: int) -> _Epoch:
        count = int(self._first_blocks[-1])
        blocks = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
        if self.shuffle:
            np.random.default_rng((self.seed, epoch, BLOCKS_OF_EPOCH)).shuffle(blocks)
        sizes = np.full(count, self.block, dtype=np.int64)
        filled = np.diff(self._first_blocks) > 0
        last_blocks = self._first_blocks[1:][filled] - 1
        samples = np.diff(self._firsts)[filled]
        sizes[last_blocks] = samples - (np.diff(self._first_blocks)[filled] - 1) * self.block
        per_window = np.add.reduceat(sizes[blocks], np.arange(0, count, self.window))
        return _Epoch(blocks, np.concatenate([[0], np.cumsum(per_window)]))

    def _mixed(self, epoch: int, window: int) -> np.ndarray:
        """Sample numbers of a window in their mixed order, int64."""
        blocks = self._epoch(epoch).blocks[window * self.window : (window + 1) * self.window].astype(np.int64)
        shards = np.searchsorted(self._first_blocks, blocks, side="right") - 1
        firsts = self._firsts[shards] + (blocks - self._first_blocks[shards]) * self.block
        ends = np.minimum(firsts + self.block, self._firsts[shards + 1])
        samples = np.concatenate([np.arange(first, end) for first, end in zip(firsts, ends, strict=True)])
        if self.shuffle:
            np.random.default_rng((self.seed, epoch, SAMPLES_OF_WINDOW, window)).shuffle(samples)
        return samples
