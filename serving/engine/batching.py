"""The dynamic batcher of one model: windows that wait together run together.

An idle service runs a window at once. While others are still being decoded, a window waits for them up to `max_wait`;
while the model is busy, windows gather by themselves. All windows of a model have one shape.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.metrics import Metrics

Array = npt.NDArray[Any]


@dataclass(eq=False)
class QueueEntry:
    """One window (or one piece of codes to dequantize) that waits for the model.

    future: gets the window's array, or an exception. Cancelled when nobody waits any more.
    deadline: monotonic time after which the answer is of no use.
    valid: positions of the window that are content.
    """

    operation: str
    deadline: float
    slot: int | None = None
    valid: int = 0
    codes: npt.NDArray[np.int64] | None = None
    arrived: float = field(default_factory=time.monotonic)
    queue_seconds: float = 0.0
    model_seconds: float = 0.0
    future: asyncio.Future[Array] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """A queue from which model processes take batches.

    Args:
        upstream: how many files are being decoded for this model at this moment.
        release: gives a window's slot back.
    """

    def __init__(
        self,
        name: str,
        *,
        max_batch: int,
        max_wait: float,
        upstream: Callable[[], int],
        release: Callable[[int], None],
        metrics: Metrics,
    ) -> None:
        self._name = name
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._upstream = upstream
        self._release_slot = release
        self._metrics = metrics
        self._queue: deque[QueueEntry] = deque()
        self._asking: list[Callable[[], bool]] = []
        self._least = 1
        self._changed = asyncio.Event()

    def learn(self, least: int) -> None:
        """Batches of fewer windows than this are neither shared out among idle processes nor sent to one that is busy:
        a batch costs as much by itself as this many of its windows."""
        self._least = least

    def look(self) -> None:
        """To be called when `upstream` may have fallen, or a process that asks has become idle."""
        self._changed.set()

    def submit(self, entry: QueueEntry) -> None:
        """Puts an entry in line; its slot now belongs to the batcher."""
        self._queue.append(entry)
        self._changed.set()

    async def next_batch(self, busy: Callable[[], bool] = lambda: False) -> list[QueueEntry]:
        """Waits for work; entries of one operation that should run now, in the order they came.

        Idle processes share what waits, where that is worth it.

        Args:
            busy: whether the process that asks has another batch under way.
        """
        self._asking.append(busy)
        try:
            return await self._next_batch(busy)
        finally:
            self._asking.remove(busy)
            if self._queue:  # for those who left it to this one
                self._changed.set()

    @property
    def more(self) -> bool:
        """Whether another batch is about to begin."""
        return bool(self._queue or self._upstream())

    async def _next_batch(self, busy: Callable[[], bool]) -> list[QueueEntry]:
        while True:
            self._drop_useless()
            patience = math.inf
            if self._queue:
                first = self._queue[0]
                same = sum(entry.operation == first.operation for entry in self._queue)
                alone = first.codes is not None
                idle = sum(not one() for one in self._asking)
                # Fewer go on gathering until the batch under way is answered: as a batch they would cost more than the
                # device's pause between two, which is all that they can save.
                worth = not busy() or (not idle and (alone or same >= min(self._least, self._max_batch)))
                patience = first.arrived + self._max_wait - time.monotonic() if worth else math.inf
                if worth and (alone or same >= self._max_batch or patience <= 0 or not self._upstream()):
                    share = max(self._least, -(-same // max(1, idle)))
                    return self._take(1 if alone else min(self._max_batch, share))
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience if patience < math.inf else None):
                    await self._changed.wait()

    def finish(self, entry: QueueEntry, result: Array | BaseException) -> None:
        """Answers an entry that was taken, and gives its slot back."""
        if entry.slot is not None:
            self._release_slot(entry.slot)
            entry.slot = None
        if entry.future.done():
            return
        if isinstance(result, BaseException):
            entry.future.set_exception(result)
        else:
            entry.future.set_result(result)

    def fail_all(self, error: Callable[[], BaseException]) -> None:
        """Answers everything that waits with an error."""
        while self._queue:
            self.finish(self._queue.popleft(), error())

    def _take(self, count: int) -> list[QueueEntry]:
        batch: list[QueueEntry] = []
        others: list[QueueEntry] = []
        operation = self._queue[0].operation
        now = time.monotonic()
        while self._queue and len(batch) < count:
            entry = self._queue.popleft()
            (batch if entry.operation == operation else others).append(entry)
        self._queue.extendleft(reversed(others))
        for entry in batch:
            entry.queue_seconds = now - entry.arrived
            self._metrics.queue_seconds.labels(self._name).observe(entry.queue_seconds)
        self._metrics.batch_size.labels(self._name).observe(len(batch))
        return batch

    def _drop_useless(self) -> None:
        """Drops entries whose client is gone or whose deadline passed, before they cost the model anything."""
        now = time.monotonic()
        useless = [entry for entry in self._queue if entry.future.done() or entry.deadline <= now]
        for entry in useless:
            self._queue.remove(entry)
            self._metrics.dropped.labels(self._name).inc()
            self.finish(entry, TimeoutError("the deadline passed in the queue"))
