"""Who may come in, how many at once, for how long, and how much of the house one client may fill."""

from __future__ import annotations

import time
from collections import Counter, deque
from contextlib import nullcontext

from serving.metrics import Metrics
from serving.settings import ServeSettings
from serving.web.counts import Counts
from serving.web.problems import ProblemError

MIN_TIMEOUT = 0.1
"""Seconds; the least that `X-Request-Timeout` may say."""
REMEMBERED = 64
"""Answers from whose times the service knows its own rate."""
WAITING_SECONDS = 10.0
"""A client that was here, or was sent away, so lately counts as one that waits."""
MAX_CLIENTS = 10_000
"""Clients that are remembered as waiting."""


class Admission:
    """Bounds the files and the bytes that are under way. A request of n files takes n places.

    While others wait, a client that holds places gets no more than `max_share` of them. A client is a key, or an
    address where there are no keys.

    counts: what the other HTTP processes of the service have taken, where there are any: the bounds are those of all.
    """

    def __init__(self, settings: ServeSettings, metrics: Metrics, counts: Counts | None = None) -> None:
        self._settings = settings
        self._metrics = metrics
        self._counts = counts
        self._files: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._seen: dict[str, float] = {}
        self._finished: deque[float] = deque(maxlen=REMEMBERED)

    def places(self, client: str) -> Places:
        """Places for one request's files and bytes; to be closed when the answer is sent."""
        self._see(client)
        return Places(self, client)

    @property
    def retry_after(self) -> float:
        """Seconds until a place is likely to be free: places taken over the rate of the last answers, 1 to 60."""
        if len(self._finished) < 2:
            return 1.0
        span = time.monotonic() - self._finished[0]
        return min(60.0, max(1.0, 0.5 * self._files.total() * span / len(self._finished)))

    def check(self, client: str, files: int, size: int) -> None:
        """Whether there are places.

        Raises:
            ProblemError: there are none (429).
        """
        settings = self._settings
        whole, own = self._counts.taken(client) if self._counts is not None else ((0, 0), (0, 0))
        self._check(client, self._files, (whole[0], own[0]), files, settings.max_queue, "files", "max_queue")
        self._check(client, self._bytes, (whole[1], own[1]), size, settings.max_queue_bytes, "bytes", "max_queue_bytes")

    def refuse_for_good(self, files: int, size: int) -> None:
        """Whether one request may ever have so much: to wait would not help.

        Raises:
            ProblemError: it may not (413).
        """
        settings = self._settings
        if files > settings.max_queue:
            raise ProblemError("too-large", f"{files} files, max_queue is {settings.max_queue}; send several requests")
        if size > settings.max_queue_bytes:
            told = f"body and answer take {size} bytes, max_queue_bytes is {settings.max_queue_bytes}"
            raise ProblemError("too-large", f"{told}; ask for less at once")

    def _check(
        self, client: str, here: Counter[str], elsewhere: tuple[int, int], more: int, limit: int, what: str, name: str
    ) -> None:
        """elsewhere: what the other processes have taken, in all and for this client."""
        if not more:
            return
        whole, own = here.total() + elsewhere[0], here[client] + elsewhere[1]
        if whole + more > limit:
            raise self._busy(f"{whole} {what} are under way, {name} is {limit}")
        share = int(self._settings.max_share * limit)
        if own and own + more > share and self._others_wait(client):
            raise self._busy(f"{own} {what} of yours are under way, and others wait; a share is {share}")

    def _others_wait(self, client: str) -> bool:
        since = time.monotonic() - WAITING_SECONDS
        if any(seen > since for other, seen in self._seen.items() if other != client):
            return True
        return self._counts is not None and self._counts.others_wait(client, since)

    def _see(self, client: str) -> None:
        now = time.monotonic()
        self._seen.pop(client, None)
        self._seen[client] = now  # the order is that of the times
        while len(self._seen) > MAX_CLIENTS or next(iter(self._seen.values())) < now - WAITING_SECONDS:
            del self._seen[next(iter(self._seen))]
        if self._counts is not None:
            with self._counts.lock():
                self._counts.see(client, now)

    def take(self, client: str, files: int, size: int) -> None:
        """Takes places, if there are any.

        Raises:
            ProblemError: there are none (429).
        """
        with self._counts.lock() if self._counts is not None else nullcontext():
            self.check(client, files, size)
            self._move(client, files, size)

    def give_back(self, client: str, files: int, size: int) -> None:
        """Gives places back."""
        if not files and not size:
            return
        with self._counts.lock() if self._counts is not None else nullcontext():
            self._move(client, -files, -size)
        self._finished.extend([time.monotonic()] * min(files, REMEMBERED))

    def _move(self, client: str, files: int, size: int) -> None:
        for taken, change in ((self._files, files), (self._bytes, size)):
            taken[client] += change
            if not taken[client]:
                del taken[client]
        if self._counts is not None:
            self._counts.move(client, files, size)
        if files:
            self._metrics.queued.set(self._files.total())
        if size:
            self._metrics.upload_bytes.set(self._bytes.total())

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

    def __init__(self, admission: Admission, client: str) -> None:
        self._admission = admission
        self._client = client
        self.files = 0
        self.bytes = 0

    def look(self) -> None:
        """Whether a file would find a place now; a busy service says so before it reads a body.

        Raises:
            ProblemError: it would not (429).
        """
        self._admission.check(self._client, 1, 0)

    def take_files(self, count: int) -> None:
        """Places for so many more files, whose bodies are here: who sends slowly holds none.

        Raises:
            ProblemError: there are not so many now (429), or never will be (413).
        """
        self._admission.refuse_for_good(self.files + count, 0)
        self._admission.take(self._client, count, 0)
        self.files += count

    def take_bytes(self, size: int) -> None:
        """Room for so many more bytes, of a body or of an answer.

        Raises:
            ProblemError: none is left now (429), or there will never be so much (413).
        """
        self._admission.refuse_for_good(0, self.bytes + size)
        self._admission.take(self._client, 0, size)
        self.bytes += size

    def give_back_files(self) -> None:
        """The work is done; the answer's bytes stay taken until they are sent."""
        self._admission.give_back(self._client, self.files, 0)
        self.files = 0

    def close(self) -> None:
        """Gives all back."""
        self._admission.give_back(self._client, self.files, self.bytes)
        self.files = self.bytes = 0
