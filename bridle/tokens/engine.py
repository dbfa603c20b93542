"""Chunks in, finished samples out: windows are batched across samples, so that the model is kept busy."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from bridle.modalities.joining import Place
from bridle.model_folder import BridleModel, CodeStream
from bridle.tokens.decoding import Piece, Task, decoded
from bridle.tokens.records import Record
from bridle.tokens.sources import Inputs


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be tokenized, and why."""

    key: str
    reason: str


@dataclass
class Finished:
    """All samples of a unit, in their order. windows: model inputs they took."""

    unit: int
    records: list[Record] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    windows: int = 0


@dataclass
class Timings:
    """Seconds spent, in all. waiting: for decoded chunks; model: in the model; samples: finished, skipped included."""

    waiting: float = 0.0
    model: float = 0.0
    samples: int = 0
    windows: int = 0


@dataclass
class _Sample:
    """A sample on its way: clips seen so far, and codes of those that the model has done."""

    piece: Piece
    clips: list[Place]
    codes: list[torch.Tensor]


@dataclass
class _Unit:
    """A unit on its way. Samples leave `open` at the left, in order, when all their codes are there."""

    finished: Finished
    open: deque[_Sample] = field(default_factory=deque)
    complete: bool = False


class Engine:
    """Runs one model over units. The batches depend on the unit alone: no batch holds windows of two units.

    Args:
        model: whose codes. batch: windows in a batch. workers: decoding processes (0: in this one).
    """

    def __init__(self, model: BridleModel, inputs: Inputs, *, batch: int, workers: int) -> None:
        self.model, self.inputs, self.batch, self.workers = model, inputs, batch, workers
        self.timings = Timings()
        self.ticked: Callable[[], None] = lambda: None
        """Called now and then while samples go through the model."""
        self._values: list[torch.Tensor] = []
        self._owners: list[_Sample] = []
        self._content: list[int] = []
        self._running: tuple[torch.Tensor, list[_Sample]] | None = None

    def run(self, units: Iterator[int]) -> Iterator[Finished]:
        """The units, in their order. They are taken one by one, shortly before they are decoded.

        Raises:
            ShardError: a shard cannot be had, or a decoding process died.
        """
        chunks = decoded(self.inputs, self.model.modality, self._tasks(units), workers=self.workers, windows=self.batch)
        units_open: deque[_Unit] = deque()
        began = time.perf_counter()
        for task, chunk in chunks:
            self.timings.waiting += time.perf_counter() - began
            if not units_open or units_open[-1].complete:
                units_open.append(_Unit(Finished(task.unit)))
            unit = units_open[-1]
            self._add(unit, chunk.pieces, chunk.values)
            if chunk.ends and task.last:
                self._launch(len(self._owners))
                unit.complete = True
            yield from self._finished(units_open)
            self.ticked()
            began = time.perf_counter()
        self._settle()
        yield from self._finished(units_open)

    def _tasks(self, units: Iterator[int]) -> Iterator[Task]:
        for unit in units:
            samples = self.inputs.units[unit].samples
            for first in range(0, max(samples, 1), self.batch):
                stop = min(first + self.batch, samples)
                yield Task(unit, range(first, stop), stop == samples)

    def _add(self, unit: _Unit, pieces: list[Piece], values: torch.Tensor | None) -> None:
        for piece in pieces:
            if piece.members is not None:  # a sample begins
                unit.open.append(_Sample(piece, [], []))
            sample = unit.open[-1]
            sample.piece.fault, sample.piece.ends = piece.fault, piece.ends
            sample.clips += piece.clips
            self._owners += [sample] * len(piece.clips)
            self._content += [clip.positions for clip in piece.clips]
        if values is not None:
            self._values.append(values)
            unit.finished.windows += len(values)
        while len(self._owners) >= self.batch:
            self._launch(self.batch)

    def _launch(self, count: int) -> None:
        """Gives `count` windows to the model, and only then looks at the codes of the last batch: a GPU stays busy."""
        if not count:
            return
        values = self._values[0] if len(self._values) == 1 else torch.cat(self._values)
        batch, rest = values[:count], values[count:]
        self._values = [rest] if len(rest) else []
        owners, self._owners = self._owners[:count], self._owners[count:]
        content, self._content = self._content[:count], self._content[count:]
        began = time.perf_counter()
        codes = self.model.codes(batch, content)
        self.timings.model += time.perf_counter() - began
        self._settle()
        self._running = codes, owners

    def _settle(self) -> None:
        if self._running is None:
            return
        began = time.perf_counter()
        codes, owners = self._running
        for sample, found in zip(owners, codes.cpu().unbind(0), strict=True):
            sample.codes.append(found)
        self.timings.model += time.perf_counter() - began
        self.timings.windows += len(owners)
        self._running = None

    def _finished(self, units: deque[_Unit]) -> Iterator[Finished]:
        while units:
            unit = units[0]
            while unit.open and unit.open[0].piece.ends and len(unit.open[0].codes) == len(unit.open[0].clips):
                self._close(unit.open.popleft(), unit.finished)
            if unit.open or not unit.complete:
                return
            yield units.popleft().finished

    def _close(self, sample: _Sample, finished: Finished) -> None:
        self.timings.samples += 1
        if sample.piece.fault is not None:
            finished.skipped.append(Skipped(sample.piece.key, sample.piece.fault))
            return
        config = self.model.config
        stream = CodeStream.from_windows(config.modality, config.quantizer.codebook_size, sample.clips, sample.codes)
        finished.records.append(
            Record(sample.piece.key, stream.codes.numpy(), stream.grid, stream.duration_s, sample.piece.members or {})
        )
