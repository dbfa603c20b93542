"""Who gets the next decoder: owners of work in turn, and none all of them while others are about."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

W = TypeVar("W")
T = TypeVar("T")
OWNER: ContextVar[str] = ContextVar("owner", default="")
"""For whom the work of this task is done; set where a request's owner is known."""
SEATS = 2
"""Threads that work aside at a time: all of them and the event loop share one interpreter."""
ABOUT_SECONDS = 10.0
"""An owner that asked so lately is about."""


class Turns(Generic[W]):
    """Workers, handed to those who wait for one.

    share: of the workers that one owner gets while others are about, but at least one; idle: workers there are already.
    """

    def __init__(self, share: float, idle: Iterable[W] = ()) -> None:
        self._share = share
        self._idle = list(idle)
        self._waiting: OrderedDict[str, deque[asyncio.Future[W]]] = OrderedDict()
        self._held: dict[W, str] = {}
        self._running: Counter[str] = Counter()
        self._about: OrderedDict[str, float] = OrderedDict()

    async def take(self, count: int) -> W:
        """A worker for the owner of this task, in its turn; to be given back by `free` or `drop`.

        count: workers that there are in all.
        """
        owner = OWNER.get()
        self._see(owner)
        future: asyncio.Future[W] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(future)
        self._hand_out(count)
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled():  # it was given one and leaves at this moment
                self.free(future.result(), count)
            raise

    @asynccontextmanager
    async def one(self, count: int) -> AsyncIterator[W]:
        """A worker as from `take`, given back at the end."""
        worker = await self.take(count)
        try:
            yield worker
        finally:
            self.free(worker, count)

    def free(self, worker: W, count: int) -> None:
        """A worker that is idle now, or new."""
        self.drop(worker)
        self._idle.append(worker)
        self._hand_out(count)

    def drop(self, worker: W) -> None:
        """A worker that is no more."""
        owner = self._held.pop(worker, None)
        if owner is not None:
            self._running[owner] -= 1
            self._running += Counter()  # without those that have none

    def _hand_out(self, count: int) -> None:
        for owner in list(self._waiting):
            if not self._idle:
                return
            line = self._waiting[owner]
            while line and line[0].done():  # nobody waits for it any more
                line.popleft()
            if line and self._running[owner] < self._most(owner, count):
                worker = self._idle.pop()  # the one that worked last: its memory is warm
                self._held[worker] = owner
                self._running[owner] += 1
                line.popleft().set_result(worker)
                self._waiting.move_to_end(owner)
            if not line:
                del self._waiting[owner]
        if self._idle and any(self._running[owner] < self._most(owner, count) for owner in self._waiting):
            self._hand_out(count)

    def _most(self, owner: str, count: int) -> int:
        since = time.monotonic() - ABOUT_SECONDS
        others = any(seen > since for other, seen in self._about.items() if other != owner)
        return max(1, int(self._share * count)) if others else count

    def _see(self, owner: str) -> None:
        now = time.monotonic()
        self._about[owner] = now
        self._about.move_to_end(owner)
        while next(iter(self._about.values())) < now - ABOUT_SECONDS:
            self._about.popitem(last=False)


_seats: Turns[int] = Turns(1 / SEATS, range(SEATS))


async def aside(work: Callable[[], T]) -> T:
    """What grows with a request's content, done in a thread, when it is its owner's turn."""
    async with _seats.one(SEATS):
        return await asyncio.to_thread(work)


_moments: Turns[int] = Turns(1.0, range(1))


async def in_turn() -> None:
    """Returns when the caller may keep the event loop for half a millisecond: one caller in each round of the loop,
    owners in turn, so that others wait for one such piece of work at most, and for no lock."""
    seat = await _moments.take(1)
    asyncio.get_running_loop().call_soon(_moments.free, seat, 1)
