"""From a video file's bytes to cropped pictures: PyAV behind allow-lists and limits. Runs in a child as well as here.

Frames are counted in the order they are shown, whatever their timestamps; timestamps only say when a window starts and
how long it lasts. So a film of changing frame rate is cut by frames, not by seconds.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import av
import numpy as np

from bridle.modalities.clip import ClipError, Limits, TooLargeError, UndecodableError, WrongKindError
from bridle.modalities.video_crop import Cropper, Draws, Frame, Prepare, upright
from bridle.modalities.video_kinds import check, container_of
from bridle.settings import Settings

CODECS = ("h264", "hevc", "vp8", "vp9", "libdav1d", "av1", "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v3", "mjpeg")
"""Decoders that may run."""


class Request(Settings):
    """What is wanted of a video: one training clip where there are `draws`, else all its windows."""

    frames: int
    stride: int
    size: tuple[int, int]
    tubelet: int
    decoder: Literal["pyav", "decord"]
    limits: Limits
    draws: Draws | None = None


class OpenVideo(Protocol):
    """An opened video."""

    count: int
    """Frames, as far as the container tells without decoding."""

    def pick(self, indices: Sequence[int], prepare: Prepare) -> Iterator[Frame]:
        """Frames by rising number, with pixels; ends early where the video does."""
        ...

    def walk(self, stride: int, prepare: Prepare) -> Iterator[Frame]:
        """All frames in order, every `stride`-th with pixels."""
        ...


def answers(data: bytes, request: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """The clips a `Request` (as plain data) asks for.

    Yields:
        ``{"valid", "start_s", "duration_s"}`` and uint8 ``[3, T, H, W]``.

    Raises:
        UndecodableError, WrongKindError, TooLargeError
    """
    wanted = Request.model_validate(dict(request))
    with decoder_errors():
        source = _source(data, wanted)
        if wanted.draws is None:
            yield from _windows(source, wanted)
        else:
            yield _training_clip(source, wanted, wanted.draws)


@contextmanager
def decoder_errors() -> Iterator[None]:
    """Turns what FFmpeg and PyAV raise into a `ClipError`."""
    try:
        yield
    except ClipError:
        raise
    except MemoryError as error:
        raise TooLargeError(
            "video: decoding needs more memory than clip.decode_memory_mb lets it take; shrink it"
        ) from error
    except (av.error.FFmpegError, ValueError, LookupError, OverflowError, OSError, RuntimeError) as error:
        raise UndecodableError(f"video: corrupt or truncated ({type(error).__name__}: {error})") from error


class PyAVSource:
    """A video opened by FFmpeg's libraries: one thread, no other file, no network, known codecs only."""

    def __init__(self, data: bytes, limits: Limits) -> None:
        self.limits = limits
        self.container_name = container_of(data, limits)
        self.timed = self.container_name != "avi"  # which stores no timestamps: FFmpeg's guesses fail on B frames
        self._data = data
        container, stream = self._open()
        with container:
            self.codec = stream.codec_context.name
            self._check_header(container, stream)
            self.packets = list(self._demux(container, stream))
        self.count = sum(_shown(packet, self.codec) for packet in self.packets)
        if not self.count:
            raise UndecodableError("video: its picture stream holds no frame; the file is truncated or empty")

    def pick(self, indices: Sequence[int], prepare: Prepare) -> Iterator[Frame]:
        """See `OpenVideo`. Decodes from the key frame before the first, and skips what no wanted frame needs."""
        found = self._by_timestamp(indices, prepare)
        return iter(found) if found is not None else self._pick_in_order(indices, prepare)

    def walk(self, stride: int, prepare: Prepare) -> Iterator[Frame]:
        """See `OpenVideo`."""
        clock = _Clock(self.timed)
        container, stream = self._open()
        with container:
            held: tuple[int, float, np.ndarray | None] | None = None
            for index, frame in enumerate(self._decode(stream, self._demux(container, stream))):
                check("max_frames", index + 1, self.limits.max_frames, "frames")
                start = clock.start(index, frame, stream)
                check("max_seconds", start, self.limits.max_seconds, "seconds")
                if held is not None:
                    yield Frame(held[0], held[1], start, held[2])
                held = (index, start, prepare(frame) if index % stride == 0 else None)
            if held is None:
                raise UndecodableError("video: no frame could be decoded; the file is corrupt or truncated")
            yield Frame(held[0], held[1], held[1] + clock.last, held[2])

    def mirrored(self) -> bool:
        """Whether the display matrix mirrors the film, by its first frame."""
        container, stream = self._open()
        with container:
            first = next(self._decode(stream, iter(self.packets)), None)
            return first is not None and upright(first)[1]

    def _open(self) -> tuple[Any, Any]:
        """A fresh container and its picture stream, checked against the codec list and ready to decode."""
        container = av.open(
            io.BytesIO(self._data),
            format=self.container_name,
            buffer_size=1 << 18,
            io_open=_refuse_other_files,
            container_options={"codec_whitelist": ",".join(CODECS), "protocol_whitelist": ""},
        )
        try:
            if not container.streams:
                raise UndecodableError("video: the file holds no stream; it is corrupt or truncated")
            cover = av.stream.Disposition.attached_pic
            stream = next((s for s in container.streams.video if not s.disposition & cover), None)
            if stream is None:
                raise WrongKindError("video: the file has no picture stream; sound goes to the audio modality")
            context = stream.codec_context
            if context is None or context.name not in CODECS:
                name = context.name if context is not None else "unknown"
                raise WrongKindError(f"video: its codec is {name}; expected one of {', '.join(CODECS)}: re-encode it")
            context.thread_count = 1
            context.options = {"max_pixels": str(self.limits.max_pixels)}
        except BaseException:
            container.close()
            raise
        return container, stream

    def _check_header(self, container: Any, stream: Any) -> None:
        context = stream.codec_context
        check("max_pixels", context.width * context.height, self.limits.max_pixels, "pixels")
        check("max_frames", stream.frames, self.limits.max_frames, "frames")
        check("max_seconds", (container.duration or 0) / av.time_base, self.limits.max_seconds, "seconds")

    def _demux(self, container: Any, stream: Any) -> Iterator[Any]:
        for number, packet in enumerate(container.demux(stream)):
            check("max_frames", number, self.limits.max_frames, "frames")
            if packet.size:
                yield packet

    def _decode(self, stream: Any, packets: Iterator[Any]) -> Iterator[Any]:
        """Frames of the packets, in the order shown; each within the limits and whole."""
        context = stream.codec_context
        for packet in packets:
            yield from (self._sound(frame) for frame in context.decode(packet))
        yield from (self._sound(frame) for frame in context.decode(None))

    def _sound(self, frame: Any) -> Any:
        check("max_pixels", frame.width * frame.height, self.limits.max_pixels, "pixels")
        if frame.is_corrupt:
            raise UndecodableError("video: a frame is damaged; the file is corrupt or truncated")
        return frame

    def _by_timestamp(self, indices: Sequence[int], prepare: Prepare) -> list[Frame] | None:
        """The frames found by their timestamps; None where those are missing or do not match what the decoder shows."""
        shown = [packet.pts for packet in self.packets if _shown(packet, self.codec)]
        if not self.timed or None in shown or len(set(shown)) != len(shown):
            return None
        shown.sort()
        wanted = {shown[index]: index for index in indices if index < len(shown)}
        first, last = min(wanted), max(wanted)
        keys = [n for n, p in enumerate(self.packets) if p.is_keyframe and p.pts is not None and p.pts <= first]
        if not keys:
            return None
        container, stream = self._open()
        with container:
            found: dict[int, Frame] = {}
            context, base = stream.codec_context, float(stream.time_base)
            packets = self._skipping(self.packets[keys[-1] :], wanted, context)
            for frame in self._decode(stream, packets):
                if frame.pts in wanted:
                    start = (frame.pts - shown[0]) * base
                    found[frame.pts] = Frame(wanted[frame.pts], start, start + frame.duration * base, prepare(frame))
                if len(found) == len(wanted) or (frame.pts is not None and frame.pts > last):
                    break
        return [found[pts] for pts in sorted(found)] if len(found) == len(wanted) else None

    def _skipping(self, packets: list[Any], wanted: Mapping[int, int], context: Any) -> Iterator[Any]:
        """Tells the decoder, packet by packet, that an unwanted frame on which no other depends may be left out."""
        for packet in packets:
            if self.codec != "libdav1d":  # which takes this setting once, for the whole stream
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield packet

    def _pick_in_order(self, indices: Sequence[int], prepare: Prepare) -> Iterator[Frame]:
        """By counting from the beginning: for streams whose timestamps cannot be trusted."""
        wanted, clock = set(indices), _Clock(self.timed)
        container, stream = self._open()
        with container:
            for index, frame in enumerate(self._decode(stream, iter(self.packets))):
                start = clock.start(index, frame, stream)
                if index in wanted:
                    yield Frame(index, start, start + clock.last, prepare(frame))
                if index >= max(wanted):
                    return


