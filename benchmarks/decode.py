"""Samples per second and core of the whole clip path, against the bare decoder library on the same files in one run.

    python benchmarks/decode.py [--rounds 7] [audio] [image] [video]

The whole path is `Modality.training_clip`: limits, checks, decoding, augmentation, features, padding, normalisation.
Two alternatives stand beside it: `same work`, what one writes straight on the libraries for the same tensor without any
check, and `decode only`, the decoder with nothing after it. Rates are medians of rounds in CPU time, one thread; the
CPU time of a decoding child process counts too.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import av
import decord
import numpy as np
import soundfile
import soxr
import torch
from PIL import Image
from torchaudio.compliance import kaldi
from torchvision.transforms import InterpolationMode, v2

from bridle.modalities import build_modality
from bridle.modalities.clip import Modality


@dataclass(frozen=True)
class Case:
    """The same files through three paths; each takes one file's bytes."""

    name: str
    files: list[bytes]
    whole_path: Callable[[bytes], object]
    same_work: Callable[[bytes], object]
    decode_only: Callable[[bytes], object]


def audio_cases() -> Iterator[Case]:
    """Clips of 10 s made of the shipped recordings, 44.1 kHz stereo, in each format; and the recordings as they are."""
    modality = build_modality("audio", {})
    recordings = _members("audio-train-0000.tar")

    def whole_path(data: bytes) -> object:
        return modality.training_clip(data, np.random.default_rng(0))

    def with_library(read: Callable[[bytes], tuple[np.ndarray, int]]) -> tuple[Callable[[bytes], object], ...]:
        return (lambda data: _kaldi_clip(*read(data))), read

    by_format = {"wav": _soundfile, "flac": _soundfile, "mp3": _soundfile, "ogg": _pyav, "opus": _pyav, "m4a": _pyav}
    sounds = _ten_seconds([data for name, data in recordings.items() if name.endswith(".ogg")])
    for format_name, read in by_format.items():
        files = [_encode(sound, format_name) for sound in sounds]
        yield Case(f"audio, 10 s {format_name}", files, whole_path, *with_library(read))
    yield Case("audio, 10 s opus, 8 ch", [_surround(sound) for sound in sounds], whole_path, *with_library(_packed))
    for format_name in ("flac", "ogg"):
        files = [data for name, data in recordings.items() if name.endswith(format_name)]
        yield Case(f"audio, shipped {format_name}", files, whole_path, *with_library(by_format[format_name]))


def _soundfile(data: bytes) -> tuple[np.ndarray, int]:
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    return samples.T, rate


def _pyav(data: bytes) -> tuple[np.ndarray, int]:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.audio[0]
        return np.concatenate([frame.to_ndarray() for frame in container.decode(stream)], axis=1), stream.rate


def _packed(data: bytes) -> tuple[np.ndarray, int]:
    """Without a look at the planes of a frame, which PyAV reads past the end of where there are 8."""
    packer = av.AudioResampler(format="flt")
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.audio[0]
        parts = [part.to_ndarray() for frame in container.decode(stream) for part in packer.resample(frame)]
        return np.concatenate(parts, axis=1).reshape(-1, stream.channels).T, stream.rate


def _surround(sound: np.ndarray, rate: int = 48_000) -> bytes:
    target = io.BytesIO()
    channels = np.concatenate([np.roll(sound, 99 * i, axis=1) for i in range(4)])  # played a little fast
    with av.open(target, "w", format="ogg") as output:
        stream = output.add_stream("libopus", rate=rate, layout="7.1", options={"mapping_family": "1"})
        for first in range(0, channels.shape[1], 960):
            packed = np.ascontiguousarray(channels[:, first : first + 960].T).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(packed, format="s16", layout="7.1")
            frame.sample_rate, frame.pts = rate, first
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return target.getvalue()


def _kaldi_clip(channels: np.ndarray, rate: int) -> torch.Tensor:
    mono = channels.mean(axis=0)
    samples = torch.from_numpy(soxr.resample(mono, rate, 16_000, quality="HQ") if rate != 16_000 else mono)[:160_000]
    samples = samples - samples.mean()
    energies = kaldi.fbank(
        torch.nn.functional.pad(samples, (0, max(0, 400 - len(samples))))[None],
        htk_compat=True,
        sample_frequency=16_000,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )
    return (torch.nn.functional.pad(energies, (0, 0, 0, 1024 - len(energies))) + 4.4446096) / (2 * 3.3216383)


