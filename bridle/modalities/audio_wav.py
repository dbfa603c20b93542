"""WAV headers that a decoder takes at their word although they say nothing: put right before it sees them.

A recorder that was stopped leaves sizes of 0 (libsndfile then finds no sound); BW64 (EBU, ITU-R BS.2088) is RF64 under
another name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

_UNKNOWN = 0xFFFFFFFF


@dataclass(frozen=True)
class Chunk:
    """name; start of its content; its size as stated (bytes)."""

    name: bytes
    start: int
    size: int


def mended_wav(data: bytes) -> bytes:
    """The same file with a data chunk of size 0 stretched over what follows it, and BW64 called RF64."""
    little = data[:4] != b"RIFX"
    found = {chunk.name: chunk for chunk in _chunks(data, 12, little)}
    sound, sizes = found.get(b"data"), found.get(b"ds64")
    if sound is None:
        return data
    stated = sound.size
    if stated == _UNKNOWN and sizes is not None:
        stated = int.from_bytes(data[sizes.start + 8 : sizes.start + 16], "little")
    if stated or sound.start >= len(data) or _whole(data, sound.start, little):
        return b"RF64" + data[4:] if data[:4] == b"BW64" else data
    mended = bytearray(data)
    mended[:4] = b"RIFF" if little else b"RIFX"
    order: Literal["little", "big"] = "little" if little else "big"
    mended[4:8] = (len(data) - 8).to_bytes(4, order)
    mended[sound.start - 4 : sound.start] = (len(data) - sound.start).to_bytes(4, order)
    if sizes is not None:
        mended[sizes.start - 8 : sizes.start - 4] = b"JUNK"
    return bytes(mended)


def _chunks(data: bytes, at: int, little: bool) -> Iterator[Chunk]:
    """Chunks up to the one that holds the sound, behind which nothing is needed."""
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little" if little else "big")
        yield Chunk(data[at : at + 4], at + 8, size)
        if data[at : at + 4] == b"data":
            return
        at += 8 + size + size % 2


def _whole(data: bytes, at: int, little: bool) -> bool:
    """Whether what begins at `at` is a row of named chunks up to the very end: then the data chunk is truly empty."""
    for chunk in _chunks(data, at, little):
        at = chunk.start + chunk.size + chunk.size % 2
        if not all(32 <= byte < 127 for byte in chunk.name):
            return False
    return at in (len(data), len(data) + 1)
