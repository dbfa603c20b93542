"""A tiny model with random weights, for tests that need a model and not its knowledge."""

from __future__ import annotations

from pathlib import Path

import torch

from bridle.config import load_recipe
from bridle.modalities import build_modality
from bridle.model_folder import patch_shape, save_model
from bridle.modeling.bridle import Components

CLIPS = {
    "audio": {"seconds": 1.0},
    "image": {"size": [64, 64]},
    "video": {"size": [64, 64], "frames": 4},
}


def write_model(folder: Path, modality: str = "audio", *, name: str | None = None, seed: int = 0) -> Path:
    """Writes a model folder; another seed gives other codes."""
    recipe = load_recipe("audio-mini")
    clip = CLIPS[modality]
    shape = patch_shape(build_modality(modality, clip))
    components = Components(recipe.model, shape)
    tokenizer = components.tokenizer(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer.quantizer.initialize(torch.randn(2048, recipe.model.quantizer.dim, generator=generator), generator)
    save_model(
        folder,
        name=name or f"{modality}-test",
        modality=modality,
        clip=clip,
        encoder_settings=recipe.model.encoder,
        quantizer_settings=recipe.model.quantizer,
        encoder=components.encoder(seed).state_dict(),
        tokenizer=tokenizer.state_dict(),
        learned=True,
        trained={"steps": 0},
    )
    return folder