def _members(shard: str) -> dict[str, bytes]:
    path = resources.files("bridle") / "data" / "sample" / shard
    with path.open("rb") as file, tarfile.open(fileobj=file) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if not m.name.endswith(".json")}  # type: ignore[union-attr]


def _ten_seconds(recordings: list[bytes], clips: int = 6, rate: int = 44_100) -> list[np.ndarray]:
    """int16 ``[2, 441000]`` each: recordings one after another."""
    decoded = [_pyav(data) for data in recordings]
    joined = np.concatenate([channels.mean(axis=0) for channels, found in decoded if found == rate])
    wanted = 10 * rate * clips
    stream = np.resize(np.clip(joined, -1, 1) * 32_767, wanted).astype(np.int16)
    return [np.stack([part, np.roll(part, 40)]) for part in stream.reshape(clips, -1)]


def _encode(sound: np.ndarray, format_name: str, rate: int = 44_100) -> bytes:
    target = io.BytesIO()
    containers = {"mp3": ("mp3", "libmp3lame", rate), "opus": ("ogg", "libopus", 48_000), "m4a": ("mov", "aac", rate)}
    if format_name not in containers:
        soundfile.write(target, sound.T, rate, format=format_name.upper())
        return target.getvalue()
    container, codec, coded_rate = containers[format_name]
    with av.open(target, "w", format=container) as output:
        stream = output.add_stream(codec, rate=coded_rate)
        stream.layout = "stereo"
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound.T).reshape(1, -1), format="s16", layout="stereo")
        frame.sample_rate = rate
        context = stream.codec_context
        resampler = av.AudioResampler(context.format, "stereo", coded_rate, context.frame_size)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return target.getvalue()


