"""From a sample's bytes to what a phase trains on; runs in the loader's processes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bridle.config import MaskSettings, RunSettings
from bridle.data.stream import MicroBatch
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


class Delivered:
    """Micro-batches with their tensors on the device. `fetch` takes the next one early, so that its copy goes on beside
    what the device computes: on CUDA from pinned memory, on a stream of its own.
    """

    def __init__(self, batches: Iterator[MicroBatch], deliver: Delivery) -> None:
        self._batches, self._deliver = batches, deliver
        self._ahead: tuple[MicroBatch, dict[str, Tensor]] | None = None
        self._copies = torch.cuda.Stream(deliver.device) if deliver.device.type == "cuda" else None

    def fetch(self) -> None:
        """Takes the next micro-batch, if there is one and it was not taken; waits for the loaders, as `next` does."""
        if self._ahead is None and (batch := next(self._batches, None)) is not None:
            with torch.cuda.stream(self._copies) if self._copies else contextlib.nullcontext():
                self._ahead = batch, self._deliver(batch.tensors)

    def __iter__(self) -> Delivered:
        return self

    def __next__(self) -> tuple[MicroBatch, dict[str, Tensor]]:
        self.fetch()
        if self._ahead is None:
            raise StopIteration
        found, self._ahead = self._ahead, None
        if self._copies:
            here = torch.cuda.current_stream(self._deliver.device)
            here.wait_stream(self._copies)
            for tensor in found[1].values():
                tensor.record_stream(here)  # else its memory could be given away while it is still read
        return found


def to_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Moves a batch; ``padding`` only where a clip has some, which the host knows without asking the device.

    Only from pinned memory does a copy to CUDA not make the host wait.
    """
    padded = "padding" in tensors and bool(tensors["padding"].any())
    wanted = {name: tensor for name, tensor in tensors.items() if name != "padding" or padded}
    if device.type == "cuda":
        wanted = {name: tensor.pin_memory() for name, tensor in wanted.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in wanted.items()}