class _Clock:
    """When frames start, in seconds from the first; a frame without a timestamp follows the one before it."""

    def __init__(self, timed: bool) -> None:
        self.timed = timed
        self.first: float | None = None
        self.now = 0.0
        self.last = 0.0
        """Duration of the latest frame."""

    def start(self, index: int, frame: Any, stream: Any) -> float:
        base = float(frame.time_base or stream.time_base or 0)
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        if frame.pts is None or not self.timed:
            self.now = self.now + self.last if index else 0.0
        else:
            self.first = frame.pts * base if self.first is None else self.first
            self.now = max(self.now, frame.pts * base - self.first)
        self.last = frame.duration * base if frame.duration and base else 1 / rate
        return self.now


def _source(data: bytes, wanted: Request) -> OpenVideo:
    source = PyAVSource(data, wanted.limits)
    if wanted.decoder == "pyav":
        return source
    from bridle.modalities.video_decord import DecordSource

    return DecordSource(data, source)


def _training_clip(source: OpenVideo, wanted: Request, draws: Draws) -> tuple[dict[str, Any], np.ndarray]:
    span = (wanted.frames - 1) * wanted.stride + 1
    first = int(draws.start * max(1, source.count - span + 1))
    indices = [first + k * wanted.stride for k in range(wanted.frames)]
    found = list(source.pick([index for index in indices if index < source.count], Cropper(wanted.size, draws)))
    if not found:
        raise UndecodableError(f"video: no frame from number {first} on, of {source.count} announced; it is truncated")
    return _answer([frame.pixels for frame in found], wanted, found[0].start_s, found[-1].end_s)


