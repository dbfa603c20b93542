"""Answers as JSON, NPZ or an Arrow stream, as the client's Accept says."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from starlette.responses import Response

from serving.engine.turns import aside
from serving.engine.work import SMALL
from serving.web.admission import Places
from serving.web.npz import write_npz
from serving.web.problems import ProblemError

JSON = "application/json"
NPZ = "application/x-npz"
ARROW = "application/vnd.apache.arrow.stream"
NDJSON = "application/x-ndjson"

PIECE = 5_000
"""Numbers that are written in one go: half a millisecond, in which no other thread has its turn."""
BYTES = {JSON: 10, NPZ: 4, ARROW: 4}
"""About as many bytes a number takes."""
MAX_JSON_FLOATS = 2_000_000

Clip = dict[str, Any]
"""A clip's answer: plain values and numpy arrays."""


def negotiate(accept: str | None, offered: Sequence[str]) -> str:
    """The media type to answer with: the accepted one of the highest q, the first offered where several are equal.

    Raises:
        ProblemError: none is accepted (406).
    """
    best, best_rank = "", 0.0
    for part in (accept or "*/*").split(",")[:32]:
        kind, *options = (word.strip().lower() for word in part.split(";"))
        rank = 1.0
        for option in options:
            if option.startswith("q="):
                try:
                    rank = float(option[2:])
                except ValueError:
                    rank = 0.0
        for candidate in offered:
            whole = candidate.partition("/")[0] + "/*"
            if kind in (candidate, whole, "*/*") and rank > best_rank:
                best, best_rank = candidate, rank
                break
    if not best:
        raise ProblemError("not-acceptable", f"Accept names none of {', '.join(offered)}")
    return best


async def answer(
    build: Callable[[], list[Clip]], numbers: int, kind: str, headers: dict[str, str], places: Places
) -> Response:
    """The response for the clips that `build` makes, of plain values and numpy arrays.

    numbers: about how many they hold. Large answers are made in a thread, and count against `max_queue_bytes` until
    they are sent.

    Raises:
        ProblemError: too many floats for JSON; no room (429).
    """
    places.give_back_files()
    places.take_bytes(numbers * BYTES[kind])
    make = partial(_body, build, kind)
    small = numbers < SMALL and kind != ARROW  # whose library takes long to import
    body = make() if small else await aside(make)
    return Response(body, headers={**headers, "Cache-Control": "no-store"}, media_type=kind)


def _body(build: Callable[[], list[Clip]], kind: str) -> bytes | memoryview:
    clips = build()
    arrays = [value for clip in clips for value in clip.values() if isinstance(value, np.ndarray)]
    floats = sum(array.size for array in arrays if array.dtype.kind == "f")
    if kind == JSON and floats > MAX_JSON_FLOATS:
        raise ProblemError("too-large", f"{floats} numbers are too many for JSON; send Accept: {NPZ}")
    write: dict[str, Callable[[list[Clip]], bytes | memoryview]] = {JSON: _json, NPZ: _npz, ARROW: _arrow}
    return write[kind](clips)


def json_clip(clip: Clip) -> bytes:
    """One clip as JSON. Float32 is written with the shortest digits that read back as the same float32."""
    out = bytearray()
    _write_clip(clip, out)
    return bytes(out)


def _write_clip(clip: Clip, out: bytearray) -> None:
    for number, (name, value) in enumerate(clip.items()):
        out += b'%s"%s":' % (b"," if number else b"{", name.encode())
        _write(value, out)
    out += b"}"


def _write(value: Any, out: bytearray) -> None:
    """In pieces, between which other threads have their turn: nothing large is ever copied in one go."""
    if not isinstance(value, np.ndarray):
        out += orjson.dumps(value)
        return
    out += b"["
    if value.ndim > 1:
        for number, row in enumerate(value):
            out += b"," if number else b""
            _write(row, out)
    else:
        row = np.ascontiguousarray(value)
        for start in range(0, len(row), PIECE):
            out += b"," if start else b""
            out += orjson.dumps(row[start : start + PIECE], option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
    out += b"]"


def _json(clips: list[Clip]) -> memoryview:
    out = bytearray(b'{"clips":[')
    for number, clip in enumerate(clips):
        out += b"," if number else b""
        _write_clip(clip, out)
    out += b"]}"
    return memoryview(out)


def _npz(clips: list[Clip]) -> bytes:
    arrays: dict[str, npt.NDArray[Any]] = {}
    plain = []
    for index, clip in enumerate(clips):
        arrays |= {f"{name}_{index}": value for name, value in clip.items() if isinstance(value, np.ndarray)}
        plain.append({name: value for name, value in clip.items() if not isinstance(value, np.ndarray)})
    return write_npz({"clips": np.array(json.dumps(plain)), **arrays})


def _arrow(clips: list[Clip]) -> bytes:
    import pyarrow as pa  # half a second that only this format needs

    rows: list[dict[str, Any]] = []
    for clip in clips:
        row = {}
        for name, value in clip.items():
            if isinstance(value, np.ndarray):
                row[name] = list(value) if value.ndim == 2 else value
            else:
                row[name] = list(value.items()) if name == "grid" else value
        rows.append(row)
    fields = []
    for name, value in clips[0].items():
        fields.append(pa.field(name, _arrow_type(pa, name, value)))
    table = pa.Table.from_pylist(rows, schema=pa.schema(fields))
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _arrow_type(pa: Any, name: str, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        kind = pa.from_numpy_dtype(value.dtype)
        return pa.list_(pa.list_(kind)) if value.ndim == 2 else pa.list_(kind)
    if name == "grid":
        return pa.map_(pa.string(), pa.int32())
    if name == "duration_s":
        return pa.float64()
    return {str: pa.string(), int: pa.int32()}[type(value)]
