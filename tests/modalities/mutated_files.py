"""Damages files and counts what a modality makes of them.

    python tests/modalities/mutated_files.py [KIND ...] [--count 500] [--seed 0]

Each kind of file is damaged `count` times and tokenized: sounds and pictures in this process, videos in the isolated
child. A crash of this process, or a file over its time, is a failure.
"""

from __future__ import annotations

import argparse
import io
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from encoded_audio import encode, tone
from encoded_video import encode_video, frame_picture
from PIL import Image

from bridle.modalities import build_modality, isolation
from bridle.modalities.clip import ClipError, Limits, Modality

X265 = {"x265-params": "keyint=12:bframes=3:log-level=none"}
VIDEOS: dict[str, dict[str, Any]] = {
    "mp4": {},
    "mkv": {"container": "matroska", "codec": "libx265", "options": X265},
    "webm": {"container": "webm", "codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "avi": {"container": "avi", "codec": "mpeg4"},
    "mov": {"container": "mov"},
}
PICTURES = {
    "jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "avif": "AVIF",
}  # fmt: skip
SOUNDS = ("wav", "aiff", "caf", "flac", "mp3", "ogg", "opus", "m4a", "aac", "weba", "mka")
WAVS: dict[str, dict[str, str]] = {
    "rifx": {"endian": "BIG"}, "rf64": {"format": "RF64"}, "wavex": {"format": "WAVEX", "subtype": "PCM_24"},
    "wav-float": {"subtype": "FLOAT"}, "wav-ulaw": {"subtype": "ULAW"}, "wav-adpcm": {"subtype": "IMA_ADPCM"},
    "wav-ms": {"subtype": "MS_ADPCM"}, "wav-gsm": {"subtype": "GSM610"},
}  # fmt: skip
"""Variants of wav, as libsndfile writes them."""
LIMITS = Limits(max_pixels=4_000_000, max_frames=2000, max_seconds=600)


def original(kind: str) -> bytes:
    """A file of the kind."""
    if kind in SOUNDS:
        return encode(tone(2.0), 16_000, {"weba": "webm"}.get(kind, kind))
    if kind in VIDEOS:
        return encode_video(24, **VIDEOS[kind])
    buffer = io.BytesIO()
    if kind in WAVS:
        told = {"format": "WAV", "subtype": "PCM_16", **WAVS[kind]}
        samples = tone(2.0) / np.float32(32_768) if told["subtype"] == "FLOAT" else tone(2.0)
        soundfile.write(buffer, samples, 16_000, **told)
        return buffer.getvalue()
    Image.fromarray(frame_picture(37, 120, 80)).save(buffer, PICTURES[kind])
    return buffer.getvalue()


def mutants(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Truncations, flipped bytes, bytes set to extremes, runs of zeros; a third of them in the first part."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        damaged = bytearray(data[: int(rng.integers(1, len(data)))] if rng.random() < 0.2 else data)
        reach = min(len(damaged), 600) if rng.random() < 1 / 3 else len(damaged)
        for _ in range(int(rng.integers(1, 12))):
            place, what = int(rng.integers(reach)), rng.random()
            if what < 0.5:
                damaged[place] ^= 1 << int(rng.integers(8))
            elif what < 0.9:
                damaged[place] = int(rng.choice([0, 1, 127, 128, 255]))
            else:
                damaged[place : place + 8] = bytes(len(damaged[place : place + 8]))
        yield bytes(damaged)


def modality_for(kind: str) -> Modality:
    """Tokenizes small clips within `LIMITS`."""
    if kind in PICTURES:
        return build_modality("image", {"size": [32, 32]}, LIMITS)
    if kind in SOUNDS or kind in WAVS:
        return build_modality("audio", {"seconds": 1.0}, LIMITS)
    clip = {"frames": 8, "stride": 2, "size": [32, 32], "decode_seconds": 10.0, "decode_memory_mb": 1024}
    return build_modality("video", clip, LIMITS)


def outcomes(modality: Modality, files: Iterable[bytes]) -> tuple[Counter[str], float]:
    """What became of each file ("clips" or the error's class), and the longest time one took, in seconds."""
    found: Counter[str] = Counter()
    longest = 0.0
    for number, data in enumerate(files):
        begin = time.monotonic()
        try:
            for window in modality.windows(data):
                assert window.values.shape[0] == modality.channels and torch.isfinite(window.values).all()
            modality.training_clip(data, np.random.default_rng(number))
            found["clips"] += 1
        except ClipError as error:
            crashed = "crashed" in str(error) or "hung" in str(error)
            found["child crashed" if crashed else type(error).__name__] += 1
        longest = max(longest, time.monotonic() - begin)
    return found, longest


def peak_mb(pid: int) -> int:
    """The most memory the process ever held."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="all, unless some are named")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for kind in arguments.kinds or (*SOUNDS, *WAVS, *PICTURES, *VIDEOS):
        found, longest = outcomes(modality_for(kind), mutants(original(kind), arguments.count, arguments.seed))
        childs = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
        peaks = ", ".join(f"{peak_mb(int(pid))} MB in the child" for pid in childs)
        print(
            f"{kind:5} longest {longest:5.2f} s, peak {peak_mb(os.getpid())} MB here {peaks} {dict(found)}", flush=True
        )
        isolation.close_idle()


if __name__ == "__main__":
    main()
