"""Around every request: its id, log line, metrics and span; its key; bounds on slow readers; errors as problems."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
import traceback
from collections.abc import Mapping, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bridle.settings import RecipeError
from serving.logs import log
from serving.settings import ServeSettings, is_loopback
from serving.web.keys import presented_key
from serving.web.problems import INTERNAL, ProblemError
from serving.web.service import Service

ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
PIECE = 256 * 1024
"""Bytes of an answer that are handed to the connection at once; it holds about so many."""
PATIENCE = 5.0
"""Seconds before an answer's rate counts."""
LEFTOVER_BYTES, LEFTOVER_SECONDS = 1 << 20, 1.0
"""What is still read of a refused body, so that the client gets to read the answer."""
SECURITY = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Around:
    """The outermost layer."""

    def __init__(self, app: ASGIApp, service: Service, scopes: Mapping[str, str]) -> None:
        self._app = app
        self._service = service
        self._scopes = scopes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        scope = _normal(scope, self._service.settings.root_path.rstrip("/"))
        exchange = _Exchange(scope, receive, send, self._service.settings)
        metrics = self._service.metrics
        metrics.in_flight.inc()
        try:
            with self._service.tracing.request(f"{method} {scope['path']}", exchange.headers) as span:
                await self._serve(exchange)
                if span is not None:
                    span.set_attribute("http.response.status_code", exchange.status)
                    span.set_attribute("bridle.request_id", exchange.id)
        finally:
            exchange.close()
            metrics.in_flight.dec()
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - exchange.began
            metrics.requests.labels(route, exchange.status).inc()
            metrics.request_seconds.labels(route).observe(seconds)
            quiet = self._needed(scope) in ("open", "metrics") and exchange.status < 400
            log(
                "debug" if quiet else "info",
                "request",
                request_id=exchange.id,
                method=method,
                path=scope["path"][:200],
                status=exchange.status,
                seconds=round(seconds, 4),
                received=exchange.received,
                sent=exchange.sent,
                key=scope["state"].get("key"),
                **scope["state"].get("log", {}),
            )

    async def _serve(self, exchange: _Exchange) -> None:
        try:
            self._admit(exchange)
            await self._app(exchange.scope, exchange.receive, exchange.send)
        except ProblemError as problem:
            await exchange.refuse(problem)
            self._service.metrics.rejected.labels(problem.type).inc()
        except (TimeoutError, ConnectionError):
            exchange.status = 499
            exchange.abort()
        except Exception as error:  # a fault of ours: told in the log, not to the client
            trace = "".join(traceback.format_exception(error))[-8000:]
            log("error", "a request failed", request_id=exchange.id, error=repr(error), traceback=trace)
            await exchange.refuse(ProblemError("internal", INTERNAL))

    def _needed(self, scope: Scope) -> str:
        """The scope of a request's path; `use` also where there is no route, or one with a name in it."""
        return self._scopes.get(scope["path"], "use")

    def _admit(self, exchange: _Exchange) -> None:
        """Checks where the request comes from and whether its key opens the route.

        Raises:
            ProblemError: 401, 403.
        """
        scope, headers, keys = exchange.scope, exchange.headers, self._service.keys
        needed = self._needed(scope)
        if needed == "open":
            return
        origin = headers.get("origin")
        allowed = origin is not None and origin in self._service.settings.cors_origins
        if _from_elsewhere(headers) and not allowed:
            raise ProblemError("forbidden", "pages of other sites may not call the service; set cors_origins")
        if not keys.needed:
            host = _host(headers.get("host", ""))
            if not is_loopback(host) and host not in self._service.settings.allowed_hosts:
                raise ProblemError(
                    "forbidden", f"host {host[:80]!r} is not this machine; set API keys or allowed_hosts"
                )
            return
        if scope["method"] == "OPTIONS" and allowed:
            return
        try:
            keys.refresh()
        except (RecipeError, OSError, UnicodeError) as error:
            log("error", "the keys could not be read; the old ones stay", error=str(error))
        presented = presented_key(headers)
        key = keys.find(presented) if presented is not None else None
        if key is None:
            raise ProblemError("unauthorized", "send a valid key as Authorization: Bearer KEY")
        scope["state"]["key"] = key.name
        if needed not in key.scopes:
            raise ProblemError("forbidden", f"the key's scopes do not include {needed}")


