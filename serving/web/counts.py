"""What the HTTP processes of one service have taken of its places, in memory that they share.

Each process writes a row of its own and reads those of the others, under a lock of the kernel's that a process which
dies lets go of. A row holds no names: clients are told apart by a keyed hash, and two whose hashes fall together
(1 pair in 16,384) share a share.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator

from bridle.processes import memory

BUCKETS = 1 << 14
_STARTED, _FILES, _BYTES, _SEEN = 0, 1, 2, 3
"""Places in a row: whether the process was ever ready; what it has taken; the two clients seen last, hash and time."""
_HEAD = 7
_WIDTH = _HEAD + 2 * BUCKETS


def create(processes: int) -> int:
    """A descriptor of the memory of so many processes' counts."""
    return memory.create("bridle-counts", 8 * _WIDTH * processes)


class Counts:
    """The rows, seen by one of the processes.

    salt: the same for all of them, and nobody else's.
    """

    def __init__(self, descriptor: int, own: int, salt: bytes) -> None:
        self._descriptor = descriptor
        self._cells = memoryview(memory.view(descriptor)).cast("q")
        self._own = own * _WIDTH
        self._rows = range(0, len(self._cells), _WIDTH)
        self._others = [row for row in self._rows if row != self._own]
        self._salt = salt

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps the others from counting meanwhile."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def started(self) -> None:
        """Tells the others that this process is ready."""
        self._cells[self._own + _STARTED] = 1

    def was_started(self, process: int) -> bool:
        """Whether a process (or the one whose place it took) was ever ready."""
        return bool(self._cells[process * _WIDTH + _STARTED])

    @property
    def all_started(self) -> bool:
        """Whether all were."""
        return all(self._cells[row + _STARTED] for row in self._rows)

    def forget(self, process: int) -> None:
        """Gives back what a process that has ended held."""
        row = process * _WIDTH
        with self.lock():
            for cell in range(row + _FILES, row + _WIDTH):
                self._cells[cell] = 0

    def see(self, client: str, now: float) -> None:
        """Notes that a client was here."""
        mark, at = self._mark(client), self._own + _SEEN
        if self._cells[at] != mark:
            self._cells[at + 2], self._cells[at + 3] = self._cells[at], self._cells[at + 1]
        self._cells[at], self._cells[at + 1] = mark, int(now * 1e6)

    def others_wait(self, client: str, since: float) -> bool:
        """Whether another client was seen by another process since then."""
        mark, oldest = self._mark(client), int(since * 1e6)
        seen = ((row + _SEEN + 2 * i) for row in self._others for i in (0, 1))
        return any(self._cells[at] != mark and self._cells[at + 1] > oldest for at in seen)

    def taken(self, client: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Files and bytes that the other processes have taken: in all, and for this client."""
        cells, bucket = self._cells, self._bucket(client)
        whole = (sum(cells[row + _FILES] for row in self._others), sum(cells[row + _BYTES] for row in self._others))
        own = (sum(cells[row + bucket] for row in self._others), sum(cells[row + bucket + 1] for row in self._others))
        return whole, own

    def move(self, client: str, files: int, size: int) -> None:
        """Counts what this process has taken, or given back."""
        bucket = self._own + self._bucket(client)
        for at in (self._own + _FILES, bucket):
            self._cells[at] += files
            self._cells[at + 1] += size

    def _mark(self, client: str) -> int:
        found = hashlib.blake2b(client.encode("utf-8", "surrogateescape"), digest_size=8, key=self._salt).digest()
        return int.from_bytes(found, "little") >> 1

    def _bucket(self, client: str) -> int:
        return _HEAD + 2 * (self._mark(client) % BUCKETS)
