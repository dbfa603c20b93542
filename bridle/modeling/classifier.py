"""An encoder with a head that tells classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bridle.config import EncoderSettings
from bridle.modeling.bridle import seeded
from bridle.modeling.encoder import Encoder
from bridle.modeling.patches import PatchShape, clip_weights, content_mask

HEAD_DEVIATION = 2e-5
"""Of the head's first weights (MAE's): every class begins at the same probability."""


class ClassifierModule(nn.Module):
    """E, the mean of its patch embeddings over the content, a norm, a linear layer (global pooling as in MAE)."""

    def __init__(self, settings: EncoderSettings, patch: PatchShape, classes: int) -> None:
        super().__init__()
        self.encoder = Encoder(settings, patch)
        self.norm = nn.LayerNorm(settings.width)
        self.head = nn.Linear(settings.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_DEVIATION)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        values: Tensor,
        visible: Tensor | None = None,
        valid: Tensor | None = None,
        branches: Tensor | None = None,
    ) -> Tensor:
        """Logits, float32 ``[B, C]``; values, visible, valid: see `Encoder.forward`; branches: see `drop_factors`."""
        tokens = self.encoder(values, visible, valid, branches)
        if self.encoder.class_token is not None:
            tokens = tokens[:, 1:]
        if valid is None:
            pooled = tokens.mean(1)
        else:
            content = content_mask(valid, tokens.shape[1] if visible is None else visible)
            weights = clip_weights(content) * len(content)
            pooled = (tokens * weights.to(tokens).unsqueeze(-1)).sum(1)
        logits: Tensor = self.head(self.norm(pooled)).float()
        return logits


def build_classifier(settings: EncoderSettings, patch: PatchShape, classes: int, seed: int) -> ClassifierModule:
    """A classifier whose weights depend on the seed alone."""
    with seeded(seed):
        return ClassifierModule(settings, patch, classes)


def classification_loss(logits: Tensor, targets: Tensor, loss: str, smoothing: float = 0.0) -> Tensor:
    """Mean over clips (`ce`), or over clips and classes (`bce`): a float32 scalar.

    logits: float32 ``[B, C]``; targets: float32 ``[B, C]``, what each class has of the clip: 0 or 1, or between where
    clips are mixed. smoothing s: each becomes (1 - s) target + s / C.
    """
    classes = logits.shape[1]
    if smoothing:
        targets = targets * (1 - smoothing) + smoothing / classes
    if loss == "bce":
        return functional.binary_cross_entropy_with_logits(logits, targets)
    return -(targets * logits.log_softmax(dim=1)).sum(1).mean()


def probabilities(logits: Tensor, loss: str) -> Tensor:
    """What `classification_loss` makes of logits ``[..., C]``: of each class by itself (`bce`), or shares (`ce`)."""
    return logits.sigmoid() if loss == "bce" else logits.softmax(dim=-1)


def drop_factors(draws: Tensor, rate: float) -> Tensor:
    """Stochastic depth (Huang et al. 2016) as factors of each block's two branches, so that who draws decides.

    draws: float32 ``[B, depth, 2]``, uniform in [0, 1); block i of depth drops each branch with probability
    rate * i / (depth - 1), and what stays is scaled up to keep its mean. Returns float32 ``[B, depth, 2]``.
    """
    keep = 1 - torch.linspace(0, rate, draws.shape[1], device=draws.device)[:, None]
    return (draws < keep).float() / keep


def layer_rate(name: str, depth: int, decay: float) -> float:
    """The share of the learning rate of a parameter of `ClassifierModule`, by its name: decay to the number of layers
    behind it. Embedding and class token are layer 0, block i is layer i + 1; norms behind the blocks and the head have
    all of it (as BEiT's and MAE's fine-tuning).
    """
    if name.startswith("encoder.blocks."):
        layer = int(name.split(".")[3]) + 1
    elif name.startswith(("encoder.embed", "encoder.class_token")):
        layer = 0
    else:
        layer = depth + 1
    return float(decay ** (depth + 1 - layer))