class _Exchange:
    """One request and its answer, watched."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, settings: ServeSettings) -> None:
        self.scope = scope
        self.headers = Headers(scope=scope)
        self.began = time.perf_counter()
        said = self.headers.get("x-request-id", "")
        self.id = said if ID.fullmatch(said) else secrets.token_hex(8)
        self.status = 0
        self.received = self.sent = 0
        self._receive = receive
        self._send = send
        self._patience = settings.body_idle_timeout
        self._min_rate = settings.min_send_rate
        self._waited = 0.0
        origin = self.headers.get("origin")
        allowed = origin is not None and origin in settings.cors_origins
        self._readable = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"} if origin and allowed else {}
        self._head: Message | None = None
        self._started = False
        self._unread = "transfer-encoding" in self.headers or self.headers.get("content-length", "0") != "0"
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = self.id

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self.received += len(message.get("body", b""))
            self._unread = self._unread and message.get("more_body", False)
        else:
            self._unread = False
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self._unread:
                await self._read_leftover()
            self._started = True
            self.status = message["status"]
            added = [(b"x-request-id", self.id.encode()), *SECURITY]
            if self._unread:
                added.append((b"connection", b"close"))
            message = {**message, "headers": [*message.get("headers", []), *added]}
            self._head = message
            return
        body = memoryview(message.get("body", b""))
        last = max(0, len(body) - 1) // PIECE * PIECE
        for start in range(0, last + 1, PIECE):
            more = start < last or message.get("more_body", False)
            await self._send_in_time({**message, "body": bytes(body[start : start + PIECE]), "more_body": more})
            self.sent += min(PIECE, len(body) - start)

    async def _send_in_time(self, message: Message) -> None:
        """Sends a piece when the client has taken those before; one that reads too slowly is cut off. Only the time
        that the client was waited for counts: an answer that is made meanwhile may be made slowly."""
        if self.sent < self._min_rate * (self._waited - PATIENCE):
            raise TimeoutError
        head, self._head = self._head, None
        began = time.monotonic()
        async with asyncio.timeout(self._patience):
            if head is not None:
                await self._send(head)
            await self._send(message)
        self._waited += time.monotonic() - began

    def close(self) -> None:
        """Gives back what the request has taken."""
        places = self.scope["state"].get("places")
        if places is not None:
            places.close()

    async def refuse(self, problem: ProblemError) -> None:
        """Answers with a problem; where an answer has begun already, breaks the connection off."""
        if self._started:
            self.abort()
            return
        try:
            await problem.response(self.id, self._readable)(self.scope, self.receive, self.send)
        except (TimeoutError, ConnectionError):
            self.abort()

    def abort(self) -> None:
        """Closes the connection without ceremony."""
        transport = getattr(getattr(self._send, "__self__", None), "transport", None)
        if transport is not None:
            transport.abort()

    async def _read_leftover(self) -> None:
        read = 0
        try:
            async with asyncio.timeout(LEFTOVER_SECONDS):
                while self._unread and read < LEFTOVER_BYTES:
                    read += len((await self.receive()).get("body", b""))
        except TimeoutError:
            pass


def _normal(scope: Scope, prefix: str) -> Scope:
    """The request as the routes know it: without the proxy's prefix and a slash at the end (a redirect would lead to
    another scheme or host behind a proxy), HEAD as GET (the protocol leaves the body out)."""
    path = scope["path"]
    if prefix and (path == prefix or path.startswith(prefix + "/")):
        path = path[len(prefix) :] or "/"
    path = path.rstrip("/") or "/"
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "path": path, "method": method}


def _from_elsewhere(headers: Headers) -> bool:
    """Whether a page of another site asks. Browsers say so themselves, but not where the page came over plain http:
    then its `Origin` is compared with the host that it asks."""
    said, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if said is not None or origin is None:
        return said == "cross-site"
    return origin.partition("://")[2].lower() != headers.get("host", "").lower()


def _host(header: str) -> str:
    name, _, port = header.rpartition(":")
    return (name if port.isdecimal() and name else header).strip("[]")
