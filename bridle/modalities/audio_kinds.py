"""What a sound file is, by its first bytes, and what a refused one seems to be."""

from __future__ import annotations

from dataclasses import dataclass

from bridle.modalities.audio_parts import first_mp3_frame

MAX_CHANNELS = 64
PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
TAKES = "expected sound: wav, flac, mp3, ogg, opus, m4a, aac, aiff, caf, webm, mka, or a film with a sound track"
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_OTHERS = (
    (b".snd", "a Sun AU file; convert it to wav or flac"),
    (b"riff.\x91\xcf\x11", "a Wave64 file; convert it to wav or flac"),
    (b"MThd", "a MIDI file, which holds notes and no sound"),
    (b"\x30\x26\xb2\x75", "a Windows Media file (ASF); convert it to flac, mp3, opus or aac"),
    (b"#!AMR", "an AMR file; convert it to flac, mp3, opus or aac"),
    (b"wvpk", "a WavPack file; convert it to flac"),
    (b"MAC ", "a Monkey's Audio file; convert it to flac"),
    (b"DSD ", "a DSD file; convert it to flac"),
    (b"\x00\x00\x01\xba", "an MPEG program stream; convert it: ffmpeg -i IN -c copy OUT.mkv"),
)
"""Kinds that are refused by name."""


@dataclass(frozen=True)
class Kind:
    """A kind of file that can hold sound."""

    name: str
    demuxer: str
    """FFmpeg's name of it."""
    libsndfile: bool = False
    states_length: bool = True
    """Whether the length in its header is a statement rather than an estimate."""
    seekable: bool = False
    """Whether libsndfile reaches any sample of it exactly and cheaply."""


WAV = Kind("wav", "wav", libsndfile=True, seekable=True)
FLAC = Kind("flac", "flac", libsndfile=True, seekable=True)
MP3 = Kind("mp3", "mp3", libsndfile=True)
AIFF = Kind("aiff", "aiff", libsndfile=True, seekable=True)
CAF = Kind("caf", "caf", libsndfile=True, seekable=True)
AAC = Kind("aac", "aac", states_length=False)
OGG = Kind("ogg", "ogg")
MP4 = Kind("mp4", "mov")
MATROSKA = Kind("matroska or webm", "matroska")
AVI = Kind("avi", "avi")


def kind_of(head: bytes) -> Kind | None:
    """What a file is, from its beginning (4 KiB are enough unless a longer ID3 tag comes first); none: no sound.

    An mp3 may begin with tags, zeros or the rest of a frame.
    """
    if head[:3] == b"ID3" and len(head) >= 10:
        size = (head[6] & 127) << 21 | (head[7] & 127) << 14 | (head[8] & 127) << 7 | head[9] & 127
        return _without_tag(head[10 + size : 10 + size + 16]) or MP3
    if head[:4] in (b"RIFF", b"RF64", b"RIFX", b"BW64"):
        return {b"WAVE": WAV, b"AVI ": AVI}.get(head[8:12])
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return AIFF
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free"):
        return None if head[8:12] in PICTURE_BRANDS else MP4
    for magic, kind in ((b"\x1a\x45\xdf\xa3", MATROSKA), (b"OggS", OGG), (b"caff", CAF)):
        if head.startswith(magic):
            return kind
    if (found := _without_tag(head)) is not None or head.startswith(_PICTURES):
        return found
    return MP3 if first_mp3_frame(head) is not None else None


def _without_tag(head: bytes) -> Kind | None:
    if head[:4] == b"fLaC":
        return FLAC
    if len(head) >= 4 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        layer, version = head[1] >> 1 & 3, head[1] >> 3 & 3
        if layer == 0 and head[1] & 0xF0 == 0xF0:
            return AAC
        if layer and version != 1 and head[2] >> 4 != 15 and head[2] >> 2 & 3 != 3:
            return MP3
    return None


def describe(data: bytes) -> str:
    """What a refused file seems to be."""
    head = data[:512].lstrip()
    if head.startswith((b"#EXTM3U", b"ffconcat", b"v=0", b"[playlist]")) or b"<MPD" in head:
        return "a playlist, which points to other files"
    if head.startswith(_PICTURES) or head[8:12] in (b"WEBP", *PICTURE_BRANDS):
        return "a picture"
    if data[:1] == data[188:189] == data[376:377] == b"G":
        return "an MPEG transport stream; convert it: ffmpeg -i IN -c copy OUT.mkv"
    for magic, name in _OTHERS:
        if data.startswith(magic):
            return name
    if data and not data.strip(b"\0"):
        return f"a file of {len(data)} zeros"
    printable = all(byte >= 32 or byte in b"\t\r\n" for byte in head)
    return "text" if printable else f"an unknown kind of file (it begins with {data[:8].hex(' ')})"
