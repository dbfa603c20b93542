"""What a film's file is, by its first bytes, and the checks that need no parser."""

from __future__ import annotations

from bridle.modalities.clip import Limits, TooLargeError, UndecodableError, WrongKindError


def sniff(head: bytes) -> str | None:
    """FFmpeg's name for the container family, by its first bytes; None for anything else."""
    if head[4:8] == b"ftyp":
        # Sound only, and still pictures in the same container, say so in their brand.
        return None if head[8:12] in {b"M4A ", b"M4B ", b"heic", b"heix", b"mif1", b"avif", b"avis"} else "mov"
    if head[4:8] in {b"moov", b"mdat", b"wide", b"free", b"skip"}:
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    return "avi" if head[:4] == b"RIFF" and head[8:12] == b"AVI " else None


def container_of(data: bytes, limits: Limits) -> str:
    """The container's name, after the checks that need no parser.

    Raises:
        UndecodableError, WrongKindError, TooLargeError
    """
    if not data:
        raise UndecodableError("video: the file is empty (0 bytes); expected mp4, mov, webm, mkv or avi")
    check("max_bytes", len(data), limits.max_bytes, "bytes")
    container = sniff(data[:4096])
    if container is None:
        text = data[:64].lstrip(b"\xef\xbb\xbf \r\n\t").startswith((b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"v=0"))
        hint = " (a playlist, which points to other files, is never followed)" if text else ""
        raise WrongKindError(
            f"video: found a file that begins {data[:12]!r}{hint}; expected mp4, mov, webm, mkv or avi with pictures"
        )
    return container


def check(limit: str, found: float, allowed: float, unit: str) -> None:
    """Raises TooLargeError, naming the limit, when `found` is above it."""
    if found > allowed:
        raise TooLargeError(
            f"video: {found:,.10g} {unit} are above the limit {limit} = {allowed:,.10g}; cut or shrink it"
        )
