"""A pipeline by itself, over a few slots of clips."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bridle.model import BridleModel
from bridle.processes.messages import Forward, Result, array_of
from serving.workers.pipeline import Pipeline

SLOTS, MAX_BATCH = 6, 4


class Bench:
    """A pipeline over a few slots of clips."""

    def __init__(self, model: BridleModel) -> None:
        self.model = model
        self.shape = [
            1,
            *(count * step for count, step in zip(model.modality.grid.values(), model.modality.patch, strict=True)),
        ]
        self.positions = model.encoder.patch.count(torch.empty(1, *self.shape))
        numbers = max(int(np.prod(self.shape)), self.positions * model.encoder.width)
        self.slots = torch.randn(SLOTS, numbers, generator=torch.Generator().manual_seed(0))
        self.clips = self.slots[:, : int(np.prod(self.shape))].clone().view(-1, *self.shape)
        self.pipeline = Pipeline(model, self.slots, self.shape, MAX_BATCH)

    def forward(self, operation: Any, slots: list[int], padding: int = 0) -> Forward:
        return Forward(operation, 1, slots, [self.positions - padding] * len(slots))

    def begin(self, operation: Any, slots: list[int], padding: int = 0) -> None:
        self.pipeline.begin(self.forward(operation, slots, padding), bytearray())

    def codes(self) -> list[list[int]]:
        answer, payload = self.pipeline.finish()
        assert isinstance(answer, Result)
        found: list[list[int]] = array_of(answer, bytes(payload)).tolist()
        return found
