"""Tiny models with random weights, for tests that need a model and not its knowledge, and real files for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from untrained import save_untrained

from bridle.classifier import new_config, save_classifier
from bridle.config import load_recipe
from bridle.data.shards import open_shards
from bridle.modalities import build_modality
from bridle.model_folder import patch_shape
from bridle.modeling.classifier import build_classifier

CLIPS = {
    "audio": {"seconds": 1.0},
    "image": {"size": [64, 64]},
    "video": {"size": [64, 64], "frames": 4},
}


def write_model(
    folder: Path, modality: str = "audio", *, name: str | None = None, seed: int = 0, settings: Sequence[str] = ()
) -> Path:
    """Writes a model folder; another seed gives other codes. settings: of the recipe, as at the command line."""
    recipe = load_recipe("audio-mini", settings).model_copy(update={"modality": modality, "clip": CLIPS[modality]})
    return save_untrained(folder, recipe, name or f"{modality}-test", seed)


CLASSES = [f"kind {i}" for i in range(7)]


def write_classifier(folder: Path, modality: str = "audio", *, name: str = "kinds") -> Path:
    """Writes a classifier folder with `CLASSES`, random weights and a head that tells clips apart."""
    settings, built = load_recipe("audio-mini").model.encoder, build_modality(modality, CLIPS[modality])
    module = build_classifier(settings, patch_shape(built), len(CLASSES), seed=0)
    module.head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    config = new_config(
        name=name, modality=modality, clip=CLIPS[modality], encoder=settings, classes=CLASSES, loss="ce", trained={}
    )
    save_classifier(folder, config, module.state_dict(), None)
    return folder


def sample_files(name: str, extensions: tuple[str, ...], count: int) -> list[bytes]:
    """Real files from the shipped sample."""
    shards = open_shards([f"builtin:{name}"], extensions=extensions)
    step = max(1, len(shards) // count)
    return [shards.read(i).data for i in range(0, len(shards), step)][:count]
