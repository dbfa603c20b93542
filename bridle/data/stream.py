"""The stream: micro-batches in an order that no rank, worker or restart can change."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from bridle.data.errors import SampleError, ShardError
from bridle.data.handover import bytes_for_the_pipe, packed, stacked, unpacked, warn_of_little_memory
from bridle.data.loaders import made_by_workers
from bridle.data.order import Order, SampleOrder
from bridle.data.shards import ShardSet
from bridle.modalities.clip import ClipError

log = logging.getLogger(__name__)
Make = Callable[[bytes, np.random.Generator], dict[str, torch.Tensor]]
OF_ONE_SAMPLE = (ClipError, SampleError)
"""What is wrong with one sample alone; anything else is a fault of its shard, or of ours, and ends the stream."""
SUCCESSORS = 256
"""Samples tried for one position before the stream gives up."""


@dataclass(frozen=True)
class Corrupt:
    """A position whose own sample could not be read or made, and whose successor stands in for it."""

    position: int
    shard: str
    key: str
    error: str


@dataclass(frozen=True)
class MicroBatch:
    """tensors: stacked over the samples, each ``[b, ...]``. positions: of the samples, one after another.

    piped: bytes of large tensors that came through the pipe, because shared memory had no room for them.
    """

    tensors: dict[str, torch.Tensor]
    positions: list[int]
    corrupt: list[Corrupt]
    piped: int = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"tensors": {name: packed(tensor) for name, tensor in self.tensors.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = {name: unpacked(found) for name, found in state["tensors"].items()}
        self.__dict__.update(state | {"tensors": tensors})


class Stream:
    """Samples of a set of shards, made into tensors, in the order of `SampleOrder`.

    Args:
        shards: what to read.
        make: bytes and a generator to named tensors; picklable. Its ClipError means a corrupt sample. The
            generator is its own only until it returns; what it gives depends on (seed, epoch, position) alone.
        seed, block, window, shuffle, origin: see `SampleOrder`.
        order: another order than that.
    """

    def __init__(
        self,
        shards: ShardSet,
        make: Make,
        *,
        seed: int,
        block: int,
        window: int,
        shuffle: bool = True,
        origin: int = 0,
        order: Order | None = None,
    ) -> None:
        self.shards, self.make, self.seed = shards, make, seed
        self.order = order or SampleOrder(shards.counts, seed, block, window, shuffle, shards.sources, origin)
        largest = max(shards.counts)
        if shards.remote_bytes > shards.cache.limit and block < largest:
            log.warning(
                "the remote shards (%.1f GB) do not fit the cache (%.1f GB), so shards will be fetched over and over: "
                "raise data.cache_gb, or set data.shuffle_block=%d (a whole shard) and a data.shuffle_window of a few",
                shards.remote_bytes / 1e9,
                shards.cache.limit / 1e9,
                largest,
            )

    def made(self, sample: int, position: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """The tensors of a sample that stands at a position, or stands in for the one there.

        Raises:
            ClipError, SampleError: a corrupt sample. ShardError: a fault of its shard.
        """
        return self.make(self.shards.data(sample), rng)

    def micro_batches(
        self,
        *,
        start: int,
        stop: int | None,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world: int,
        workers: int,
    ) -> Iterator[MicroBatch]:
        """One rank's share of the global batches from position `start` up to `stop` (none: without end).

        Global batch g covers ``[start + g * batch_size, start + (g + 1) * batch_size)``, cut at `stop`. It goes in
        steps of ``world * micro_batch_size`` positions, of which rank r takes the r-th run of `micro_batch_size`. An
        empty share is left out, so at the end of a batch a rank may get fewer micro-batches than another.

        Raises:
            ShardError: a shard cannot be had, `SUCCESSORS` samples in a row are corrupt, or a worker died.
        """
        if min(batch_size, micro_batch_size, world) < 1 or not 0 <= rank < world or start < 0 or workers < 0:
            raise ValueError(
                f"no stream for batch {batch_size}, micro-batch {micro_batch_size}, rank {rank} of {world}"
            )
        shares = _Shares(start, stop, batch_size, micro_batch_size, rank, world, workers)
        for found in made_by_workers(_Positions(self), workers, shares):
            if isinstance(found, ShardError):
                raise found
            if found.piped:
                warn_of_little_memory()
            yield found


class _Shares(Sampler[tuple[range, range]]):
    """Runs of positions, one for each micro-batch of a rank, each with the run that the same worker gets next."""

    def __init__(
        self, start: int, stop: int | None, batch: int, micro: int, rank: int, world: int, workers: int
    ) -> None:
        self.start, self.stop, self.batch, self.micro, self.rank, self.world = start, stop, batch, micro, rank, world
        self.workers = max(1, workers)

    def __iter__(self) -> Iterator[tuple[range, range]]:
        now, ahead = itertools.tee(self._runs())
        return zip(
            now, itertools.chain(itertools.islice(ahead, self.workers, None), itertools.repeat(range(0))), strict=False
        )

    def _runs(self) -> Iterator[range]:
        first = self.start
        while self.stop is None or first < self.stop:
            end = first + self.batch if self.stop is None else min(first + self.batch, self.stop)
            for step in range(first, end, self.world * self.micro):
                begin = step + self.rank * self.micro
                if begin < end:
                    yield range(begin, min(begin + self.micro, end))
            first += self.batch


class _Positions(Dataset[Any]):
    """From a run of positions to a micro-batch; lives in the worker processes. The second run is what comes next."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.remote = stream.shards.remote_bytes > 0
        self.prefetcher: _Prefetcher | None = None
        self.generators = _Generators(stream.seed)

    def __getitem__(self, shares: tuple[range, range]) -> MicroBatch | ShardError:
        """A ShardError is handed over as a value, since the loader would bury it under a traceback."""
        positions, ahead = shares
        if self.remote:
            self.prefetcher = self.prefetcher or _Prefetcher(self.stream.shards)
            self.prefetcher.want(self.stream.order.upcoming_shards(positions[0]))
        corrupt: list[Corrupt] = []
        try:
            self.stream.shards.expect([self.stream.order.locate(position)[1] for position in ahead])
            made = [self._make(position, corrupt) for position in positions]
        except ShardError as error:
            return ShardError(str(error))
        tensors = {name: stacked([sample[name] for sample in made]) for name in made[0]}
        return MicroBatch(tensors, list(positions), corrupt, bytes_for_the_pipe(list(tensors.values())))

    def _make(self, position: int, corrupt: list[Corrupt]) -> dict[str, torch.Tensor]:
        epoch, sample = self.stream.order.locate(position)
        try:
            return self._made_of(sample, epoch, position)
        except OF_ONE_SAMPLE as error:
            corrupt.append(Corrupt(position, *self.stream.shards.where(sample), str(error)))
        return self._successor(epoch, position, corrupt[-1])

    def _made_of(self, sample: int, epoch: int, position: int) -> dict[str, torch.Tensor]:
        return self.stream.made(sample, position, self.generators.at(epoch, position))

    def _successor(self, epoch: int, position: int, fault: Corrupt) -> dict[str, torch.Tensor]:
        """The first good sample behind a corrupt one, wrapping within the epoch."""
        order = self.stream.order
        begin, end = order.begin(epoch), order.begin(epoch + 1)
        tried = min(end - begin, SUCCESSORS)
        for distance in range(1, tried):
            _, sample = order.locate(begin + (position - begin + distance) % (end - begin))
            with contextlib.suppress(*OF_ONE_SAMPLE):
                return self._made_of(sample, epoch, position)
        raise ShardError(
            f"{fault.shard}: sample '{fault.key}' ({fault.error}) and every one of the {tried - 1} samples behind it "
            "are corrupt; run `bridle shards check` on the shards, and check that they belong to this modality"
        )


