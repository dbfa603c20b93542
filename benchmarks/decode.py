"""Samples per second and core of the whole clip path, against the bare decoder library on the same files in one run.

    python benchmarks/decode.py [--rounds 7] [audio ...]

The whole path is `Modality.training_clip`: limits, checks, decoding, augmentation, features, padding, normalisation.
Two alternatives stand beside it: `same work`, what one writes straight on the libraries for the same tensor without any
check, and `decode only`, the decoder with nothing after it. Rates are medians of rounds in CPU time, one thread.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources

import av
import numpy as np
import soundfile
import soxr
import torch
from torchaudio.compliance import kaldi

from bridle.modalities import build_modality


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


CASES: dict[str, Callable[[], Iterator[Case]]] = {"audio": audio_cases}


def _rate(path: Callable[[bytes], object], files: list[bytes]) -> float:
    start = time.process_time()
    for data in files:
        path(data)
    return len(files) / (time.process_time() - start)


def measure(case: Case, rounds: int) -> str:
    """One row: samples/s of the three paths, and ours over each of the others; medians of rounds that take turns."""
    paths = (case.whole_path, case.same_work, case.decode_only)
    for path in paths:
        _rate(path, case.files[:2])
    table = [[_rate(path, case.files) for path in paths] for _ in range(rounds)]
    whole, same, bare = (statistics.median(column) for column in zip(*table, strict=True))
    to_same, to_bare = (statistics.median(row[0] / row[i] for row in table) for i in (1, 2))
    return f"{case.name:<22}{whole:>14.0f}{same:>14.0f}{bare:>14.0f}{to_same:>14.2f}{to_bare:>14.2f}"


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
    print(f"{'samples/s per core':<22}" + "".join(f"{head:>14}" for head in heads))
    for name in arguments.modalities or CASES:
        for case in CASES[name]():
            print(measure(case, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
