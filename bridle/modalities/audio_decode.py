"""Encoded sound to mono float32 at 16 kHz, in blocks, within limits, from bytes that nobody vouches for.

libsndfile reads wav, flac and mp3 (it is the faster there), FFmpeg through PyAV everything else. The kind of file is
decided here, from its first bytes: FFmpeg is told which one demuxer to use, may use only the codecs listed below, and
may open nothing but the bytes it was given. So a playlist is refused, never followed.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import av
import numpy as np
import soundfile
import soxr

from bridle.modalities.clip import Limits, TooLargeError, UndecodableError, WrongKindError
from bridle.modalities.fbank import SAMPLE_RATE

CODECS = (
    "aac", "ac3", "alac", "eac3", "flac", "mp2float", "mp3", "mp3float", "opus", "vorbis",
    "pcm_s16be", "pcm_s16le", "pcm_s24be", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_u8", "pcm_alaw", "pcm_mulaw",
)  # fmt: skip
"""Decoders that FFmpeg may use."""
MAX_CHANNELS = 64
RATES = (1_000, 768_000)
"""Sample rates accepted, in Hz: a resampler's memory and output grow with the ratio to 16 kHz."""
CLIP_LEVEL = 8.0
"""Float samples beyond this (18 dB above full scale) are broken, not loud, and are clipped."""
BLOCK = 1 << 16
"""Samples per channel decoded at a time."""

_SEEN_TRUNCATED_S = 0.5
_UNKNOWN_LENGTH = 1 << 62
_PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
_TAKES = "expected sound: wav, flac, mp3, ogg, opus, m4a, aac, webm, mka, or a film with a sound track"


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
AAC = Kind("aac", "aac", states_length=False)
OGG = Kind("ogg", "ogg")
MP4 = Kind("mp4", "mov")
MATROSKA = Kind("matroska or webm", "matroska")
AVI = Kind("avi", "avi")


def kind_of(head: bytes) -> Kind | None:
    """What a file is, from its beginning (4 KiB are enough unless a longer ID3 tag comes first); none: no sound."""
    if head[:3] == b"ID3" and len(head) >= 10:
        size = (head[6] & 127) << 21 | (head[7] & 127) << 14 | (head[8] & 127) << 7 | head[9] & 127
        return _without_tag(head[10 + size : 10 + size + 16]) or MP3
    if head[:4] in (b"RIFF", b"RF64"):
        return {b"WAVE": WAV, b"AVI ": AVI}.get(head[8:12])
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free"):
        return None if head[8:12] in _PICTURE_BRANDS else MP4
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return MATROSKA
    return OGG if head[:4] == b"OggS" else _without_tag(head)


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


@dataclass(frozen=True)
class Recording:
    """An opened sound file.

    rate: Hz. frames: samples per channel by the header; none where it says nothing reliable.
    blocks: call once, with a first sample (0 unless `seekable`), for an iterator of mono float32 ``[n]`` at `rate`,
        n > 0.
    """

    kind: Kind
    rate: int
    frames: int | None
    seekable: bool
    blocks: Callable[[int], Iterator[np.ndarray]]


def open_recording(data: bytes, limits: Limits) -> Recording:
    """Reads the header and refuses what the limits forbid.

    Raises:
        WrongKindError, UndecodableError, TooLargeError
    """
    if not data:
        raise UndecodableError(f"the file is empty (0 bytes); {_TAKES}")
    if len(data) > limits.max_bytes:
        raise TooLargeError(f"the file has {len(data)} bytes, above limits.max_bytes = {limits.max_bytes}; split it")
    kind = kind_of(data)
    if kind is None:
        raise WrongKindError(f"found {_describe(data)}; {_TAKES}")
    raw = _open_libsndfile(data, kind) if kind.libsndfile else _open_ffmpeg(data, kind)
    if not RATES[0] <= raw.rate <= RATES[1]:
        raise UndecodableError(f"{kind.name}: sample rate {raw.rate} Hz, expected {RATES[0]} to {RATES[1]}")
    if raw.frames is not None and raw.frames > limits.max_seconds * raw.rate:
        raise _too_long(kind, raw.frames / raw.rate, limits)
    return Recording(kind, raw.rate, raw.frames, raw.seekable, lambda start: _checked(raw, start, limits))


