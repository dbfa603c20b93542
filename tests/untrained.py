"""Model folders with random weights, for tests that need a model and not its knowledge."""

from __future__ import annotations

from pathlib import Path

import torch

from bridle.config import Recipe
from bridle.modalities import build_modality
from bridle.model_folder import patch_shape, save_model
from bridle.modeling.bridle import Components


def save_untrained(folder: Path, recipe: Recipe, name: str, seed: int = 0) -> Path:
    """The recipe's model, its codebooks initialised on random latents; another seed gives other codes."""
    modality = build_modality(recipe.modality, recipe.clip)
    components = Components(recipe.model, patch_shape(modality))
    tokenizer = components.tokenizer(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer.quantizer.initialize(torch.randn(2048, recipe.model.quantizer.dim, generator=generator), generator)
    save_model(
        folder, name=name, modality=recipe.modality, clip=modality.settings.model_dump(mode="json"),
        encoder_settings=recipe.model.encoder, quantizer_settings=recipe.model.quantizer,
        encoder=components.encoder(seed).state_dict(), tokenizer=tokenizer.state_dict(), learned=True, trained={},
    )  # fmt: skip
    return folder
