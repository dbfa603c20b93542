"""Sounds and shards made on the spot."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import soundfile


def tone(seconds: float, format: str = "WAV") -> bytes:
    """A chord in noise at 16 kHz."""
    time = np.arange(round(seconds * 16_000)) / 16_000
    noise = np.random.default_rng(0).normal(0, 0.05, len(time))
    samples = 0.2 * np.sin(2 * np.pi * 440 * time) + 0.1 * np.sin(2 * np.pi * 1320 * time * (1 + time / 9)) + noise
    file = io.BytesIO()
    soundfile.write(file, samples.astype(np.float32), 16_000, format=format, subtype="PCM_16")
    return file.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    """A shard of the files given, in their order."""
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path