def image_cases() -> Iterator[Case]:
    """Sheets of the shipped photographs at usual sizes, as JPEG and WebP; and the pictures as they are."""
    modality = build_modality("image", {})
    members = _members("image-train-0000.tar")
    shipped = [data for name, data in members.items() if name.endswith((".jpg", ".png", ".webp"))]
    augment = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(modality.settings.mean, modality.settings.std),
        ]
    )

    def whole_path(data: bytes) -> object:
        return modality.training_clip(data, np.random.default_rng(len(data)))

    def decode_only(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    sheet = Image.new("RGB", (1600, 1200))
    for place, data in enumerate(shipped[:48]):
        sheet.paste(decode_only(data).resize((200, 200)), (place % 8 * 200, place // 8 * 200))
    for width, height, kind in ((500, 375, "jpeg"), (500, 375, "webp"), (1280, 960, "jpeg"), (4000, 3000, "jpeg")):
        buffer = io.BytesIO()
        sheet.resize((width, height), Image.Resampling.BICUBIC).save(buffer, kind, quality=90)
        files = [buffer.getvalue() + bytes(n) for n in range(4 if width > 2000 else 24)]  # the length seeds the crop
        name = f"image, {width}x{height} {kind}"
        yield Case(name, files, whole_path, lambda data: augment(decode_only(data)), decode_only)
    yield Case("image, shipped", shipped[:60], whole_path, lambda data: augment(decode_only(data)), decode_only)


def video_cases() -> Iterator[Case]:
    """Ten seconds of a moving sheet at two sizes, and the shipped videos: 16 frames at stride 4 from a random start."""
    shipped = [data for name, data in _members("video-train-0000.tar").items() if name.endswith(".mp4")][:24]
    films = [(f"{width}x{height}", [_film(width, height, shift) for shift in range(3)]) for width, height in SIZES]
    for name, files in [*films, ("shipped", shipped)]:
        for decoder, isolate in (("pyav", True), ("pyav", False), ("decord", False)):
            modality = build_modality("video", {"decoder": decoder, "isolate": isolate})

            def whole_path(data: bytes, modality: Modality = modality) -> object:
                return modality.training_clip(data, np.random.default_rng(len(data)))

            bare = _pyav_frames if decoder == "pyav" else _decord_frames
            label = f"video, {name} {decoder}{', child' if isolate else ''}"
            yield Case(label, files, whole_path, lambda data, bare=bare: _plain_video_clip(bare(data)), bare)


SIZES = ((340, 256), (1280, 720))


def _wanted(frames: int, data: bytes) -> list[int]:
    """The frames that `Video.training_clip` takes with the generator above."""
    first = int(np.random.default_rng(len(data)).random() * max(1, frames - 60))
    return [index for index in range(first, first + 61, 4) if index < frames]


def _pyav_frames(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = _wanted(stream.frames, data)
        container.seek(int(wanted[0] / stream.average_rate / stream.time_base), stream=stream)
        found = []
        for frame in container.decode(stream):
            index = round(frame.time * stream.average_rate)
            if index in wanted:
                found.append(frame.to_ndarray(format="rgb24"))
            if index >= wanted[-1]:
                return np.stack(found)
    raise ValueError("the video ended early")


def _decord_frames(data: bytes) -> np.ndarray:
    reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1)
    return reader.get_batch(_wanted(len(reader), data)).asnumpy()


def _plain_video_clip(frames: np.ndarray) -> torch.Tensor:
    side = min(frames.shape[1:3])
    pixels = torch.from_numpy(frames[:, :side, :side]).permute(0, 3, 1, 2)
    pixels = v2.functional.resize(pixels, [224, 224], antialias=True)
    return v2.functional.normalize(pixels.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def _film(width: int, height: int, shift: int, frames: int = 250) -> bytes:
    pictures = [
        Image.open(io.BytesIO(data)).convert("RGB") for data in list(_members("image-train-0000.tar").values())[:24]
    ]
    canvas = Image.new("RGB", (width * 2, height * 2))
    for place in range(64):
        tile = pictures[(place + shift) % len(pictures)].resize((width // 4, height // 4))
        canvas.paste(tile, (place % 8 * (width // 4), place // 8 * (height // 4)))
    sheet, buffer = np.asarray(canvas), io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            top, left = number * height // frames, int((1 + np.sin(number / 20)) * width / 2)
            part = np.ascontiguousarray(sheet[top : top + height, left : left + width])
            output.mux(stream.encode(av.VideoFrame.from_ndarray(part, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


CASES: dict[str, Callable[[], Iterator[Case]]] = {"audio": audio_cases, "image": image_cases, "video": video_cases}


def _cpu_seconds() -> float:
    """Of this process and of the children it has now (Linux's schedstat counts nanoseconds on a processor)."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
    others = sum(int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[0]) for pid in children)
    return time.process_time() + others / 1e9


def _rate(path: Callable[[bytes], object], files: list[bytes]) -> float:
    start = _cpu_seconds()
    for data in files:
        path(data)
    return len(files) / (_cpu_seconds() - start)


def measure(case: Case, rounds: int) -> str:
    """One row: samples/s of the three paths, and ours over each of the others; medians of rounds that take turns."""
    paths = (case.whole_path, case.same_work, case.decode_only)
    for path in paths:
        _rate(path, case.files[:2])
    table = [[_rate(path, case.files) for path in paths] for _ in range(rounds)]
    whole, same, bare = (statistics.median(column) for column in zip(*table, strict=True))
    to_same, to_bare = (statistics.median(row[0] / row[i] for row in table) for i in (1, 2))
    return f"{case.name:<30}{whole:>14.0f}{same:>14.0f}{bare:>14.0f}{to_same:>14.2f}{to_bare:>14.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modalities", nargs="*", metavar="MODALITY", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    unknown = set(arguments.modalities) - set(CASES)
    if unknown:
        parser.error(f"unknown modality {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    torch.set_num_threads(1)
    heads = ("whole path", "same work", "decode only", "whole/same", "whole/decode")
    print(f"{'samples/s per core':<30}" + "".join(f"{head:>14}" for head in heads))
    for name in arguments.modalities or CASES:
        for case in CASES[name]():
            print(measure(case, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
