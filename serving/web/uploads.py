"""Request bodies, read as they come and bounded in every direction: bytes, parts, headers, time.

Nothing a client says about its body is believed: Content-Length is only good for refusing early, Content-Type only
tells multipart from the rest, names of files are not even kept.
"""

from __future__ import annotations

import asyncio
import re
import time
import zlib
from collections.abc import AsyncIterator
from typing import Any

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from serving.metrics import Metrics
from serving.settings import ServeSettings
from serving.web.admission import Places
from serving.web.problems import ClientGoneError, ProblemError

MAX_PART_HEADERS = 8
MAX_PART_HEADER = 2048
MAX_BOUNDARY = 70
"""RFC 2046."""
PACKED = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""Content-Encodings of a body, with zlib's name for each."""
UNFOLDED_AT_ONCE = 1 << 18
"""Bytes of a packed body: 1 ms of the event loop."""
PLAIN_NAME = re.compile(rb'form-data; name="(\w+)"(?:; filename="[^"\\]*")?$')
PATIENCE = 5.0
"""Seconds before a body's rate counts."""
OVERHEAD = 4096
"""Bytes of multipart syntax allowed for each file, beyond `max_bytes`."""


class Uploads:
    """Reads bodies within the settings' bounds."""

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics

    async def files(self, request: Request, places: Places, deadline: float) -> list[bytearray]:
        """The files of a request: the raw body, or each part of a multipart body.

        Raises:
            ProblemError: 400, 408, 413, 422, 429.
        """
        places.look()
        kind, options = parse_options_header(request.headers.get("content-type"))
        if kind.lower() == b"multipart/form-data":
            return await self._multipart(request, places, deadline, options.get(b"boundary", b""))
        if kind.lower().startswith(b"multipart/"):
            raise ProblemError("unsupported-kind", "a multipart body must be multipart/form-data")
        body = await self.body(request, places, deadline, self._settings.max_bytes)
        places.take_files(1)
        if not body:
            raise ProblemError("undecodable", "the body is empty; send the bytes of a file", clip=0)
        return [body]

    async def body(self, request: Request, places: Places, deadline: float, limit: int) -> bytearray:
        """A whole body of at most `limit` bytes.

        Raises:
            ProblemError: 408, 413, 429.
        """
        whole = bytearray()
        async for chunk in self._plain(request, places, deadline, limit):
            whole += chunk
        return whole

    async def _plain(self, request: Request, places: Places, deadline: float, limit: int) -> AsyncIterator[bytes]:
        """The body's bytes, unfolded where Content-Encoding says that they are packed."""
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        chunks = self._chunks(request, places, deadline, limit)
        if encoding in ("", "identity"):
            async for chunk in chunks:
                yield chunk
            return
        if encoding not in PACKED:
            raise ProblemError(
                "unsupported-kind", f"Content-Encoding {encoding[:40]!r} is not taken: send {', '.join(PACKED)} or none"
            )
        unpacker, total = zlib.decompressobj(PACKED[encoding]), 0
        async for chunk in chunks:
            packed = chunk
            while packed:
                try:
                    piece = unpacker.decompress(packed, UNFOLDED_AT_ONCE)
                except zlib.error as error:
                    raise ProblemError("malformed", f"the body is no {encoding}: {error}") from None
                total += len(piece)
                if total > limit:
                    raise _too_large(limit)
                places.take_bytes(len(piece))
                yield piece
                if unpacker.unused_data:
                    raise ProblemError("malformed", f"something follows the end of the {encoding} body")
                packed = unpacker.unconsumed_tail
                await asyncio.sleep(0)  # others have their turn between two pieces of a bomb
        if not unpacker.eof:
            raise ProblemError("malformed", f"the {encoding} body ends too early")

    async def _chunks(self, request: Request, places: Places, deadline: float, limit: int) -> AsyncIterator[bytes]:
        said = request.headers.get("content-length", "")
        if said.isdecimal() and int(said) > limit:
            raise _too_large(limit)
        total, more = 0, True
        began = time.monotonic()
        while more:
            now = time.monotonic()
            if self._settings.min_receive_rate * (now - began - PATIENCE) > total:
                raise ProblemError("slow-request", f"{total} bytes came too slowly; see min_receive_rate")
            wait = min(self._settings.body_idle_timeout, deadline - now)
            try:
                async with asyncio.timeout(wait):
                    message = await request.receive()
            except TimeoutError:
                raise ProblemError(
                    "slow-request", f"no byte of the body for {max(wait, 0):.1f} s; send it in one go"
                ) from None
            if message["type"] != "http.request":
                raise ClientGoneError
            chunk, more = message.get("body", b""), message.get("more_body", False)
            if not chunk:
                continue
            total += len(chunk)
            if total > limit:
                raise _too_large(limit)
            self._metrics.received_bytes.inc(len(chunk))
            places.take_bytes(len(chunk))
            yield chunk

    async def _multipart(self, request: Request, places: Places, deadline: float, boundary: bytes) -> list[bytearray]:
        if not 0 < len(boundary) <= MAX_BOUNDARY:
            raise ProblemError(
                "malformed", f"the multipart boundary has {len(boundary)} bytes, expected 1 to {MAX_BOUNDARY}"
            )
        parts = _Parts(self._settings.max_clips)
        parser = MultipartParser(
            boundary, parts.callbacks(), max_header_count=MAX_PART_HEADERS, max_header_size=MAX_PART_HEADER
        )
        limit = self._settings.max_bytes + OVERHEAD * self._settings.max_clips
        before = -1
        async for chunk in self._plain(request, places, deadline, limit):
            try:
                parser.write(chunk)
            except MultipartParseError as error:
                raise ProblemError("malformed", f"the multipart body is malformed: {error}") from None
            if not parts.files:
                before += len(chunk)
                if before > OVERHEAD:
                    raise ProblemError("malformed", f"no multipart part begins within {OVERHEAD} bytes")
        if not parts.ended:
            raise ProblemError("malformed", "the multipart body ends before its last boundary")
        if not parts.files:
            raise ProblemError("malformed", "the multipart body holds no part; send each file as a part named file")
        places.take_files(len(parts.files))
        for index, file in enumerate(parts.files):
            if not file:
                raise ProblemError("undecodable", "the part is empty; send the bytes of a file", clip=index)
        return parts.files


