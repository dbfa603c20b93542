"""A tiny model with random weights, for tests that need a model and not its knowledge."""

from __future__ import annotations

from pathlib import Path

from untrained import save_untrained

from bridle.config import load_recipe

CLIPS = {
    "audio": {"seconds": 1.0},
    "image": {"size": [64, 64]},
    "video": {"size": [64, 64], "frames": 4},
}


def write_model(folder: Path, modality: str = "audio", *, name: str | None = None, seed: int = 0) -> Path:
    """Writes a model folder; another seed gives other codes."""
    recipe = load_recipe("audio-mini").model_copy(update={"modality": modality, "clip": CLIPS[modality]})
    return save_untrained(folder, recipe, name or f"{modality}-test", seed)
