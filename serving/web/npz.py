"""NPZ files from strangers, without pickles and without bombs: sizes are checked before anything is unfolded."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.web.problems import ProblemError

MAX_DIRECTORY = 64 * 1024
_END = struct.Struct("<4s4H2LH")


def read_npz(data: bytes | bytearray, *, max_arrays: int, max_numbers: int) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an NPZ file, by name without `.npy`.

    Raises:
        ProblemError: no NPZ, damaged, more arrays or numbers than allowed, anything but plain numbers inside.
    """
    _check_directory(data)
    arrays: dict[str, npt.NDArray[Any]] = {}
    room = max_numbers * 8
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if len(members) > max_arrays:
                raise ProblemError("too-large", f"the NPZ holds {len(members)} arrays, at most {max_arrays} are taken")
            for member in members:
                if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise _malformed("a member is encrypted or compressed in a strange way")
                room -= member.file_size
                if room + 1024 * max_arrays < 0:
                    raise ProblemError("too-large", f"the NPZ unfolds to more than {max_numbers} numbers")
                with archive.open(member) as file:
                    content = file.read(member.file_size)
                arrays[member.filename.removesuffix(".npy")] = _array(content)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise _malformed(str(error)[:200] or "a member ends too early") from None
    return arrays


def write_npz(arrays: Mapping[str, Any]) -> bytes:
    """An NPZ file, not compressed."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def _check_directory(data: bytes | bytearray) -> None:
    """zipfile reads the whole directory, whatever its length: look at what the end record says first."""
    at = data.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(data):
        raise _malformed("there is no zip directory at its end")
    *_, size, _, _ = _END.unpack_from(data, at)
    if size > MAX_DIRECTORY or data[max(0, at - 20) : max(0, at - 16)] == b"PK\x06\x07":
        raise ProblemError("too-large", f"the NPZ's directory is longer than {MAX_DIRECTORY} bytes")


def _array(content: bytes) -> npt.NDArray[Any]:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(file)
    except Exception as error:  # numpy evaluates what stands there: TypeError, IndexError, TokenError, MemoryError, ...
        told = repr(error)[:200]  # not its text: MemoryError has none
        raise _malformed(f"the header of an array cannot be read: {told}") from None
    if dtype.kind not in "iu":
        raise ProblemError("wrong-parameter", f"an array holds {dtype}, expected integers")
    room = len(content) - file.tell()
    size = dtype.itemsize
    for side in shape:
        if side < 0:
            raise _malformed("a side below 0")
        size *= side
    if size != room:
        raise _malformed(f"an array of shape {list(shape)} has {room} bytes")
    flat = np.frombuffer(content, dtype, offset=file.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def _malformed(why: str) -> ProblemError:
    return ProblemError("malformed", f"the body is no NPZ that can be read: {why}")