def decode(data: bytes, limits: Limits) -> Iterator[np.ndarray]:
    """The whole recording as blocks of mono float32 ``[n]`` at 16 kHz, n > 0.

    Samples do not depend on how the file is cut into blocks: the resampler (soxr, HQ) runs through.

    Raises:
        WrongKindError, UndecodableError, TooLargeError: at the start or at any block; a file that is found to be
            corrupt half way raises there.
    """
    recording = open_recording(data, limits)
    return resampled(recording.blocks(0), recording.rate)


def excerpt(data: bytes, limits: Limits, seconds: float, position: float) -> np.ndarray:
    """At most `seconds` of a recording, beginning at the share `position` in [0, 1) of the possible beginnings.

    Decodes the whole only where it must: wav and flac are entered in the middle, all others are left early.

    Returns:
        mono float32 ``[n]`` at 16 kHz, 0 < n <= seconds * 16000.

    Raises:
        WrongKindError, UndecodableError, TooLargeError
    """
    recording = open_recording(data, limits)
    length = int(np.ceil(seconds * recording.rate))
    frames = recording.frames
    if frames is None:
        frames = sum(len(block) for block in open_recording(data, limits).blocks(0))
    start = int(position * (frames - length + 1)) if frames > length else 0
    skipped = start if recording.seekable else 0
    native = _last_before(recording.blocks(skipped), start + length - skipped, length)
    if recording.rate != SAMPLE_RATE:
        native = soxr.resample(native, recording.rate, SAMPLE_RATE, quality="HQ")
    return native[: int(seconds * SAMPLE_RATE)]


