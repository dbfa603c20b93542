"""From a sample's bytes to what a phase trains on; runs in the loader's processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bridle.config import MaskSettings
from bridle.modalities.clip import Modality
from bridle.modeling.masking import draw_mask


@dataclass(frozen=True)
class MakeClip:
    """Bytes to tensors: ``values`` ``[C, *S]``, and with a mask ``visible`` and ``masked``, int64 positions.

    augment: a random crop with augmentation (training), or the first window as it is (evaluation).
    """

    modality: Modality
    mask: MaskSettings | None
    augment: bool

    def __call__(self, data: bytes, rng: np.random.Generator) -> dict[str, Tensor]:
        clip = self.modality.training_clip(data, rng) if self.augment else next(iter(self.modality.windows(data)))
        tensors = {"values": clip.values}
        if self.mask is not None:
            hidden = draw_mask(self.mask, tuple(clip.grid.values()), rng)
            tensors["masked"] = torch.nonzero(hidden).flatten()
            tensors["visible"] = torch.nonzero(~hidden).flatten()
        return tensors
