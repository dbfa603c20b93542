"""k-means for the codebooks' start: deterministic given the points, their order and the generator."""

from __future__ import annotations

import torch
from torch import Tensor

from bridle.modeling.lookup import Codebook, cluster_sums, nearest_codes


def random_rows(count: int, size: int, generator: torch.Generator) -> Tensor:
    """``size`` indices below ``count``, int64 on the generator's device; distinct while there are enough."""
    rounds = max(1, -(-size // count))
    drawn = [torch.randperm(count, generator=generator, device=generator.device) for _ in range(rounds)]
    return torch.cat(drawn)[:size]


@torch.no_grad()
def kmeans(points: Tensor, size: int, steps: int, generator: torch.Generator) -> Tensor:
    """``size`` centres, float32 ``[size, d]``, of ``points``, float32 ``[S, d]``, S >= 1, after ``steps`` Lloyd steps.

    Starts from distinct random points. A cluster without points keeps its centre: the quantizer's reset of unused
    codes replaces it, which on real recordings used more of the codes than restarts at far points or a k-means++
    start (docs/quantizer.md). With fewer distinct points than centres some coincide, also the quantizer's to resolve.
    Memory beyond the points is bounded. Every draw comes from ``generator``, so equal points in equal order give equal
    centres on every rank.
    """
    centres = points[random_rows(len(points), size, generator).to(points.device)]
    for _ in range(steps):
        counts, sums = cluster_sums(points, nearest_codes(points, Codebook.of(centres)), size)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
    return centres