class _Parts:
    """Collects the parts of a multipart body. Every part is a file, and has to be called so."""

    def __init__(self, max_clips: int) -> None:
        self.files: list[bytearray] = []
        self.ended = False
        self._max_clips = max_clips
        self._field = b""
        self._value = b""
        self._name: bytes | None

    def callbacks(self) -> Any:
        """What the parser calls."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._on_field,
            "on_header_value": self._on_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.files) >= self._max_clips:
            raise ProblemError("too-large", f"more than max_clips = {self._max_clips} files; send several requests")
        self.files.append(bytearray())
        self._name = None

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            plain = PLAIN_NAME.match(self._value)  # as almost all write it; the library's own takes 15 times as long
            self._name = plain[1] if plain else parse_options_header(self._value)[1].get(b"name")
        self._field = self._value = b""

    def _headers_finished(self) -> None:
        if self._name not in (b"file", b"files"):
            shown = (self._name or b"").decode("ascii", "replace")[:40]
            raise ProblemError(
                "wrong-parameter",
                f"part {len(self.files) - 1} is called {shown!r}, expected file; parameters go into the query string",
            )

    def _data(self, data: bytes, start: int, end: int) -> None:
        self.files[-1] += memoryview(data)[start:end]

    def _end(self) -> None:
        self.ended = True


def _too_large(limit: int) -> ProblemError:
    return ProblemError("too-large", f"the body is larger than {limit} bytes; send a smaller file, or several requests")
