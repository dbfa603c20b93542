"""The HTTP protocol of uvicorn with bounds that it lacks: headers that never end, and too many connections.

Where all places are taken, the connection that has been idle (or without complete headers) longest gives its place up.
Where none is idle, a few more may still ask for /livez and /readyz: a service at its limit is no dead one.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.web.problems import ProblemError

PROBES = (b"/livez", b"/readyz")
PROBE_PLACES = 64
"""Connections beyond the limit, good for a probe."""
MAX_HEADERS = 64 * 1024
"""Bytes of a request line and its headers."""


@dataclass
class Bounds:
    """connections: at most; header_seconds: for a request's line and headers, and to keep an idle connection; idle:
    the connections that wait for a request, the longest waiting first."""

    connections: int
    header_seconds: float
    idle: OrderedDict[HttpToolsProtocol, None] = field(default_factory=OrderedDict)


class BoundedProtocol(HttpToolsProtocol):
    """One connection. `bounds` is set by `bounded_protocol`, in a class of each server's own."""

    bounds: Bounds
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _only_probe = False
    _refused = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        over = len(self.connections) - self.bounds.connections
        if over > 0 and self.bounds.idle:
            oldest, _ = self.bounds.idle.popitem(last=False)
            oldest.transport.close()
        elif over > PROBE_PLACES:
            transport.abort()
            return
        else:
            self._only_probe = over > 0
        self.bounds.idle[self] = None
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._head_timer is not None:
            room = MAX_HEADERS - self._head_bytes
            self._head_bytes += min(len(data), room)
            super().data_received(data[:room])  # what follows may be a body, once the headers are complete
            data = data[room:]
            if self._head_timer is not None and self._head_bytes >= MAX_HEADERS:
                self._refuse()
        if data and not self.transport.is_closing():
            super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self.bounds.idle.pop(self, None)
        if self._only_probe and not self.url.partition(b"?")[0].endswith(PROBES):
            self._refused = True
            self._answer(ProblemError("busy", f"max_connections = {self.bounds.connections} are open", retry_after=1))
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self.bounds.idle[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.bounds.idle.pop(self, None)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._answer(ProblemError("malformed", "the bytes are no HTTP request"))

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self.bounds.header_seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        if self._head_bytes:
            self._answer(ProblemError("slow-request", f"no complete headers within {self.bounds.header_seconds:g} s"))
        else:
            self.transport.close()

    def _refuse(self) -> None:
        self._answer(ProblemError("headers-too-large", f"headers over {MAX_HEADERS} bytes"))

    def _answer(self, problem: ProblemError) -> None:
        response = problem.response()
        lines = [f"HTTP/1.1 {problem.status} {problem.title}".encode(), b"connection: close"]
        lines += [name + b": " + value for name, value in response.raw_headers]
        self.transport.write(b"\r\n".join([*lines, b"", response.body]))
        self.transport.close()


def bounded_protocol(max_connections: int, header_timeout: float) -> type[BoundedProtocol]:
    """A protocol that bounds connections by `max_connections`, and refuses headers that are too long or too slow."""
    return type("ServedProtocol", (BoundedProtocol,), {"bounds": Bounds(max_connections, header_timeout)})
