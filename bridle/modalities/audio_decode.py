"""Encoded sound to mono float32 at 16 kHz, in blocks, within limits, from bytes that nobody vouches for.

libsndfile reads wav, aiff, caf, flac and mp3 (it is the faster there), FFmpeg through PyAV everything else. The kind of
file is decided by its first bytes: FFmpeg is told which one demuxer to use, may use only some codecs, and may open
nothing but the bytes it was given. So a playlist is refused, never followed.
"""

from __future__ import annotations

import contextlib
import io
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
import soundfile
import soxr

from bridle.modalities.audio_ffmpeg import open_ffmpeg
from bridle.modalities.audio_frames import SAMPLE_RATE
from bridle.modalities.audio_kinds import (
    FLAC,
    MAX_CHANNELS,
    MP3,
    TAKES,
    WAV,
    Kind,
    describe,
    kind_of,
)
from bridle.modalities.audio_parts import flac_parts, mp3_parts
from bridle.modalities.audio_recording import Recording, corrupt, mono
from bridle.modalities.audio_wav import mended_wav
from bridle.modalities.clip import Limits, TooLargeError, UndecodableError, WrongKindError

RATES = (1_000, 768_000)
"""Sample rates accepted, in Hz: a resampler's memory and output grow with the ratio to 16 kHz."""
CLIP_LEVEL = 8.0
"""Float samples beyond this (18 dB above full scale) are broken, not loud, and are clipped."""
BLOCK = 1 << 16
"""Samples per channel decoded at a time."""

_UNKNOWN_LENGTH = 1 << 62
_SPOTS, _SPOT, _SHARE_BEYOND = 16, 256, 0.05
"""Where a float file is probed for integers: spots spread over it, frames of each, share beyond `CLIP_LEVEL`."""


def open_recording(data: bytes, limits: Limits) -> Recording:
    """Reads the header and refuses what the limits forbid.

    Raises:
        WrongKindError, UndecodableError, TooLargeError
    """
    if not data:
        raise UndecodableError(f"the file is empty (0 bytes); {TAKES}")
    if len(data) > limits.max_bytes:
        raise TooLargeError(f"the file has {len(data)} bytes, above limits.max_bytes = {limits.max_bytes}; split it")
    kind = kind_of(data)
    if kind is None:
        raise WrongKindError(f"found {describe(data)}; {TAKES}")
    raw = _opened(data, kind)
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


def excerpt(data: bytes, limits: Limits, samples: int, position: float) -> np.ndarray:
    """At most `samples` at 16 kHz of a recording, from the share `position` in [0, 1) of the possible beginnings on.

    Decodes the whole only where it must: wav and flac are entered in the middle, all others are left early.

    Returns:
        mono float32 ``[n]`` at 16 kHz, 0 < n <= samples.

    Raises:
        WrongKindError, UndecodableError, TooLargeError
    """
    recording = open_recording(data, limits)
    length = -(-samples * recording.rate // SAMPLE_RATE)
    frames = recording.frames
    if frames is None:
        frames = sum(len(block) for block in open_recording(data, limits).blocks(0))
    start = int(position * (frames - length + 1)) if frames > length else 0
    skipped = start if recording.seekable else 0
    native = _last_before(recording.blocks(skipped), start + length - skipped, length)
    if recording.rate != SAMPLE_RATE:
        native = soxr.resample(native, recording.rate, SAMPLE_RATE, quality="HQ")
    return native[:samples]


def as_mp3(samples: np.ndarray) -> bytes:
    """Mono float32 ``[n]`` at 16 kHz as a file that every browser plays."""
    target = io.BytesIO()
    soundfile.write(target, np.clip(samples, -1, 1), SAMPLE_RATE, format="MP3")
    return target.getvalue()


def resampled(blocks: Iterable[np.ndarray], rate: int, wanted: int = SAMPLE_RATE) -> Iterator[np.ndarray]:
    """Mono float32 blocks at `rate` Hz as blocks at another, 16 kHz."""
    if rate == wanted:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, wanted, 1, dtype="float32", quality="HQ")
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


def _opened(data: bytes, kind: Kind) -> Recording:
    """The file's recordings as one."""
    if not kind.libsndfile:
        return open_ffmpeg(data, kind)
    if kind in (MP3, FLAC):
        parts = [_open_libsndfile(part, kind) for part in (mp3_parts if kind is MP3 else flac_parts)(data)]
        return parts[0] if len(parts) == 1 else _in_a_row(kind, parts)
    return _open_libsndfile(mended_wav(data) if kind is WAV else data, kind)


def _in_a_row(kind: Kind, parts: list[Recording]) -> Recording:
    rate, known = parts[0].rate, [part.frames for part in parts]
    frames = None if None in known else sum(part.frames * rate // part.rate for part in parts if part.frames)

    def blocks(_: int) -> Iterator[np.ndarray]:
        for part in parts:
            yield from resampled(part.blocks(0), part.rate, rate)

    return Recording(kind, rate, frames, False, blocks)


class _Bytes(io.BytesIO):
    """A file whose damaged header may ask for places before its beginning: soundfile prints a traceback of that."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


def _open_libsndfile(data: bytes, kind: Kind) -> Recording:
    try:
        file = soundfile.SoundFile(_Bytes(data))
    except soundfile.LibsndfileError as error:
        raise corrupt(kind, error) from None
    if file.frames > _UNKNOWN_LENGTH:  # a flac encoded into a pipe; libsndfile cannot find its end
        return open_ffmpeg(data, kind)
    if file.channels > MAX_CHANNELS:
        raise TooLargeError(f"{kind.name}: {file.channels} channels, expected at most {MAX_CHANNELS}")
    if kind.seekable and file.subtype in ("FLOAT", "DOUBLE"):
        _refuse_integers_as_floats(file, kind)

    def blocks(start: int) -> Iterator[np.ndarray]:
        try:
            if start or file.tell():
                file.seek(start)
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                yield mono(block.T)
        except soundfile.LibsndfileError as error:
            raise corrupt(kind, error) from None

    return Recording(kind, file.samplerate, file.frames, kind.seekable, blocks)


def _refuse_integers_as_floats(file: soundfile.SoundFile, kind: Kind) -> None:
    """Raises UndecodableError where samples all over the file are far beyond full scale."""
    seen = np.zeros(0, np.float32)
    with contextlib.suppress(soundfile.LibsndfileError):  # met again, and told, where the sound is read
        for spot in range(_SPOTS):
            file.seek(max(file.frames - _SPOT, 0) * spot // (_SPOTS - 1))
            seen = np.append(seen, np.abs(file.read(_SPOT, dtype="float32", always_2d=True)))
    beyond = seen[seen > CLIP_LEVEL]
    if len(beyond) > _SHARE_BEYOND * len(seen) and np.isfinite(beyond).all():
        raise UndecodableError(
            f"{kind.name}: its float samples reach {beyond.max():.0f}, expected -1 to 1: integers saved as floats;"
            " divide them by full scale (32768 for 16 bits), or save them as integers"
        )
