"""One JSON object a line on standard error: `time`, `level`, `event` and what belongs to it."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_least = 20


def set_level(level: str) -> None:
    """Drops lines below `level`."""
    global _least
    _least = LEVELS[level]


def log(level: str, event: str, **fields: Any) -> None:
    """Writes a line; fields that are None are left out. Never fails: a full disk or a closed pipe stops no request."""
    if LEVELS[level] < _least:
        return
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level, "event": event}
    line |= {name: value for name, value in fields.items() if value is not None}
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(json.dumps(line, default=str) + "\n")
        sys.stderr.flush()


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
