"""The order of the samples: a pure function of (samples in each shard, weights of the sources, seed, epoch, position).

An epoch permutes blocks of neighbouring samples over all shards, then mixes the samples of each window of blocks.
Blocks keep reading local, windows keep neighbours apart, and no rank, worker or time enters: whoever asks gets the same
answer.

A source of n samples and weight w is read as an endless row of passes over all of it; epoch e takes the samples from
floor(e w n) to floor((e + 1) w n) of that row. So each sample is seen exactly w times an epoch, and where w is a
fraction a/b, exactly a times in every b epochs.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

from bridle.seeds import Shuffle

WINDOWS_KEPT = 4


class Order(Protocol):
    """Which sample stands at which position, counted from 0 over all epochs."""

    samples_per_epoch: Fraction

    def begin(self, epoch: int) -> int:
        """First position of an epoch."""
        ...

    def locate(self, position: int) -> tuple[int, int]:
        """Epoch of a position, and the number of the sample that stands there."""
        ...

    def upcoming_shards(self, position: int) -> list[int]:
        """Shards that are read from a position on, in their order, each once."""
        ...


@dataclass(frozen=True)
class Source:
    """shards: how many neighbouring shards it has. weight: times that an epoch sees each of their samples, above 0."""

    shards: int
    weight: Fraction = Fraction(1)


@dataclass(frozen=True)
class _Epoch:
    """blocks: in the epoch's order, int32 or int64 [B]; those from the number of blocks on stand for `pieces`.

    pieces: first sample and end of each block that the epoch takes a part of, int64 [P, 2]. starts: first position of
    each window within the epoch, and the end, int64 [W + 1].
    """

    blocks: np.ndarray
    pieces: np.ndarray
    starts: np.ndarray


class SampleOrder:
    """Which sample stands at which position.

    Positions count from 0 over all epochs. Samples are numbered through the shards in their order. The same numpy gives
    the same order for ever (numpy may change its streams of random numbers between versions).

    Args:
        counts: samples of each shard; at least one in all.
        seed: from 0.
        block: neighbouring samples that stay together while blocks are permuted; no block crosses a shard's end.
        window: permuted blocks whose samples are then mixed.
        shuffle: false gives the samples in their own order in every epoch.
        sources: of all shards, in their order; none: one source of weight 1.
        origin: position at which epoch 0 begins.
    """

    def __init__(
        self,
        counts: Sequence[int],
        seed: int,
        block: int,
        window: int,
        shuffle: bool = True,
        sources: Sequence[Source] = (),
        origin: int = 0,
    ) -> None:
        if block < 1 or window < 1:
            raise ValueError(f"block {block} and window {window} must be at least 1")
        if min(counts, default=0) < 0 or sum(counts) < 1:
            raise ValueError("no samples to put in order")
        self.seed, self.block, self.window, self.shuffle, self.origin = seed, block, window, shuffle, origin
        self._firsts = np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64))])
        blocks_of_shard = -(-np.asarray(counts, dtype=np.int64) // block)
        self._first_blocks = np.concatenate([[0], np.cumsum(blocks_of_shard)])
        self._sources = list(sources) or [Source(len(counts))]
        if sum(source.shards for source in self._sources) != len(counts) or min(s.weight for s in self._sources) <= 0:
            raise ValueError(f"sources {self._sources} do not share out {len(counts)} shards with weights above 0")
        edges = np.cumsum([0, *(source.shards for source in self._sources)])
        self._source_blocks, self._source_samples = self._first_blocks[edges], np.diff(self._firsts[edges]).tolist()
        self._rates = [source.weight * n for source, n in zip(self._sources, self._source_samples, strict=True)]
        self.samples_per_epoch = sum(self._rates, Fraction(0))
        """Mean over the epochs; each has this, rounded per source down or up, so that no sample is lost or repeated."""
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._recent: deque[tuple[int, int, list[int]]] = deque(maxlen=WINDOWS_KEPT)
        """Windows looked into: epoch, first position, sample numbers."""

    def begin(self, epoch: int) -> int:
        """First position of an epoch."""
        return self.origin + sum(epoch * rate // 1 for rate in self._rates)

    def locate(self, position: int) -> tuple[int, int]:
        """Epoch of a position, and the number of the sample that stands there."""
        for epoch, first, samples in self._recent:
            if 0 <= position - first < len(samples):
                return epoch, samples[position - first]
        epoch, window, first = self._window_of(position)
        self._recent.appendleft((epoch, first, self._mixed(epoch, window).tolist()))
        return self.locate(position)

    def upcoming_shards(self, position: int) -> list[int]:
        """Shards that the window of a position and the window behind it read, in their order, each once."""
        epoch, window, _ = self._window_of(position)
        firsts, _ = self._runs(epoch, window, 2)
        shards = np.searchsorted(self._firsts, firsts, side="right") - 1
        return list(dict.fromkeys(int(shard) for shard in shards))

    def _window_of(self, position: int) -> tuple[int, int, int]:
        """Epoch, number of the window within it, and the window's first position."""
        if position < self.origin:
            raise ValueError(f"position {position} stands before {self.origin}, where this order begins")
        epoch = int((position - self.origin) // self.samples_per_epoch)
        while self.begin(epoch + 1) <= position:  # what the sources have rounded down so far
            epoch += 1
        begin, starts = self.begin(epoch), self._epoch(epoch).starts
        window = int(np.searchsorted(starts, position - begin, side="right")) - 1
        return epoch, window, begin + int(starts[window])

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            self._epochs[epoch] = self._plan(epoch)
            while len(self._epochs) > 2:  # a batch may stand across two epochs
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _plan(self, epoch: int) -> _Epoch:
        sizes = self._block_sizes()
        pieces: list[tuple[int, int]] = []
        parts = [part for source in range(len(self._sources)) for part in self._drawn(source, epoch, sizes, pieces)]
        blocks = np.concatenate(parts)
        if self.shuffle:
            np.random.default_rng((self.seed, epoch, Shuffle.BLOCKS_OF_EPOCH)).shuffle(blocks)
        cut = np.array(pieces, dtype=np.int64).reshape(-1, 2)
        sizes = np.concatenate([sizes, (cut[:, 1] - cut[:, 0]).astype(sizes.dtype)])
        per_window = np.add.reduceat(sizes[blocks], np.arange(0, len(blocks), self.window), dtype=np.int64)
        return _Epoch(blocks, cut, np.concatenate([[0], np.cumsum(per_window)]))

    def _block_sizes(self) -> np.ndarray:
        """Samples of each block of all shards, int32 [blocks]."""
        sizes = np.full(int(self._first_blocks[-1]), self.block, dtype=np.int32)
        blocks, samples = np.diff(self._first_blocks), np.diff(self._firsts)
        filled = blocks > 0
        sizes[self._first_blocks[1:][filled] - 1] = samples[filled] - (blocks[filled] - 1) * self.block
        return sizes

    def _drawn(self, source: int, epoch: int, sizes: np.ndarray, pieces: list[tuple[int, int]]) -> Iterator[np.ndarray]:
        """Blocks that an epoch takes from a source, pass after pass; the ends of a part of a pass go to `pieces`."""
        count, rate = self._source_samples[source], self._rates[source]
        first, end = epoch * rate // 1, (epoch + 1) * rate // 1
        for number in range(first // count, -(-end // count)) if count else ():
            begin, stop = max(first - number * count, 0), min(end - number * count, count)
            blocks = self._pass(source, number, whole=(begin, stop) == (0, count))
            if (begin, stop) != (0, count):
                blocks = self._cut(blocks, sizes, begin, stop, pieces)
            yield blocks

    def _pass(self, source: int, number: int, whole: bool) -> np.ndarray:
        """All blocks of a source; in the pass's own order where only a part is taken: the epoch mixes whole ones."""
        first, end = self._source_blocks[source : source + 2]
        blocks = np.arange(first, end, dtype=np.int32 if self._first_blocks[-1] < 2**30 else np.int64)
        if self.shuffle and not whole:
            np.random.default_rng((self.seed, number, Shuffle.BLOCKS_OF_PASS, source)).shuffle(blocks)
        return blocks

    def _cut(
        self, blocks: np.ndarray, sizes: np.ndarray, begin: int, stop: int, pieces: list[tuple[int, int]]
    ) -> np.ndarray:
        """The blocks that hold the samples from `begin` to `stop` of a pass; the first and last become pieces."""
        ends = np.cumsum(sizes[blocks], dtype=np.int64)
        low, high = np.searchsorted(ends, begin, side="right"), np.searchsorted(ends, stop, side="left")
        if low > high:  # no sample at all, between two blocks
            return blocks[:0]
        taken = blocks[low : high + 1].copy()
        firsts, lasts = self._bounds(taken[[0, -1]].astype(np.int64))
        firsts[0] += begin - (ends[low] - sizes[blocks[low]])
        lasts[1] -= ends[high] - stop
        edges = [(firsts[0], lasts[1])] if len(taken) == 1 else [(firsts[0], lasts[0]), (firsts[1], lasts[1])]
        for at, edge in zip((0, -1), edges, strict=False):
            taken[at] = len(sizes) + len(pieces)
            pieces.append((int(edge[0]), int(edge[1])))
        return taken

    def _bounds(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First sample and end of whole blocks, each int64 [len(blocks)]."""
        shards = np.searchsorted(self._first_blocks, blocks, side="right") - 1
        firsts = self._firsts[shards] + (blocks - self._first_blocks[shards]) * self.block
        return firsts, np.minimum(firsts + self.block, self._firsts[shards + 1])

    def _runs(self, epoch: int, window: int, windows: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """First sample and end of each block or piece of neighbouring windows, in the epoch's order, int64."""
        plan, count = self._epoch(epoch), int(self._first_blocks[-1])
        blocks = plan.blocks[window * self.window : (window + windows) * self.window].astype(np.int64)
        cut = blocks >= count
        firsts, ends = self._bounds(np.where(cut, 0, blocks))
        firsts[cut], ends[cut] = plan.pieces[blocks[cut] - count].T
        return firsts, ends

    def _mixed(self, epoch: int, window: int) -> np.ndarray:
        """Sample numbers of a window in their mixed order, int64."""
        samples = np.concatenate([np.arange(first, end) for first, end in zip(*self._runs(epoch, window), strict=True)])
        if self.shuffle:
            np.random.default_rng((self.seed, epoch, Shuffle.SAMPLES_OF_WINDOW, window)).shuffle(samples)
        return samples
