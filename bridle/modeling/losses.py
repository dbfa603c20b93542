"""The losses of both phases."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def masked_code_loss(logits: Tensor, codes: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Eq. 4: cross-entropy of the codes of masked patches, averaged over patches, per codebook.

    logits: ``[B, k, M, K]``; codes: int64 ``[B, k, M]``, or ``[B, k, M, S]`` for S soft codes a stage, nearest first,
    which share the target evenly; weights: float32 ``[B, k]`` of the average, which sum to 1 (see
    `clip_weights`); none: all alike.
    Returns float32 ``[M]`` losses (their sum is Eq. 4's loss) and float32 ``[M]`` accuracies (of the nearest code),
    detached.
    """
    flat = logits.float().flatten(0, 1)
    targets = codes.flatten(0, 1)
    if codes.ndim == logits.ndim:
        losses = -functional.log_softmax(flat, dim=-1).gather(-1, targets).mean(-1)
        targets = targets[..., 0]
    else:
        # Rows of K, and not K as an inner axis: a third of the time on a CPU, and torch's fused kernel on a GPU.
        losses = functional.cross_entropy(flat.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    hits = (flat.detach().argmax(-1) == targets).float()
    if weights is None:
        return losses.mean(0), hits.mean(0)
    weights = weights.flatten()
    return weights @ losses, weights @ hits


def cosine_similarity(estimate: Tensor, embeddings: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over positions of the cosine between ``[B, N, D]`` and ``[B, N, D]``, float32 scalar.

    weights: float32 ``[B, N]`` of the mean, which sum to 1; none: all alike. Eq. 6 as printed is a ratio of sums; the
    cosine is taken per position here, as BEATs does.
    """
    with torch.autocast(estimate.device.type, enabled=False):
        cosines = functional.cosine_similarity(estimate.float(), embeddings.float(), dim=-1)
        return cosines.mean() if weights is None else (cosines * weights).sum()
