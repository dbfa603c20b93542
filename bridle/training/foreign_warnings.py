"""Warnings of the libraries below go to a file of the run, so that the screen says only what a user can act on."""

from __future__ import annotations

import logging
from pathlib import Path

NAME = "warnings.log"
LOGGERS = ("py.warnings", "DeepSpeed")


class ForeignWarnings(logging.Handler):
    """Keeps records in memory until the run's folder is there; then they, and all later ones, go to its `warnings.log`.

    Errors of the libraries still reach the screen.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.file: Path | None = None
        self._held: list[str] = []

    @classmethod
    def divert(cls) -> ForeignWarnings:
        """To be called before the libraries are imported."""
        handler = cls()
        logging.captureWarnings(True)
        for name in LOGGERS:
            logging.getLogger(name).addFilter(handler.take)
        return handler

    def take(self, record: logging.LogRecord) -> bool:
        """As a logger's filter: keeps a warning, and lets errors pass."""
        if record.levelno < logging.ERROR:
            self.handle(record)
        return record.levelno >= logging.ERROR

    def emit(self, record: logging.LogRecord) -> None:
        self._held.append(self.format(record).rstrip() + "\n")
        self.flush()

    def flush(self) -> None:
        """Writes what is held, if there is a place for it."""
        if self.file is None or not self._held or not self.file.parent.is_dir():
            return
        try:
            with self.file.open("a", encoding="utf-8") as log:
                log.writelines(self._held)
        except OSError:  # a full disk is told by what matters
            return
        self._held.clear()
