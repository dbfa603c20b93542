"""Clips as JSON, NPZ or an Arrow stream. JSON and NPZ come in parts, none of which takes a millisecond to make, so that
an answer need not exist before somebody reads it."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import orjson

PIECE = 5_000
"""Numbers that are written as JSON in one go: half a millisecond."""
PIECE_BYTES = 256 * 1024
"""Bytes of an array that go into an NPZ in one go."""
PIECE_TEXT = 100_000
"""Letters of a string."""
Buffer = bytes | memoryview
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Later:
    """A float32 array of this shape that is made while it is written; blocks: its rows, some at a time."""

    shape: tuple[int, ...]
    blocks: AsyncGenerator[Array, None]

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


Clip = dict[str, Any]
"""A clip's answer: plain values, numpy arrays, and arrays for later."""


def floats(clips: list[Clip]) -> int:
    """How many numbers are floats, which JSON writes slowly."""
    values = [value for clip in clips for value in clip.values()]
    plain = sum(value.size for value in values if isinstance(value, np.ndarray) and value.dtype.kind == "f")
    return plain + sum(value.size for value in values if isinstance(value, Later))


# JSON.


def json_clip(clip: Clip) -> bytes:
    """One clip as JSON. Float32 is written with the shortest digits that read back as the same float32."""
    return b"".join(part for part in _clip_parts(clip) if isinstance(part, bytes))


def json_body(clips: list[Clip]) -> bytes:
    """Clips without arrays for later, as one document."""
    return b'{"clips":[' + b",".join(json_clip(clip) for clip in clips) + b"]}"


async def json_parts(clips: list[Clip]) -> AsyncGenerator[Buffer, None]:
    """The same document in parts."""
    yield b'{"clips":['
    for number, clip in enumerate(clips):
        if number:
            yield b","
        for part in _clip_parts(clip):
            if isinstance(part, bytes):
                yield part
                continue
            begun = False
            async with aclosing(part.blocks) as blocks:
                async for block in blocks:
                    for piece in _numbers(block, begun):
                        yield piece
                    begun = True
    yield b"]}"


def _clip_parts(clip: Clip) -> Iterator[bytes | Later]:
    """The clip's text; an array for later stands where the inside of its brackets belongs."""
    for number, (name, value) in enumerate(clip.items()):
        yield b'%s"%s":' % (b"," if number else b"{", name.encode())
        if isinstance(value, Later):
            yield b"["
            yield value
            yield b"]"
        elif isinstance(value, np.ndarray):
            yield b"["
            yield from _numbers(value)
            yield b"]"
        elif isinstance(value, str):
            yield b'"'
            for start in range(0, len(value), PIECE_TEXT):
                yield orjson.dumps(value[start : start + PIECE_TEXT])[1:-1]
            yield b'"'
        else:
            yield orjson.dumps(value)
    yield b"}"


def _numbers(array: Array, begun: bool = False) -> Iterator[bytes]:
    """What stands between an array's brackets. begun: something of it stands there already."""
    comma = b"," if begun else b""
    width = math.prod(array.shape[1:])
    if width > PIECE:
        for row in array:
            yield comma + b"["
            yield from _numbers(row)
            yield b"]"
            comma = b","
        return
    step = PIECE // max(1, width)
    for start in range(0, len(array), step):
        rows = np.ascontiguousarray(array[start : start + step])
        yield comma + orjson.dumps(rows, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
        comma = b","


# NPZ.


class _Sink:
    """What is written, until it is taken. It cannot be rewound: zipfile then tells sizes behind each member."""

    def __init__(self) -> None:
        self._parts: list[Buffer] = []

    def write(self, data: Buffer) -> int:
        self._parts.append(data)
        return len(data)

    def flush(self) -> None:
        pass

    def taken(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)


Members = dict[str, Array | Later]
"""The arrays of an NPZ, by name without `.npy`."""


def members(clips: list[Clip]) -> Members:
    """What an NPZ of these clips holds: each array by itself, and the rest as JSON."""
    arrays: Members = {}
    plain = []
    for index, clip in enumerate(clips):
        ours = {name: value for name, value in clip.items() if isinstance(value, np.ndarray | Later)}
        arrays |= {f"{name}_{index}": value for name, value in ours.items()}
        plain.append({name: value for name, value in clip.items() if name not in ours})
    return {"clips": np.array(json.dumps(plain)), **arrays}


async def npz_parts(arrays: Members) -> AsyncGenerator[Buffer, None]:
    """An NPZ file, not compressed, in parts."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w") as archive:  # type: ignore[call-overload]
        for name, value in arrays.items():
            with _member(archive, name, value) as file:
                async with aclosing(value.blocks if isinstance(value, Later) else _alone(value)) as blocks:
                    async for block in blocks:
                        content = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
                        for start in range(0, len(content), PIECE_BYTES):
                            file.write(content[start : start + PIECE_BYTES])
                            yield sink.taken()
    yield sink.taken()


async def _alone(array: Array) -> AsyncGenerator[Array, None]:
    yield array


def npz_length(arrays: Members) -> int:
    """Bytes of that file: those of one without any numbers, and the numbers'."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w") as archive:  # type: ignore[call-overload]
        for name, value in arrays.items():
            _member(archive, name, value).close()
    return len(sink.taken()) + sum(4 * a.size if isinstance(a, Later) else a.nbytes for a in arrays.values())


def _member(archive: zipfile.ZipFile, name: str, value: Array | Later) -> IO[bytes]:
    """A member that is open behind its array's header."""
    dtype = np.dtype(np.float32) if isinstance(value, Later) else value.dtype
    file = archive.open(zipfile.ZipInfo(f"{name}.npy"), "w")
    header = {"shape": value.shape, "fortran_order": False, "descr": np.lib.format.dtype_to_descr(dtype)}
    np.lib.format.write_array_header_1_0(file, header)
    return file


# Arrow.


def arrow_body(clips: list[Clip]) -> Buffer:
    """Clips without arrays for later as an Arrow stream, one row each. Numbers are copied by Arrow alone, without
    Python's lock."""
    import pyarrow as pa  # half a second that only this format needs

    columns = {name: _column(pa, name, [clip[name] for clip in clips]) for name in clips[0]}
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return memoryview(sink.getvalue())


def _column(pa: Any, name: str, values: list[Any]) -> Any:
    if isinstance(values[0], np.ndarray):
        return _lists(pa, values)
    if name == "grid":
        return pa.array([list(value.items()) for value in values], pa.map_(pa.string(), pa.int32()))
    kind = pa.float64() if name == "duration_s" else {str: pa.string(), int: pa.int32()}[type(values[0])]
    return pa.array(values, kind)


def _lists(pa: Any, arrays: list[Array]) -> Any:
    """One list a row, of lists where the arrays have two dimensions."""
    flat = [array.reshape(-1) for array in arrays]
    found = pa.array(flat[0] if len(flat) == 1 else np.concatenate(flat))
    if arrays[0].ndim == 2:
        widths = np.concatenate([np.full(len(array), array.shape[1]) for array in arrays])
        found = pa.ListArray.from_arrays(_offsets(pa, widths), found)
    return pa.ListArray.from_arrays(_offsets(pa, [len(array) for array in arrays]), found)


def _offsets(pa: Any, lengths: npt.ArrayLike) -> Any:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
