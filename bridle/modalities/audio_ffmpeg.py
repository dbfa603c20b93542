"""Sound by FFmpeg's libraries: one named demuxer, a list of codecs, and nothing but the bytes given.

PyAV (18 and before) reads past the end of a frame's list of planes where a frame of planar samples has 8 channels or
more: such frames are packed by FFmpeg's own resampler before anything asks for their planes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import av
import numpy as np

from bridle.modalities.audio_kinds import MAX_CHANNELS, MP4, TAKES, Kind
from bridle.modalities.audio_recording import Recording, corrupt, mono
from bridle.modalities.clip import ClipError, TooLargeError, UndecodableError, WrongKindError

CODECS = (
    "aac", "ac3", "alac", "eac3", "flac", "mp2float", "mp3", "mp3float", "opus", "vorbis",
    "pcm_s16be", "pcm_s16le", "pcm_s24be", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_u8", "pcm_alaw", "pcm_mulaw",
)  # fmt: skip
"""Decoders that FFmpeg may use."""
BLOCK = 1 << 16
"""Samples per channel handed on at a time, about."""
PLANES = 8
"""Planes from which on PyAV must not be asked for them."""
_SEEN_TRUNCATED_S = 0.5


def open_ffmpeg(data: bytes, kind: Kind) -> Recording:
    """Opens a file as the kind it was found to be.

    Raises:
        WrongKindError, UndecodableError: here, or at any block.
    """
    options = {"codec_whitelist": ",".join(CODECS), "protocol_whitelist": "none"}
    try:
        container = av.open(io.BytesIO(data), mode="r", format=kind.demuxer, options=options, metadata_errors="replace")
        streams = container.streams.audio
    except (av.FFmpegError, ValueError) as error:
        raise corrupt(kind, error) from None
    if not streams:
        raise WrongKindError(f"{kind.name}: the file has no sound track; {TAKES}")
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
                    yield mono(_to_float(block))
        except (av.FFmpegError, EOFError, ValueError) as error:
            if isinstance(error, ClipError):
                raise
            raise corrupt(kind, error) from None
        if kind is MP4 and frames is not None and seen < frames - _SEEN_TRUNCATED_S * rate:
            raise UndecodableError(f"mp4: found {seen} of {frames} samples: truncated; replace the file")

    return Recording(kind, rate, frames, False, blocks)


def _stated_frames(container: av.container.InputContainer, stream: av.AudioStream, rate: int) -> int | None:
    if stream.duration is not None and stream.time_base is not None:
        return int(stream.duration * stream.time_base * rate)
    return container.duration * rate // av.time_base if container.duration is not None else None


def _frames(container: av.container.InputContainer, stream: av.AudioStream, rate: int) -> Iterator[np.ndarray]:
    """The codec's frames as ``[channels, n]`` of the codec's own type; nothing costly here, there are 40 a second."""
    packer: av.AudioResampler | None = None
    for frame in container.decode(stream):
        if frame.sample_rate != rate:
            raise UndecodableError(f"the sample rate changes from {rate} to {frame.sample_rate} Hz; convert the file")
        channels = frame.layout.nb_channels
        if channels > MAX_CHANNELS:
            raise TooLargeError(f"{channels} channels, expected at most {MAX_CHANNELS}")
        if channels < PLANES or not frame.format.is_planar:
            packed = [frame]
        else:
            packer = packer or av.AudioResampler(format=frame.format.packed)
            packed = packer.resample(frame)
        for found in packed:
            samples = found.to_ndarray()
            if samples.size:
                interleaved = samples.shape[1] != found.samples
                yield samples.reshape(found.samples, -1).T if interleaved else samples
    for found in packer.resample(None) if packer is not None else ():
        yield found.to_ndarray().reshape(found.samples, -1).T


def _to_float(samples: np.ndarray) -> np.ndarray:
    """Integer samples to [-1, 1) as libsndfile does it."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if np.issubdtype(samples.dtype, np.integer):
        return samples.astype(np.float32) / np.float32(-float(np.iinfo(samples.dtype).min))
    return samples.astype(np.float32, copy=False)


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
