"""Shared memory for clips: a decoding process writes a clip once, the model process reads it there, and writes the
clip's embeddings into the same place.

It is cut into slots of one clip each. Only the service hands slots out: none is lost with a process that died.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections import deque

import numpy as np
import numpy.typing as npt

from bridle.processes import memory


class Arena:
    """The service's side: who has which slot. Only for use in the event loop.

    Args:
        slots: clips that may be under way at once; slot_bytes: bytes of one clip, or of its embeddings.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.fd = memory.create("bridle-clips", slots * slot_bytes)
        self._memory = np.frombuffer(memory.view(self.fd), np.float32).reshape(slots, slot_bytes // 4)
        self._free = list(range(slots))
        self._waiting: deque[asyncio.Future[int]] = deque()

    @property
    def free(self) -> int:
        """Slots nobody holds."""
        return len(self._free)

    async def acquire(self) -> int:
        """A free slot, the one used last (its memory is warm); waits in line where there is none."""
        if self._free and not self._waiting:
            return self._free.pop()
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.release(future.result())
            raise

    def release(self, slot: int) -> None:
        """Gives a slot back."""
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(slot)
                return
        self._free.append(slot)

    def read(self, slot: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """A copy of what stands at a slot's beginning, float32."""
        return self._memory[slot, : math.prod(shape)].reshape(shape).copy()

    def close(self) -> None:
        """Gives the service's side of the memory back, now: what is retired may wait long for the garbage collector."""
        os.close(self.fd)
        self._memory = np.zeros((0, 0), np.float32)
