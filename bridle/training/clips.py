"""From a sample's bytes to what a phase trains on; runs in the loader's processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bridle.config import MaskSettings, RunSettings
from bridle.modalities import build_modality, modality_class
from bridle.modalities.clip import Modality
from bridle.modeling.masking import draw_mask, hidden_count, split_positions


@dataclass(frozen=True)
class MakeClip:
    """Bytes to tensors: ``values`` (of a raw modality, see `Delivery`), ``padding`` (int64, positions behind the
    content), ``extent`` (int64) where the values have one, and with a mask ``visible`` and ``masked``, int64 positions
    (see `split_positions`).

    augment: a random crop with augmentation (training), or the first window as it is (evaluation).
    """

    modality: Modality
    mask: MaskSettings | None
    augment: bool

    def __call__(self, data: bytes, rng: np.random.Generator) -> dict[str, Tensor]:
        clip = self.modality.training_clip(data, rng) if self.augment else next(iter(self.modality.windows(data)))
        grid = tuple(clip.grid.values())
        tensors = {"values": clip.values, "padding": torch.tensor(math.prod(grid) - clip.positions)}
        if clip.extent:
            tensors["extent"] = torch.tensor(clip.extent)
        if self.mask is not None:
            mask = draw_mask(self.mask, grid, rng, clip.valid)
            tensors["visible"], tensors["masked"] = split_positions(mask, clip.positions, hidden_count(self.mask, grid))
        return tensors


def raw_modality(recipe: RunSettings) -> Modality:
    """What training has from its loaders: raw clips where they are smaller, or where the recipe asks for them."""
    raw = modality_class(recipe.modality).raw_is_small or recipe.data.features_on_device
    return build_modality(recipe.modality, recipe.clip, raw=raw)


@dataclass(frozen=True)
class Delivery:
    """A loader's batch to the device, its clips finished there: ``values`` are then float32 ``[B, C, *S]``."""

    modality: Modality
    device: torch.device

    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        moved = to_device(tensors, self.device)
        if self.modality.raw:
            moved["values"] = self.modality.finish(moved["values"], moved.pop("extent", None))
        return moved


def to_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Moves a batch; ``padding`` only where a clip has some, which the host knows without asking the device."""
    padded = "padding" in tensors and bool(tensors["padding"].any())
    wanted = {name: tensor for name, tensor in tensors.items() if name != "padding" or padded}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in wanted.items()}
