"""Where the members of every sample stand, in one file of the cache that all loaders of a machine map into memory.

An index is text, and reading one takes 100 bytes of it and a Python object for every sample. So whoever first needs a
shard writes what it read as four numbers a sample into the file; everybody else looks them up there, and the kernel
keeps one copy of them for all. The file begins with a record of each shard: the index's time of writing and size, and
a checksum of the shard's rows. A row counts only where its record fits, so that neither a crash nor a new index can
give a wrong one: then the index is read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)
VERSION = 1
COLUMNS = 4
"""Begin and end of a sample's line in the index, offset and size of its wanted member in the tar; bytes."""
RECORD = 4
"""Numbers of a shard's record: time of writing (ns), size, checksum, 1 where it is written."""
NUMBER = np.dtype("<i8")
UNUSED_SECONDS = 30 * 24 * 3600
"""Files that no run has opened for so long are removed."""


class SharedTables:
    """The file of one set of shards. Safe over fork and pickle, and between processes that read and write at once.

    Args:
        folder: made where it is not there. If it cannot be written, nothing is kept and nothing found.
        urls, counts: of the shards; extensions: that say which member of a sample is wanted.
    """

    def __init__(self, folder: Path, urls: Sequence[str], counts: Sequence[int], extensions: Sequence[str]) -> None:
        named = json.dumps([VERSION, list(urls), list(counts), list(extensions)])
        self.path = folder / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.tables"
        self.counts = list(counts)
        self._firsts = [0, *accumulate(self.counts)]
        self._mapped: np.ndarray | None = None
        self._refused = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}

    def rows(self, number: int, stamp: tuple[int, int]) -> np.ndarray | None:
        """Rows of shard `number`, int64 ``[n, 4]``, if they were written for an index of this time of writing and size.

        They are part of the mapped file and take no memory of their own.
        """
        numbers = self._numbers()
        if numbers is None:
            return None
        record = numbers[number * RECORD : (number + 1) * RECORD]
        rows = numbers[self._place(number) : self._place(number + 1)]
        if record.tolist() != [*stamp, zlib.crc32(rows.data), 1]:
            return None
        return rows.reshape(-1, COLUMNS)

    def put(self, number: int, stamp: tuple[int, int], rows: np.ndarray) -> np.ndarray:
        """Keeps the rows of a shard; returns them as `rows` does, or those given where there is no room."""
        if self._numbers() is None:
            return rows
        content = np.ascontiguousarray(rows, dtype=NUMBER)
        record = np.array([*stamp, zlib.crc32(content.data), 1], dtype=NUMBER)
        try:
            with self.path.open("r+b", buffering=0) as file:
                os.pwrite(file.fileno(), content.data, self._place(number) * NUMBER.itemsize)
                os.pwrite(file.fileno(), record.data, number * RECORD * NUMBER.itemsize)
        except OSError as error:
            log.debug("%s: %s; each loader keeps its own table", self.path, error)
            return rows
        kept = self.rows(number, stamp)
        return rows if kept is None else kept

    def _place(self, number: int) -> int:
        """Where a shard's rows begin, in numbers."""
        return len(self.counts) * RECORD + self._firsts[number] * COLUMNS

    def _numbers(self) -> np.ndarray | None:
        """The whole file, mapped; none where it cannot be had."""
        if self._mapped is None and not self._refused:
            try:
                self._mapped = self._map()
            except OSError as error:
                log.debug("%s: %s; each loader keeps its own table", self.path, error)
                self._refused = True
        return self._mapped

    def _map(self) -> np.ndarray:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            _remove_unused(self.path.parent)
        size = self._place(len(self.counts)) * NUMBER.itemsize
        with self.path.open("ab") as file:
            if os.fstat(file.fileno()).st_size != size:
                file.truncate(size)  # holes: no room is taken until rows are written
            os.utime(file.fileno())
        return np.memmap(self.path, dtype=NUMBER, mode="r", shape=(size // NUMBER.itemsize,))


def _remove_unused(folder: Path) -> None:
    for path in folder.glob("*.tables"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
                path.unlink()
