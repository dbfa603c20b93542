"""From a sample's bytes to what a phase trains on; runs in the loader's processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bridle.config import MaskSettings
from bridle.modalities.clip import Modality
from bridle.modeling.masking import draw_mask, hidden_count, split_positions


@dataclass(frozen=True)
class MakeClip:
    """Bytes to tensors: ``values`` ``[C, *S]``, ``padding`` (int64, positions behind the content), and with a mask
    ``visible`` and ``masked``, int64 positions (see `split_positions`).

    augment: a random crop with augmentation (training), or the first window as it is (evaluation).
    """

    modality: Modality
    mask: MaskSettings | None
    augment: bool

    def __call__(self, data: bytes, rng: np.random.Generator) -> dict[str, Tensor]:
        clip = self.modality.training_clip(data, rng) if self.augment else next(iter(self.modality.windows(data)))
        grid = tuple(clip.grid.values())
        tensors = {"values": clip.values, "padding": torch.tensor(math.prod(grid) - clip.positions)}
        if self.mask is not None:
            mask = draw_mask(self.mask, grid, rng, clip.valid)
            tensors["visible"], tensors["masked"] = split_positions(mask, clip.positions, hidden_count(self.mask, grid))
        return tensors


def to_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Moves a batch; ``padding`` only where a clip has some, which the host knows without asking the device."""
    padded = "padding" in tensors and bool(tensors["padding"].any())
    wanted = {name: tensor for name, tensor in tensors.items() if name != "padding" or padded}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in wanted.items()}
