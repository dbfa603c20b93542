"""Decoding processes: tasks (runs of samples) go out, chunks (windows for a model) come back in the order of tasks.

Each process has a loader of its own, and every request to it asks for the next chunk of its tasks. So a film of an hour
comes in pieces, nothing overtakes, and the order of what comes out depends on the tasks alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from bridle.data.errors import ShardError
from bridle.data.loaders import made_by_workers
from bridle.modalities.clip import ClipError, Modality
from bridle.modalities.joining import Place
from bridle.tokens.sources import Inputs

CHUNK_BYTES = 64 << 20
"""A chunk ends before its values pass this."""


@dataclass(frozen=True)
class Task:
    """Samples of one unit. last: whether they are the unit's last ones."""

    unit: int
    samples: range
    last: bool


@dataclass
class Piece:
    """A sample's windows in one chunk.

    clips: their bookkeeping, without values. members: of a sample that begins here. fault: why it is skipped.
    """

    key: str
    clips: list[Place] = field(default_factory=list)
    members: dict[str, bytes] | None = None
    fault: str | None = None
    ends: bool = False


@dataclass
class Chunk:
    """pieces: samples in order; values: of all their clips in order, float32 ``[b, C, *S]``, none without clips."""

    pieces: list[Piece]
    values: torch.Tensor | None
    ends: bool


class Decoder(Dataset[Any]):
    """From tasks to chunks; lives in a decoding process, and keeps its place between two requests."""

    def __init__(self, inputs: Inputs, modality: Modality, windows: int) -> None:
        self.inputs, self.modality, self.windows = inputs, modality, windows
        self._tasks: deque[Task] = deque()
        self._chunks: Iterator[Chunk] | None = None

    def __getitem__(self, task: Task | None) -> Chunk | ShardError | None:
        """Adds a task, if one is given; the next chunk, or none where there is nothing to do."""
        if task is not None:
            self._tasks.append(task)
        try:
            while self._chunks is not None or self._tasks:
                if self._chunks is None:
                    self._chunks = self._of(self._tasks.popleft())
                chunk = next(self._chunks, None)
                if chunk is not None:
                    return chunk
                self._chunks = None
        except ShardError as error:  # as a value: the loader would bury it under a traceback
            return ShardError(str(error))
        return None

    def _of(self, task: Task) -> Iterator[Chunk]:
        pieces: list[Piece] = []
        values: list[torch.Tensor] = []
        for sample in task.samples:
            raw = self.inputs.read(task.unit, sample)
            piece = Piece(raw.key, members=raw.members, fault=raw.fault)
            pieces.append(piece)
            try:
                for clip in self.modality.windows(raw.data) if raw.fault is None else ():
                    values.append(clip.values)
                    piece.clips.append(Place.of(clip))
                    if len(values) == self.windows or (len(values) + 1) * clip.values.nbytes > CHUNK_BYTES:
                        yield Chunk(pieces, torch.stack(values), ends=False)
                        piece = Piece(raw.key)
                        pieces, values = [piece], []
            except ClipError as error:
                piece.fault = " ".join(str(error).split())
            piece.ends = True
        yield Chunk(pieces, torch.stack(values) if values else None, ends=True)


class _Feed(Sampler[Any]):
    """What one decoding process is asked for: a task as long as it has few, else only its next chunk."""

    def __init__(self, tasks: Iterator[Task], order: deque[tuple[Task, _Feed]], feeds: int) -> None:
        self.tasks, self.order, self.feeds, self.open = tasks, order, feeds, 0
        self.chunks: Iterator[Chunk | ShardError | None]

    def __iter__(self) -> Iterator[Task | None]:
        while True:
            room = self.open == 0 or (self.open < 2 and len(self.order) >= self.feeds)  # each gets one before two
            task = next(self.tasks, None) if room else None
            if task is not None:
                self.open += 1
                self.order.append((task, self))
            elif not self.open:
                return
            yield task


def decoded(
    inputs: Inputs, modality: Modality, tasks: Iterator[Task], *, workers: int, windows: int
) -> Iterator[tuple[Task, Chunk]]:
    """The chunks of all tasks, in the order in which `tasks` gives them, by so many processes (0: in this one).

    windows: of a chunk, at most. Tasks are taken one by one, shortly before they are decoded.

    Raises:
        ShardError: a shard cannot be had, or a process died.
    """
    order: deque[tuple[Task, _Feed]] = deque()
    feeds = [_Feed(tasks, order, max(1, workers)) for _ in range(max(1, workers))]
    try:
        for feed in feeds:  # a process begins with its first tasks at once
            feed.chunks = made_by_workers(Decoder(inputs, modality, windows), min(workers, 1), feed)
        while order or not workers:
            feed = order[0][1] if order else feeds[0]
            try:
                chunk = next(feed.chunks)
            except StopIteration:
                return
            if isinstance(chunk, ShardError):
                raise chunk
            if chunk is None:
                continue
            task = order[0][0]
            if chunk.ends:
                order.popleft()
                feed.open -= 1
            yield task, chunk
    finally:
        # A feed and its chunks refer to each other: the garbage collector would find them late, and torch then waits
        # 10 s for each process, which it cannot end.
        for feed in feeds:
            feed.chunks = iter(())