class _Generators:
    """One Philox generator that is set to the place of a sample: a new one for each would take ten times as long."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=[seed, 0])
        self._generator = np.random.Generator(self._bits)
        self._start: Any = self._bits.state

    def at(self, epoch: int, position: int) -> np.random.Generator:
        """Keyed by (seed, epoch); each position has the 2^64 blocks behind its own counter."""
        self._start["state"]["key"][1] = epoch
        self._start["state"]["counter"][1] = position
        self._bits.state = self._start
        return self._generator


class _Prefetcher:
    """Fetches the shards that come next in a thread, while the current ones are read."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self.wanted: list[int] = []
        self.fresh = False
        self.changed = threading.Condition()
        threading.Thread(target=self._work, name="bridle-prefetch", daemon=True).start()

    def want(self, numbers: list[int]) -> None:
        """What to have, in order; as much of it as half the cache holds."""
        room = self.shards.cache.limit // 2
        kept = []
        for number in numbers:
            room -= self.shards.shards[number].header.bytes
            if room < 0:
                break
            kept.append(number)
        with self.changed:
            if kept != self.wanted:
                self.wanted, self.fresh = kept, True
                self.changed.notify()

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.fresh)
                self.fresh, numbers = False, self.wanted
            for number in numbers:
                with contextlib.suppress(ShardError, OSError):  # the reader meets the same fault, and reports it
                    self.shards.prefetch(number)
                if self.fresh:
                    break