def resampled(blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Mono float32 blocks at `rate` Hz as blocks at 16 kHz."""
    if rate == SAMPLE_RATE:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
    parts = (stream.resample_chunk(block) for block in blocks)
    rest = (stream.resample_chunk(np.zeros(0, np.float32), last=True) for _ in range(1))
    yield from (part for part in chain(parts, rest) if len(part))


def _last_before(blocks: Iterator[np.ndarray], stop: int, length: int) -> np.ndarray:
    """The last `length` samples before sample `stop`, or before the end where a file is shorter than it says."""
    kept: deque[np.ndarray] = deque()
    held = seen = 0
    for block in blocks:
        kept.append(block[: stop - seen])
        held += len(kept[-1])
        seen += len(kept[-1])
        while held - len(kept[0]) >= length:
            held -= len(kept.popleft())
        if seen >= stop:
            break
    return np.concatenate(kept)[-length:]


def _checked(raw: Recording, start: int, limits: Limits) -> Iterator[np.ndarray]:
    """The blocks, finite, clipped, and no more of them than the limits allow."""
    seen = 0
    for block in raw.blocks(start):
        seen += len(block)
        if seen > limits.max_seconds * raw.rate:
            raise _too_long(raw.kind, seen / raw.rate, limits)
        low, high = block.min(), block.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            raise UndecodableError(f"{raw.kind.name}: found samples that are not finite; replace the file")
        yield np.clip(block, -CLIP_LEVEL, CLIP_LEVEL) if max(-low, high) > CLIP_LEVEL else block
    if seen == 0:
        raise UndecodableError(f"{raw.kind.name}: the file holds no samples, expected at least one; replace the file")


def _too_long(kind: Kind, seconds: float, limits: Limits) -> TooLargeError:
    return TooLargeError(
        f"{kind.name}: {seconds:.0f} s of sound or more, above limits.max_seconds = {limits.max_seconds:g}; split it"
    )


def _open_libsndfile(data: bytes, kind: Kind) -> Recording:
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except soundfile.LibsndfileError as error:
        raise _corrupt(kind, error) from None
    if file.frames > _UNKNOWN_LENGTH:  # a flac encoded into a pipe; libsndfile cannot find its end
        return _open_ffmpeg(data, kind)
    if file.channels > MAX_CHANNELS:
        raise TooLargeError(f"{kind.name}: {file.channels} channels, expected at most {MAX_CHANNELS}")

    def blocks(start: int) -> Iterator[np.ndarray]:
        try:
            if start:
                file.seek(start)
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                yield _mono(block.T)
        except soundfile.LibsndfileError as error:
            raise _corrupt(kind, error) from None

    return Recording(kind, file.samplerate, file.frames, kind.seekable, blocks)


def _open_ffmpeg(data: bytes, kind: Kind) -> Recording:
    options = {"codec_whitelist": ",".join(CODECS), "protocol_whitelist": "none"}
    try:
        container = av.open(io.BytesIO(data), mode="r", format=kind.demuxer, options=options, metadata_errors="replace")
        streams = container.streams.audio
    except (av.FFmpegError, ValueError) as error:
        raise _corrupt(kind, error) from None
    if not streams:
        raise WrongKindError(f"{kind.name}: the file has no sound track; {_TAKES}")
    stream = streams[0]
    context: av.AudioCodecContext | None = stream.codec_context  # none where FFmpeg does not know the codec at all
    if context is None or context.name not in CODECS:
        codec = context.name if context else "unknown"
        raise WrongKindError(f"{kind.name}: codec {codec} is not accepted; convert the file to flac, mp3, opus or aac")
    rate = context.sample_rate
    frames = _stated_frames(container, stream, rate) if kind.states_length else None

    def blocks(_: int) -> Iterator[np.ndarray]:
        seen = 0
        try:
            with container:
                for block in _joined(_frames(container, stream, rate)):
                    seen += block.shape[1]
                    yield _mono(_to_float(block))
        except (av.FFmpegError, EOFError) as error:
            raise _corrupt(kind, error) from None
        if kind is MP4 and frames is not None and seen < frames - _SEEN_TRUNCATED_S * rate:
            raise UndecodableError(f"mp4: found {seen} of {frames} samples: truncated; replace the file")

    return Recording(kind, rate, frames, False, blocks)


def _stated_frames(container: av.container.InputContainer, stream: av.AudioStream, rate: int) -> int | None:
    if stream.duration is not None and stream.time_base is not None:
        return int(stream.duration * stream.time_base * rate)
    return container.duration * rate // av.time_base if container.duration is not None else None


def _frames(container: av.container.InputContainer, stream: av.AudioStream, rate: int) -> Iterator[np.ndarray]:
    """The codec's frames as ``[channels, n]`` of the codec's own type; nothing costly here, there are 40 a second."""
    for frame in container.decode(stream):
        if frame.sample_rate != rate:
            raise UndecodableError(f"the sample rate changes from {rate} to {frame.sample_rate} Hz; convert the file")
        samples = frame.to_ndarray()
        if not samples.size:
            continue
        if samples.shape[1] != frame.samples:  # interleaved
            samples = samples.reshape(frame.samples, -1).T
        if len(samples) > MAX_CHANNELS:
            raise TooLargeError(f"{len(samples)} channels, expected at most {MAX_CHANNELS}")
        yield samples


def _to_float(samples: np.ndarray) -> np.ndarray:
    """Integer samples to [-1, 1) as libsndfile does it."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if np.issubdtype(samples.dtype, np.integer):
        return samples.astype(np.float32) / np.float32(-float(np.iinfo(samples.dtype).min))
    return samples.astype(np.float32, copy=False)


def _mono(samples: np.ndarray) -> np.ndarray:
    """The mean of the channels of float32 ``[channels, n]``."""
    if len(samples) == 1:
        return np.ascontiguousarray(samples[0])
    mixed = np.zeros(samples.shape[1], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused right after
        for channel in samples:  # 30 times as fast as a sum over the short axis of interleaved samples
            mixed += channel
    return mixed / np.float32(len(samples))


def _joined(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same samples in blocks of about `BLOCK`, which cost the later stages less than frames of some 1,000."""
    held: list[np.ndarray] = []
    size = 0
    for frame in frames:
        if size >= BLOCK or (held and len(held[0]) != len(frame)):
            yield np.concatenate(held, axis=1)
            held, size = [], 0
        held.append(frame)
        size += frame.shape[1]
    if held:
        yield np.concatenate(held, axis=1)


def _corrupt(kind: Kind, error: Exception) -> UndecodableError:
    text = error.error_string if isinstance(error, soundfile.LibsndfileError) else getattr(error, "strerror", None)
    reason = " ".join((text or str(error)).split()).rstrip(".") or "unreadable"
    return UndecodableError(f"{kind.name}: corrupt or truncated ({reason}); replace the file")


def _describe(data: bytes) -> str:
    """What a refused file seems to be."""
    head = data[:512].lstrip()
    if head.startswith((b"#EXTM3U", b"ffconcat", b"v=0", b"[playlist]")) or b"<MPD" in head:
        return "a playlist, which points to other files"
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8")) or head[8:12] in (b"WEBP", *_PICTURE_BRANDS):
        return "a picture"
    printable = all(byte >= 32 or byte in b"\t\r\n" for byte in head)
    return "text" if printable else f"an unknown kind of file (it begins with {data[:8].hex(' ')})"
