"""The scale of the embeddings that the tokenizer learns from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bridle.modeling.kept_precision import KeptPrecision


class TargetScale(KeptPrecision):
    """(e - mu) / sigma per feature: embeddings share a large part that says nothing of the content, and without it the
    cosine of Eq. 6 is about what differs.

    Buffers ``mean`` and ``deviation``, float32 ``[D]``. With `follows`, what passes through in training is gathered for
    `update`: for embeddings of an encoder that is still learning.
    """

    mean: Tensor
    deviation: Tensor
    statistics: Tensor

    def __init__(self, width: int, follows: bool = False) -> None:
        super().__init__()
        self.follows = follows
        self.register_buffer("statistics", torch.zeros(1 + 2 * width, dtype=torch.float64), persistent=False)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    @torch.no_grad()
    def fit(self, sums: Tensor) -> None:
        """Takes mean and deviation over: sums, float64 ``[1 + 2 D]``, of ones, features and their squares."""
        mean, deviation = _moments(sums)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)

    @torch.no_grad()
    def update(self, all_reduce: Callable[[Tensor], Any] | None, decay: float) -> None:
        """Moves mean and deviation towards those gathered since the last update; decay: the share that stays."""
        if all_reduce is not None:
            all_reduce(self.statistics)
        mean, deviation = _moments(self.statistics)
        self.mean.lerp_(mean.float(), 1 - decay)
        self.deviation.lerp_(deviation.float(), 1 - decay)
        self.statistics.zero_()

    def forward(self, embeddings: Tensor, content: Tensor | None = None) -> Tensor:
        """``[B, N, D]`` to float32 ``[B, N, D]``; content: bool ``[B, N]``, none: all."""
        if self.follows and self.training:
            self.statistics += target_sums(embeddings.detach(), content)
        return (embeddings.float() - self.mean) / self.deviation


def _moments(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation, float64 ``[D]``."""
    features, squares = (sums[1:] / sums[0].clamp(min=1)).chunk(2)
    return features, (squares - features.square()).clamp(min=0).sqrt().clamp(min=1e-6)


def target_sums(embeddings: Tensor, content: Tensor | None) -> Tensor:
    """What `TargetScale.fit` needs of ``[B, N, D]``: float64 ``[1 + 2 D]``; content: bool ``[B, N]``, none: all."""
    flat = embeddings.double().flatten(0, 1)
    counted = flat.new_ones(len(flat)) if content is None else content.flatten().double()
    return torch.cat([counted.sum()[None], counted @ flat, counted @ flat.square()])
