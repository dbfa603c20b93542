"""Where the recordings in an mp3 or flac begin and end: decoders stop where the first header says the sound ends.

Two files joined by ``cat`` are two recordings, and a header may claim too little. Nothing is decoded here: a few frame
headers are read, whatever the length. Layouts: ISO 11172-3 and 13818-3 (mp3), the Xing, Info and VBRI headers as
LAME and Fraunhofer write them, RFC 9639 (flac).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

SEARCHED = 1 << 16
"""Bytes searched for a first frame behind zeros, tags or the end of a recording."""
_KBITS = {
    (1, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
"""By the header's two bits of version: MPEG 1, 2, 2.5."""
_FLAC_START = (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22")
_FLAC_FRAME_SEARCHED = 1 << 20


@dataclass(frozen=True)
class Mp3Frame:
    """length in bytes; kind: what all frames of a recording share; side: bytes from its start to a Xing header."""

    length: int
    kind: tuple[int, int, int]
    side: int


def mp3_frame(data: bytes, at: int) -> Mp3Frame | None:
    """The frame that a header at `at` announces; none where there is no valid one, or one of free format."""
    head = data[at : at + 4]
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    rate_index, kbits_index = head[2] >> 2 & 3, head[2] >> 4
    if version == 1 or layer == 4 or rate_index == 3 or kbits_index in (0, 15):
        return None
    rate, first = _RATES[version][rate_index], version == 3
    kbits, padding = _KBITS[1 if first else 2, layer][kbits_index], head[2] >> 1 & 1
    if layer == 1:
        length = (12_000 * kbits // rate + padding) * 4
    else:
        length = (144_000 if first or layer == 2 else 72_000) * kbits // rate + padding
    mono = head[3] >> 6 == 3
    side = 4 + ((17 if mono else 32) if first else (9 if mono else 17))
    return Mp3Frame(length, (version, layer, rate_index), side)


def first_mp3_frame(data: bytes, start: int = 0) -> int | None:
    """Where the first frame begins: behind tags, zeros and the rest of a frame that was cut; none if there is no mp3.

    A header counts if the frames behind it have headers of the same kind: two of them, or as many as there is room for
    (at least one).
    """
    at = _behind_zeros(data, _behind_tags(data, start))
    end = min(len(data), at + SEARCHED)
    while (at := data.find(b"\xff", at, end)) >= 0:
        if _followed(data, at):
            return at
        at += 1
    return None


def _followed(data: bytes, at: int) -> bool:
    kind, seen = None, 0
    while seen < 3 and (at + 4 <= len(data) or not seen):
        frame = mp3_frame(data, at)
        if frame is None or frame.kind != (kind or frame.kind):
            return False
        kind, seen, at = frame.kind, seen + 1, at + frame.length
    return seen > 1 or at == len(data)


def _behind_tags(data: bytes, at: int) -> int:
    while True:
        if data[at : at + 3] == b"ID3" and len(data) >= at + 10:
            size = data[at + 6 : at + 10]
            at += 10 + sum((byte & 127) << 7 * (3 - place) for place, byte in enumerate(size))
        elif data[at : at + 3] == b"TAG" and (
            at + 128 == len(data) or data[at + 128 : at + 129] in (b"\xff", b"I", b"A")
        ):
            at += 128
        elif data[at : at + 8] == b"APETAGEX" and len(data) >= at + 24:
            header = data[at + 23] & 0x20  # its size counts items and footer
            at += (32 if header else 0) + (int.from_bytes(data[at + 12 : at + 16], "little") if header else 32)
        else:
            return min(at, len(data))


def _behind_zeros(data: bytes, at: int) -> int:
    while data[at : at + 1] == b"\0":
        block = data[at : at + SEARCHED]
        at += len(block) - len(block.lstrip(b"\0"))
    return at


def mp3_parts(data: bytes) -> list[bytes]:
    """The recordings, one after another, each from its first frame on; the file as it is where none is found."""
    at = first_mp3_frame(data)
    if at is None:
        return [data]
    parts: list[bytes] = []
    while True:
        stated, behind = _stated_end(data, at)
        if stated is None or stated >= len(data):
            return [*parts, data[at:]]
        following = first_mp3_frame(data, stated)
        if following is None:  # tags and the like
            return [*parts, data[at:]]
        if mp3_frame(data, stated) is None and _info(data, following) is None:
            return [*parts, data[behind:]]  # the frames go on: the header claims too little, so do without it
        parts.append(data[at:stated])
        at = following


def _stated_end(data: bytes, at: int) -> tuple[int | None, int]:
    """Where the recording that begins at `at` ends by its header, and where its first frame of sound begins."""
    frame, info = mp3_frame(data, at), _info(data, at)
    if frame is None or info is None:
        return None, at
    size = 0
    if data[info : info + 4] == b"VBRI":
        size = int.from_bytes(data[info + 10 : info + 14], "big")
    elif data[info + 7 : info + 8] and data[info + 7] & 2:
        place = info + 8 + (4 if data[info + 7] & 1 else 0)
        size = int.from_bytes(data[place : place + 4], "big")
    return (at + size if size > frame.length else None), at + frame.length


def _info(data: bytes, at: int) -> int | None:
    """Where the Xing, Info or VBRI header of a first frame is."""
    frame = mp3_frame(data, at)
    if frame is not None:
        if data[at + frame.side : at + frame.side + 4] in (b"Xing", b"Info"):
            return at + frame.side
        if data[at + 36 : at + 40] == b"VBRI":
            return at + 36
    return None


def flac_parts(data: bytes) -> list[bytes]:
    """The recordings of joined flac files; one whose header claims fewer samples than it has says 0 (not known)."""
    starts, at = [], -1
    while (at := data.find(b"fLaC", at + 1)) >= 0:
        if data.startswith(_FLAC_START, at):
            starts.append(at)
    edges = [0, *starts[1:], len(data)]  # the first may stand behind a tag
    return [_honest_flac(data[start:end]) for start, end in pairwise(edges)]


def _honest_flac(data: bytes) -> bytes:
    start = data.find(b"fLaC", 0, 1 << 20)
    field = data[start + 18 : start + 26]
    stated = int.from_bytes(field, "big") & (1 << 36) - 1
    if start < 0 or len(field) < 8 or not stated or (last := _last_flac_sample(data, start)) <= stated:
        return data
    blocksizes = (
        int.from_bytes(data[start + 8 : start + 10], "big"),
        int.from_bytes(data[start + 10 : start + 12], "big"),
    )
    if blocksizes[0] > blocksizes[1] or last > 1 << 36:
        return data
    honest = bytearray(data)
    honest[start + 18 : start + 26] = (int.from_bytes(field, "big") >> 36 << 36).to_bytes(8, "big")
    return bytes(honest)


def _last_flac_sample(data: bytes, start: int) -> int:
    """Samples up to the end of the last frame, by the number in its header; 0 where none is found."""
    blocksize = int.from_bytes(data[start + 8 : start + 10], "big")
    at = len(data)
    while (at := data.rfind(b"\xff", max(start, len(data) - _FLAC_FRAME_SEARCHED), at)) >= 0:
        if data[at + 1 : at + 2] in (b"\xf8", b"\xf9") and (end := _end_of_flac_frame(data, at, blocksize)):
            return end
    return 0


def _end_of_flac_frame(data: bytes, at: int, blocksize: int) -> int:
    """First sample behind the frame whose header begins at `at`; 0 if it is no header (RFC 9639, section 9.1)."""
    head = data[at : at + 16]
    if len(head) < 16 or head[3] & 1 or head[2] >> 4 == 0 or head[2] & 15 == 15:
        return 0
    extra = 0
    while extra < 7 and head[4] << extra & 0x80:
        extra += 1
    length = max(extra, 1)
    number = head[4] & (0xFF >> extra + 1 if extra else 0x7F)
    for byte in head[5 : 4 + length]:
        number = number << 6 | byte & 0x3F
    at, code = 4 + length, head[2] >> 4
    if code in (6, 7):
        size = int.from_bytes(head[at : at + code - 5], "big") + 1
        at += code - 5
    else:
        size = 192 if code == 1 else 576 << code - 2 if code < 6 else 256 << code - 8
    at += {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
    if at >= len(head) or _crc8(head[:at]) != head[at]:
        return 0
    return (number if head[1] & 1 else number * blocksize) + size


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 0x07 if crc & 0x80 else crc << 1) & 0xFF
    return crc
