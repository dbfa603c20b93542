"""Sound files for the tests: the sample that ships, and the same sound in every format."""

from __future__ import annotations

import io
import tarfile
import tempfile
from functools import lru_cache
from importlib import resources
from pathlib import Path

import av
import numpy as np
import soundfile

from bridle.modalities import build_modality
from bridle.modalities.audio import Audio
from bridle.modalities.clip import Limits

FORMATS = ("wav", "flac", "mp3", "ogg", "opus", "m4a", "aac", "webm", "mka", "mp4")
EXACT = ("wav", "flac", "mka")
"""Lossless as encoded here."""
TRUNCATION_IS_AN_ERROR = ("flac", "m4a", "mp4", "aac")

_WITH_FFMPEG = {
    "mp3": ("mp3", "libmp3lame"),
    "opus": ("ogg", "libopus"),
    "m4a": ("ipod", "aac"),
    "aac": ("adts", "aac"),
    "webm": ("webm", "libopus"),
    "mka": ("matroska", "pcm_s16le"),
    "mp4": ("mp4", "aac"),
}


def audio(limits: Limits | None = None, **settings: object) -> Audio:
    """The modality with 2 s clips unless told otherwise."""
    built = build_modality("audio", {"seconds": 2.0, **settings}, limits)
    assert isinstance(built, Audio)
    return built


@lru_cache(maxsize=1)
def recordings() -> dict[str, bytes]:
    """The held-out sounds of the sample, by name."""
    shard = resources.files("bridle") / "data" / "sample" / "audio-heldout-0000.tar"
    with shard.open("rb") as file, tarfile.open(fileobj=file) as tar:
        names = [name for name in tar.getnames() if not name.endswith(".json")]
        return {name: tar.extractfile(name).read() for name in names}  # type: ignore[union-attr]


def tone(seconds: float, rate: int = 16_000, hertz: float = 440.0, channels: int = 1) -> np.ndarray:
    """int16 ``[n, channels]``: a tone with a little noise, so that no frame is empty."""
    time = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal((len(time), channels))
    return np.round(10_000 * np.sin(2 * np.pi * hertz * time)[:, None] + 100 * noise).astype(np.int16)


def encode(samples: np.ndarray, rate: int, kind: str, **options: str) -> bytes:
    """int16 ``[n, channels]`` as a file of one of `FORMATS`."""
    if kind in _WITH_FFMPEG:
        container, codec = _WITH_FFMPEG[kind]
        return encode_with_ffmpeg(samples, rate, container, codec, options, film=kind == "mp4")
    target = io.BytesIO()
    subtype = "VORBIS" if kind == "ogg" else "PCM_16"
    soundfile.write(target, samples, rate, format=kind.upper(), subtype=subtype)
    return target.getvalue()


def wav_of(samples: np.ndarray, rate: int = 16_000) -> bytes:
    """Float samples ``[n]`` or ``[n, channels]`` as they are."""
    target = io.BytesIO()
    soundfile.write(target, samples, rate, format="WAV", subtype="FLOAT")
    return target.getvalue()


def encode_with_ffmpeg(
    samples: np.ndarray, rate: int, container: str, codec: str, options: dict[str, str], film: bool = False
) -> bytes:
    layout = {1: "mono", 2: "stereo"}[samples.shape[1]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoded"
        with av.open(path, "w", format=container, options=options) as output:
            stream = output.add_stream(codec, rate=48_000 if codec == "libopus" else rate)
            stream.layout = layout
            if film:
                _add_pictures(output)
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(samples).reshape(1, -1), format="s16", layout=layout
            )
            frame.sample_rate = rate
            context = stream.codec_context
            resampler = av.AudioResampler(context.format, layout, context.sample_rate, context.frame_size or 1024)
            for part in [*resampler.resample(frame), *resampler.resample(None)]:
                output.mux(stream.encode(part))
            output.mux(stream.encode(None))
        return path.read_bytes()


def remux(data: bytes, container: str) -> bytes:
    """The same packets of sound in another container."""
    target = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(target, "w", format=container) as output:
        stream = output.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    return target.getvalue()


def _add_pictures(output: av.container.OutputContainer) -> None:
    stream = output.add_stream("mpeg4", rate=10)
    stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
    for shade in range(10):
        picture = np.full((32, 32, 3), shade, np.uint8)
        output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    output.mux(stream.encode(None))


def silent_film() -> bytes:
    """An mp4 without a sound track."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as output:
        _add_pictures(output)
    return target.getvalue()
