"""NPZ files made to break their reader: each is malformed, and none a fault of ours."""

from __future__ import annotations

import io
import random
import struct
import zipfile

import numpy as np
import pytest

from serving.web.npz import read_npz, write_npz
from serving.web.problems import ProblemError


def archive(content: bytes, kind: int = zipfile.ZIP_STORED, name: str = "codes_0.npy") -> bytearray:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as out:
        out.writestr(name, content)
    return bytearray(file.getvalue())


def with_header(text: str, version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes((version, 0)) + length + text.encode() + bytes(8)


def array(count: int) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.arange(count))
    return file.getvalue()


def refused(data: bytes | bytearray, told: str) -> str:
    with pytest.raises(ProblemError) as found:
        read_npz(bytes(data), max_arrays=4, max_numbers=1000)
    assert found.value.type == "malformed"
    assert told in found.value.detail
    return found.value.detail


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize(
    "header",
    [
        "{'descr': (",
        "'''",
        "  x\n y\n",
        "{1: 2, 'a': 3}",
        "{[]: 1}",
        "-" * 9000 + "1",
        "{'descr': ('<i8',), 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1,), 'more': 1}",
        "{'descr': '<i8', 'fortran_order': 1, 'shape': (1,)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': 1}",
        " " * 11_000,
    ],
)
def test_a_header_that_is_none_is_malformed(header: str, version: int) -> None:
    detail = refused(archive(with_header(header, version)), "the header of an array cannot be read: ")
    assert "Error(" in detail and len(detail) < 300


def test_little_is_told_of_a_long_header() -> None:
    detail = refused(archive(with_header(str(dict.fromkeys(range(500))))), "the header of an array cannot be read: ")
    assert len(detail.partition("cannot be read: ")[2]) == 200


def test_a_damaged_archive_is_malformed_wherever_the_damage_is() -> None:
    stored, packed = archive(array(6)), archive(array(500), zipfile.ZIP_DEFLATED)
    directory = stored.rfind(b"PK\x01\x02")
    data = stored.copy()
    data[directory - 1] ^= 1
    refused(data, "Bad CRC-32")
    long = archive(array(6), name="n" * 300)
    long[long.rfind(b"PK\x01\x02") - 1] ^= 1
    assert len(refused(long, "Bad CRC-32")) == len("the body is no NPZ that can be read: ") + 200
    data = packed.copy()
    data[41] = 0xFF  # behind the head of the member and its name
    refused(data, "decompressing data")
    data = stored.copy()
    data[directory + 8] = 0x20
    refused(data, "compressed patched data")
    data = stored.copy()
    struct.pack_into("<II", data, directory + 20, 1000, 1000)  # more than there is
    refused(data, "a member ends too early")
    refused(archive(b"no array"), "magic string")


def test_whatever_byte_is_wrong_it_is_no_fault_of_ours() -> None:
    rng = random.Random(0)
    good = write_npz({"codes_0": np.arange(6).reshape(2, 3), "codes_1": np.arange(4).reshape(4, 1)})
    for data in (bytearray(good), archive(array(9), zipfile.ZIP_DEFLATED)):
        for _ in range(300):
            damaged = data.copy()
            for _ in range(rng.choice((1, 1, 3))):
                damaged[rng.randrange(len(damaged))] = rng.choice((0, 1, 40, 255, rng.randrange(256)))
            try:
                found = read_npz(damaged, max_arrays=4, max_numbers=1000)
            except ProblemError as error:
                assert error.status < 500
            else:
                assert all(one.dtype.kind in "iu" for one in found.values())
