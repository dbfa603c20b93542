"""A small model folder, and a run folder that the real training program made: once per session."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from evaluation_inputs import tone

from bridle.config import recipe_from_mapping
from bridle.modalities import build_modality
from bridle.model_folder import patch_shape, save_model
from bridle.modeling.bridle import Components

ROOT = Path(__file__).parents[2]
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
    modality = build_modality(recipe.modality, recipe.clip)
    components = Components(recipe.model, patch_shape(modality))
    tokenizer = components.tokenizer(1)
    generator = torch.Generator().manual_seed(0)
    tokenizer.quantizer.initialize(torch.randn(2048, recipe.model.quantizer.dim, generator=generator), generator)
    save_model(
        folder, name="tiny", modality=recipe.modality, clip=modality.settings.model_dump(mode="json"),
        encoder_settings=recipe.model.encoder, quantizer_settings=recipe.model.quantizer,
        encoder=components.encoder(0).state_dict(), tokenizer=tokenizer.state_dict(), learned=True, trained={},
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained audio model of clips of a second: 4 codebooks of 64 codes."""
    return write_random_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished audio run of a few steps per phase. Not to be changed: copy it."""
    recipe = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    recipe.write_text(RECIPE)
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    command = [sys.executable, "bridle/pretrain.py", "--deepspeed_config", "ds_configs/zero2.json"]
    command += ["--recipe", str(recipe), "--run", str(folder)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """2.5 s as a wav file: three windows of a second's model."""
    path = tmp_path / "sound.wav"
    path.write_bytes(tone(2.5))
    return path
