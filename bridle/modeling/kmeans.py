"""k-means for the codebooks' start: deterministic given the points, their order and the generator."""

from __future__ import annotations

import torch
from torch import Tensor

from bridle.modeling.lookup import Codebook, cluster_sums, nearest

_CHUNK = 8192


def random_rows(count: int, size: int, generator: torch.Generator) -> Tensor:
    """``size`` indices below ``count``, int64 on the generator's device; distinct while there are enough."""
    rounds = max(1, -(-size // count))
    drawn = [torch.randperm(count, generator=generator, device=generator.device) for _ in range(rounds)]
    return torch.cat(drawn)[:size]


@torch.no_grad()
def kmeans(points: Tensor, size: int, steps: int, generator: torch.Generator) -> Tensor:
    """``size`` centres, float32 ``[size, d]``, of ``points``, float32 ``[S, d]``, S >= 1, after ``steps`` Lloyd steps.

    Starts from distinct random points. A cluster that loses all its points restarts at one of the points farthest
    from their centres. With fewer distinct points than centres some centres coincide: the caller's to resolve.
    Memory beyond the points is bounded. Every draw comes from ``generator``, so equal points in equal order give equal
    centres on every rank.
    """
    centres = points[random_rows(len(points), size, generator).to(points.device)]
    for _ in range(steps):
        codes = nearest(points, Codebook.of(centres))
        counts, sums = cluster_sums(points, codes, size)
        empty = (counts == 0).nonzero().squeeze(1)[: len(points)]
        if len(empty):
            far = _distances(points, centres, codes).sort(descending=True, stable=True).indices
            sums[empty], counts[empty] = points[far[: len(empty)]], 1.0
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
    return centres


def _distances(points: Tensor, centres: Tensor, codes: Tensor) -> Tensor:
    """Squared distance of each point to its centre, float32 ``[S]``."""
    parts = zip(points.split(_CHUNK), codes.split(_CHUNK), strict=True)
    return torch.cat([(part - centres[part_codes]).square().sum(1) for part, part_codes in parts])
