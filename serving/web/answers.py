"""Answers as JSON, NPZ or an Arrow stream, as the client's Accept says."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from starlette.responses import Response

from serving.web.npz import write_npz
from serving.web.problems import ProblemError

JSON = "application/json"
NPZ = "application/x-npz"
ARROW = "application/vnd.apache.arrow.stream"
NDJSON = "application/x-ndjson"

SMALL = 20_000
"""Numbers that are written without leaving the event loop."""
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


async def answer(clips: list[Clip], kind: str, headers: dict[str, str]) -> Response:
    """The response for clips, each of plain values and numpy arrays (of which the largest counts as its content).

    Raises:
        ProblemError: too many floats for JSON.
    """
    numbers = sum(value.size for clip in clips for value in clip.values() if isinstance(value, np.ndarray))
    floats = any(isinstance(v, np.ndarray) and v.dtype.kind == "f" for clip in clips for v in clip.values())
    if kind == JSON and floats and numbers > MAX_JSON_FLOATS:
        raise ProblemError("too-large", f"{numbers} numbers are too many for JSON; send Accept: {NPZ}")
    write = {JSON: _json, NPZ: _npz, ARROW: _arrow}[kind]
    body = write(clips) if numbers < SMALL else await asyncio.to_thread(write, clips)
    return Response(body, headers={**headers, "Cache-Control": "no-store"}, media_type=kind)


def json_clip(clip: Clip) -> bytes:
    """One clip as JSON. Rows are written one by one, so that other threads get their turn in a long one."""
    parts = []
    for name, value in clip.items():
        if isinstance(value, np.ndarray) and value.ndim == 2:
            text = "[" + ",".join(_dumps(row) for row in value) + "]"
        else:
            text = _dumps(value)
        parts.append(f'"{name}":{text}')
    return ("{" + ",".join(parts) + "}").encode()


def _dumps(value: Any) -> str:
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f":  # numpy prints the shortest digits that read back as the same float32
            return "[" + ",".join(map(str, value)) + "]"
        value = value.tolist()
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _json(clips: list[Clip]) -> bytes:
    return b'{"clips":[' + b",".join(json_clip(clip) for clip in clips) + b"]}"


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