def _windows(source: OpenVideo, wanted: Request) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    length = wanted.frames * wanted.stride
    pixels: list[Any] = []
    start = end = 0.0
    for frame in source.walk(wanted.stride, Cropper(wanted.size)):
        if frame.index % length == 0 and pixels:
            yield _answer(pixels, wanted, start, frame.start_s)
            pixels = []
        if frame.pixels is not None:
            start = start if pixels else frame.start_s
            pixels.append(frame.pixels)
        end = frame.end_s
    yield _answer(pixels, wanted, start, end)


def _answer(pixels: list[Any], wanted: Request, start: float, end: float) -> tuple[dict[str, Any], np.ndarray]:
    """Frames [3, H, W] as one array [3, T, H, W], the last one repeated where there are too few."""
    valid = -(-len(pixels) // wanted.tubelet)
    pixels = pixels + [pixels[-1]] * (wanted.frames - len(pixels))
    return {"valid": valid, "start_s": start, "duration_s": max(0.0, end - start)}, np.stack(pixels, axis=1)


def _shown(packet: Any, codec: str) -> bool:
    """Whether a packet gives a frame to show: not cut off by an edit list, not one of VP8's hidden ones (RFC 6386)."""
    return not packet.is_discard and not (codec == "vp8" and not memoryview(packet)[0] >> 4 & 1)


def _refuse_other_files(url: str, flags: int, options: Mapping[str, Any]) -> Any:
    raise WrongKindError(f"video: the file asks for another one ({url!r}), which is never opened")
