"""One JSON object a line on standard error: `time`, `level`, `event` and what belongs to it.

A thread writes. Whoever logs only puts a line in a queue, and drops it where the queue is full: a pipe that nobody
reads, a terminal that is stopped or a full disk holds nothing up. What was dropped is counted, and told once lines
flow again.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import threading
from collections import deque
from datetime import UTC, datetime
from typing import Any

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
QUEUED = 10_000
"""Lines that wait to be written at most."""
AT_ONCE = 256
"""Lines that are written together."""
GATHER_SECONDS = 0.02
"""How long a line waits for others to be written with, unless it tells of trouble: to wake a thread costs as much as a
line."""
STDERR = 2
LAST_SECONDS = 1.0
"""Time for the lines that are left when the process ends."""
_least = 20


class _Writer:
    """The queue and the thread behind it, which starts with the first line (a fork has none)."""

    def __init__(self) -> None:
        self.dropped = 0
        self._told = 0
        self._lines: deque[str] = deque()
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._writing = False
        self._hurry = False

    def put(self, line: str, urgent: bool) -> None:
        with self._change:
            if len(self._lines) >= QUEUED:
                self.dropped += 1
                return
            self._lines.append(line)
            self._hurry = self._hurry or urgent
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="bridle-log", daemon=True)
                self._thread.start()
            if len(self._lines) == 1 or urgent:  # else it is awake, and gathers
                self._change.notify_all()

    def flush(self, patience: float) -> bool:
        """Waits until all is written; whether it is."""
        with self._change:
            self._hurry = True
            self._change.notify_all()
            return self._change.wait_for(lambda: not self._lines and not self._writing, patience)

    def _run(self) -> None:
        while True:
            with self._change:
                self._writing = False
                self._change.notify_all()
                self._change.wait_for(lambda: bool(self._lines))
                self._change.wait_for(lambda: self._hurry or len(self._lines) >= AT_ONCE, GATHER_SECONDS)
                lines = [self._lines.popleft() for _ in range(min(len(self._lines), AT_ONCE))]
                self._hurry = self._hurry and bool(self._lines)
                self._writing = True
                lost = self.dropped - self._told
                self._told = self.dropped
            if lost:
                lines.append(_line("warning", "lines were dropped; nobody took them in time", {"lines": lost}))
            with contextlib.suppress(OSError):
                rest = memoryview("".join(lines).encode())
                while rest:  # not sys.stderr: a writer that hangs would hold its lock when the interpreter ends
                    rest = rest[os.write(STDERR, rest) :]


_writer = _Writer()


def dropped_lines() -> int:
    """Lines dropped so far."""
    return _writer.dropped


def flush(patience: float = LAST_SECONDS) -> bool:
    """Waits until all lines are written, at most so many seconds; whether they are."""
    return _writer.flush(patience)


def _anew() -> None:
    """After a fork: the thread stayed with the parent, and so do its lines."""
    global _writer
    _writer = _Writer()


os.register_at_fork(after_in_child=_anew)
atexit.register(flush)


def set_level(level: str) -> None:
    """Drops lines below `level`."""
    global _least
    _least = LEVELS[level]


def log(level: str, event: str, **fields: Any) -> None:
    """Writes a line; fields that are None are left out. Never fails and never waits."""
    if LEVELS[level] >= _least:
        _writer.put(_line(level, event, fields), urgent=LEVELS[level] > LEVELS["info"])


def _line(level: str, event: str, fields: dict[str, Any]) -> str:
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level, "event": event}
    line |= {name: value for name, value in fields.items() if value is not None}
    return json.dumps(line, default=str) + "\n"


class JsonHandler(logging.Handler):
    """Sends the lines of libraries (uvicorn, asyncio) the same way."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record."""
        level = next((name for name, number in reversed(LEVELS.items()) if record.levelno >= number), "debug")
        error = repr(record.exc_info[1]) if record.exc_info and record.exc_info[1] else None
        log(level, record.getMessage(), logger=record.name, error=error)


def take_over_logging(level: str) -> None:
    """Routes the `logging` and `warnings` modules through `log`, libraries that write by handlers of their own too."""
    set_level(level)
    logging.captureWarnings(True)
    root = logging.getLogger()
    for name in root.manager.loggerDict:
        logger = logging.getLogger(name)
        if logger.handlers:
            logger.handlers.clear()
            logger.propagate = True
    root.handlers[:] = [JsonHandler()]
    root.setLevel(logging.WARNING if LEVELS[level] > 10 else logging.INFO)
