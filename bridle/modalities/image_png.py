"""PNG without what a picture does not need: Pillow refuses megabytes of text or of colour profile, and any bad checksum
in them, although the pixels are good (W3C PNG, third edition, section 11)."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from bridle.modalities.clip import TooLargeError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_KEPT = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf"}
"""Chunks that say what the pixels are; the last gives the orientation. Unknown critical ones are kept, and refused."""


MANY_CHUNKS, SMALL_CHUNK = 10_000, 256
"""A picture may have many chunks, or small ones of so many bytes on average, but not both: each costs microseconds."""


def pixels_only(data: bytes) -> bytes:
    """The same picture without text, profiles, times and animation; as it is where it has none, or is cut.

    Raises:
        TooLargeError: chunks without end that hold next to nothing.
    """
    chunks = []
    for chunk in _chunks(data):
        chunks.append(chunk)
        if len(chunks) > MANY_CHUNKS and chunk[1] < SMALL_CHUNK * len(chunks):
            raise TooLargeError(
                f"image: a PNG of more than {MANY_CHUNKS:,} chunks of fewer than {SMALL_CHUNK} bytes; save it anew"
            )
    dropped = [(start, end) for start, end, name in chunks if not _needed(data, start, end, name)]
    if not dropped or chunks[-1][2] != b"IEND":
        return data
    kept, at = [], 0
    for start, end in dropped:
        kept.append(data[at:start])
        at = end
    return b"".join([*kept, data[at:]])


def _chunks(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Begin, end and name of each whole chunk."""
    at = len(SIGNATURE)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            return
        yield at, end, data[at + 4 : at + 8]
        at = end


def _needed(data: bytes, start: int, end: int, name: bytes) -> bool:
    if name == b"eXIf":  # a damaged one leaves a good picture good
        return zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
    return name in _KEPT or not name[:1].islower()
