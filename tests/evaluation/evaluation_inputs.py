"""Sounds, shards and untrained models made on the spot, and the recipe of a run of seconds."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml
from untrained import save_untrained

from bridle.config import recipe_from_mapping

RECIPE = """
modality: audio
clip: {seconds: 1.0}
model: {size: tiny, encoder: {depth: 1}, quantizer: {codebooks: 4, codebook_size: 64, dim: 32}}
data: {shards: ["builtin:audio"], heldout: ["builtin:audio-heldout"], workers: 0, max_corrupt: 0.05}
train: {batch_size: 4, log_every: 1, evaluate_clips: 8, prometheus_port: 0}
phases:
  - {kind: cold_start}
  - {kind: encoder, steps: 3, warmup_steps: 1, lr: 1.0e-3}
  - {kind: tokenizer, steps: 3, warmup_steps: 1, lr: 1.0e-3}
  - {kind: encoder, steps: 2, warmup_steps: 1, lr: 1.0e-3}
"""


def write_random_model(folder: Path, **changes: Any) -> Path:
    """An untrained model of RECIPE with other sections, its codebooks initialised on random latents."""
    recipe = recipe_from_mapping({**yaml.safe_load(RECIPE), **changes}, "RECIPE")
    return save_untrained(folder, recipe, "tiny")


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


def write_pitches(path: Path) -> Path:
    """12 short sounds of low and high pitch in noise, three a group; one has no label, one is no sound."""
    rng, files = np.random.default_rng(0), {}
    for number in range(12):
        time = np.arange(12_800) / 16_000
        tone = 0.3 * np.sin(2 * np.pi * (300, 2500)[number % 2] * time) + rng.normal(0, 0.05, len(time))
        file = io.BytesIO()
        soundfile.write(file, tone.astype(np.float32), 16_000, format="WAV", subtype="PCM_16")
        files[f"{number:02d}.wav"] = file.getvalue()
        files[f"{number:02d}.cls"] = b"low\n" if number % 2 == 0 else b"high\n"
        files[f"{number:02d}.json"] = json.dumps({"room": number // 3, "tags": ["all", number % 2]}).encode()
    files |= {"50.wav": files["00.wav"], "51.wav": b"RIFF, but no sound", "51.cls": b"low", "51.json": b'{"room": 9}'}
    return write_tar(path, files)
