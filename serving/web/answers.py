"""Answers as JSON, NPZ or an Arrow stream, as the client's Accept says; large ones are made while they are read."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from serving.engine.errors import EngineError
from serving.engine.turns import aside, in_turn
from serving.engine.work import SMALL
from serving.web.admission import Places
from serving.web.formats import Buffer, Clip, arrow_body, floats, json_body, json_parts, members, npz_length, npz_parts
from serving.web.npz import write_npz
from serving.web.problems import ProblemError, log_fault, problem_of

JSON = "application/json"
NPZ = "application/x-npz"
ARROW = "application/vnd.apache.arrow.stream"
NDJSON = "application/x-ndjson"

AT_ONCE = 32 * 1024
"""Bytes at least that are handed to a client together."""
BYTES = {JSON: 10, NPZ: 4, ARROW: 4}
"""About as many bytes a number takes."""
MAX_JSON_FLOATS = 2_000_000


def negotiate(accept: str | None, offered: Sequence[str]) -> str:
    """The media type to answer with: the accepted one of the highest q, the first offered where several are equal.

    Raises:
        ProblemError: none is accepted (406).
    """
    ranges = [_range(part) for part in (accept or "*/*").split(",")[:32]]
    refused = {kind for kind, rank in ranges if not rank > 0}
    best, best_rank = "", 0.0
    for kind, rank in ranges:
        for candidate in offered:
            whole = candidate.partition("/")[0] + "/*"
            if kind in (candidate, whole, "*/*") and rank > best_rank and candidate not in refused:
                best, best_rank = candidate, rank
                break
    if not best:
        raise ProblemError("not-acceptable", f"Accept names none of {', '.join(offered)}")
    return best


def _range(part: str) -> tuple[str, float]:
    """A media range of Accept and its q."""
    kind, *options = (word.strip().lower() for word in part.split(";"))
    rank = 1.0
    for option in options:
        if option.startswith("q="):
            try:
                rank = float(option[2:])
            except ValueError:
                rank = 0.0
    return kind, rank


async def answer(
    request: Request,
    build: Callable[[], list[Clip]],
    numbers: int,
    kind: str,
    headers: dict[str, str],
    places: Places,
    held: int = 0,
) -> Response:
    """The response for the clips that `build` makes, of plain values and numpy arrays.

    numbers: about how many they hold. What is large is built in a thread and counts against `max_queue_bytes` until it
    is sent; held: bytes of it that do already.

    Raises:
        ProblemError: too many floats for JSON; no room (429).
    """
    places.give_back_files()
    places.take_bytes(max(0, numbers * BYTES[kind] - held))
    if kind == ARROW:  # whose library takes long to import
        body = await aside(lambda: arrow_body(build()))
    elif numbers >= SMALL:
        return await streamed(request, await aside(build), kind, headers, nullcontext())
    else:
        clips = build()
        body = json_body(clips) if kind == JSON else write_npz(members(clips))
    return Response(body, headers={**headers, "Cache-Control": "no-store"}, media_type=kind)


async def streamed(
    request: Request,
    clips: list[Clip],
    kind: str,
    headers: dict[str, str],
    while_made: AbstractContextManager[object],
) -> Response:
    """The response for clips, JSON or NPZ, each piece of which is made when the client has taken those before. Returns
    when the first is there.

    while_made: is entered before, and left when the answer is sent or nobody wants it any more.

    Raises:
        ProblemError: too many floats for JSON. EngineError: of arrays for later.
    """
    headers = {**headers, "Cache-Control": "no-store"}
    if kind == JSON:
        if (count := floats(clips)) > MAX_JSON_FLOATS:
            raise ProblemError("too-large", f"{count} numbers are too many for JSON; send Accept: {NPZ}")
        parts = json_parts(clips)
    else:
        arrays = await aside(lambda: members(clips))
        headers["Content-Length"] = str(await aside(lambda: npz_length(arrays)))
        parts = npz_parts(arrays)
    pieces = _pieces(parts, while_made)
    try:
        first = await anext(pieces)
        if kind == JSON and request.scope["http_version"] == "1.0":  # knows no chunks, and needs the length
            return Response(first + b"".join([piece async for piece in pieces]), headers=headers, media_type=kind)
    except BaseException:
        await pieces.aclose()
        raise
    return Begun(first, pieces, request.state.request_id, headers, kind)


async def _pieces(
    parts: AsyncGenerator[Buffer, None], while_made: AbstractContextManager[object]
) -> AsyncGenerator[bytes, None]:
    """Small parts together, one piece a turn."""
    held: list[Buffer] = []
    size = 0
    with while_made:
        async with aclosing(parts):
            await in_turn()
            async for part in parts:
                held.append(part)
                size += len(part)
                if size >= AT_ONCE:
                    yield b"".join(held)
                    held.clear()
                    size = 0
                    await in_turn()
            yield b"".join(held)


class Begun(StreamingResponse):
    """An answer of which the first piece is there. An error in a later one breaks it off: the client lacks the last
    chunk, or bytes of the length it was told."""

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes, None],
        request_id: str,
        headers: dict[str, str],
        media_type: str,
    ) -> None:
        super().__init__(rest, headers=headers, media_type=media_type)
        self._first = first
        self._rest = rest
        self._request_id = request_id

    def last_words(self, problem: ProblemError) -> bytes:
        """What is sent of an error in a later piece."""
        raise problem

    async def stream_response(self, send: Send) -> None:
        """Sends the pieces; whatever happens, the work behind them ends with the answer."""
        async with aclosing(self._rest):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            try:
                async for piece in self._rest:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except EngineError as error:
                log_fault(error, self._request_id)
                last = self.last_words(problem_of(error))
                await send({"type": "http.response.body", "body": last, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
