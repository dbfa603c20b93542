"""How the processes of one model share the cores."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from bridle.cores import available_cores

CALM_SECONDS = 1.0
"""After this long without two batches at a time, a batch may have all cores."""


WORTH = 1.15
"""A clip may take so much longer if that spares threads, which spin while they wait for one another."""


class SharedCores:
    """How many threads each batch of a model's processes on the CPU gets.

    A batch by itself gets all cores, so that it is answered soonest. Once batches come beside each other, each process
    keeps to its part: threads of a batch wait for one another at every operator, so whatever else runs on one's core
    holds up all of them (at 60 % load, p99 of a small model was 159 instead of 35 ms; benchmarks/serving.py).

    Args:
        processes: that share the cores.
        threads: of each process at all times; 0 leaves it to what is going on.
    """

    def __init__(self, processes: int, threads: int) -> None:
        cores = available_cores()
        self._alone = threads or cores
        self._crowded = threads or max(1, cores // processes)
        self._busy = 0
        self._last_crowd = -math.inf

    @property
    def counts(self) -> list[int]:
        """The numbers of threads that a batch may get."""
        return list(dict.fromkeys((self._alone, self._crowded)))

    def learn(self, seconds: Mapping[int, float]) -> None:
        """Leaves threads alone that win little. seconds: what a clip by itself took with each of `counts`."""
        best = min(seconds.values())
        self._alone = min(count for count, took in seconds.items() if took <= WORTH * best)

    def take(self, more: bool) -> int:
        """Threads for a batch that begins now. `more`: others wait or are being decoded."""
        self._busy += 1
        now = time.monotonic()
        if more or self._busy > 1:
            self._last_crowd = now
        return self._alone if now - self._last_crowd > CALM_SECONDS else self._crowded

    def give_back(self) -> None:
        """A batch has ended."""
        self._busy -= 1
