"""A file that grows. What finds no room waits in memory and is written, in order, once there is room."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from bridle.files import clear_disk_errors


class PatientFile:
    """Appends; several threads may."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""
        self._lock = threading.Lock()

    def append(self, data: bytes) -> None:
        """Adds `data`.

        Raises:
            OSError: no room; it waits, and nothing of it is in the file.
        """
        with self._lock:
            self._waiting += data
            self._write()

    def flush(self) -> None:
        """Writes what waits.

        Raises:
            OSError: there is still no room.
        """
        with self._lock:
            self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        with clear_disk_errors(self.path), self.path.open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                while self._waiting[(done := os.fstat(file.fileno()).st_size - size) :]:
                    file.write(self._waiting[done:])
            except OSError:
                file.truncate(size)
                raise
            self._waiting = b""
