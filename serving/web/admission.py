"""Who may come in, how many at once, and for how long."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from serving.metrics import Metrics
from serving.settings import ServeSettings
from serving.web.problems import ProblemError

MIN_TIMEOUT = 0.1
"""Seconds; the least that `X-Request-Timeout` may say."""
REMEMBERED = 64
"""Answers from whose times the service knows its own rate."""


class Admission:
    """Bounds the files and the bytes that are under way. A request of n files takes n places."""

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._files = 0
        self._bytes = 0
        self._finished: deque[float] = deque(maxlen=REMEMBERED)

    @contextmanager
    def request(self) -> Iterator[Places]:
        """Places for one request's files and bytes, given back at the end."""
        places = Places(self)
        try:
            yield places
        finally:
            self._move(-places.files, -places.bytes)
            now = time.monotonic()
            self._finished.extend([now] * min(places.files, REMEMBERED))

    @property
    def retry_after(self) -> float:
        """Seconds until a place is likely to be free: places taken over the rate of the last answers, 1 to 60."""
        if len(self._finished) < 2:
            return 1.0
        span = max(time.monotonic() - self._finished[0], 1e-3)
        return min(60.0, max(1.0, 0.5 * self._files * span / len(self._finished)))

    def _move(self, files: int, size: int) -> None:
        self._files += files
        self._bytes += size
        self._metrics.queued.set(self._files)
        self._metrics.upload_bytes.set(self._bytes)

    def take(self, files: int, size: int) -> None:
        """Takes places.

        Raises:
            ProblemError: there are none (429).
        """
        settings = self._settings
        if self._files + files > settings.max_queue:
            raise self._busy(f"{self._files} files are under way, max_queue is {settings.max_queue}")
        if size and self._bytes + size > settings.max_queue_bytes:
            raise self._busy(f"{self._bytes} bytes are under way, max_queue_bytes is {settings.max_queue_bytes}")
        self._move(files, size)

    def _busy(self, detail: str) -> ProblemError:
        return ProblemError("busy", f"{detail}; wait as Retry-After says", retry_after=self.retry_after)

    def deadline(self, header: str | None) -> float:
        """The monotonic time at which a request that begins now must be answered.

        Raises:
            ProblemError: `X-Request-Timeout` is no number of seconds within the bounds.
        """
        longest = self._settings.request_timeout
        if header is None:
            return time.monotonic() + longest
        try:
            seconds = float(header)
        except ValueError:
            seconds = float("nan")
        if not MIN_TIMEOUT <= seconds < float("inf"):
            raise ProblemError(
                "wrong-parameter", f"X-Request-Timeout {header[:40]!r}: expected seconds, at least {MIN_TIMEOUT:g}"
            )
        return time.monotonic() + min(seconds, longest)


class Places:
    """What one request has taken."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.files = 0
        self.bytes = 0

    def take_file(self) -> None:
        """A place for one more file.

        Raises:
            ProblemError: none is left (429).
        """
        self._admission.take(1, 0)
        self.files += 1

    def take_bytes(self, size: int) -> None:
        """Room for so many more bytes.

        Raises:
            ProblemError: none is left (429).
        """
        self._admission.take(0, size)
        self.bytes += size
