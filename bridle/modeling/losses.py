"""The losses of both phases."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def masked_code_loss(logits: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 4: cross-entropy of the codes of masked patches, averaged over patches, per codebook.

    logits: ``[B, k, M, K]``; codes: int64 ``[B, k, M]``.
    Returns float32 ``[M]`` losses (their sum is Eq. 4's loss) and float32 ``[M]`` accuracies, detached.
    """
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1).transpose(1, 2), codes.flatten(0, 1), reduction="none"
    )
    hits = logits.detach().argmax(-1) == codes
    return losses.mean(0), hits.flatten(0, 1).float().mean(0)


def cosine_similarity(estimate: Tensor, embeddings: Tensor) -> Tensor:
    """Mean over positions of the cosine between ``[B, N, D]`` and ``[B, N, D]``, float32 scalar.

    Eq. 6 as printed is a ratio of sums; the cosine is taken per position here, as BEATs does.
    """
    with torch.autocast(estimate.device.type, enabled=False):
        return functional.cosine_similarity(estimate.float(), embeddings.float(), dim=-1).mean()
