"""A small model folder, and a run folder that the real training program made: once per session."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluation_inputs import RECIPE, tone, write_random_model
from launching import pretrain


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
    pretrain(folder, "--recipe", str(recipe))
    return folder


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """2.5 s as a wav file: three windows of a second's model."""
    path = tmp_path / "sound.wav"
    path.write_bytes(tone(2.5))
    return path
