"""The main encoder, a vision transformer over the patches it is shown."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bridle.config import EncoderSettings
from bridle.modeling.blocks import TransformerBlocks, start_weights
from bridle.modeling.patches import PatchShape, content_mask, gather_positions
from bridle.modeling.positions import Positions


class Encoder(nn.Module):
    """E of the paper; the tokenizer's encoder is another instance with its own weights.

    Patches, linear embedding, fixed positions of the grid at hand, transformer blocks, a final norm.
    """

    def __init__(self, settings: EncoderSettings, patch: PatchShape) -> None:
        super().__init__()
        self.patch = patch
        self.width = settings.width
        self.embed = nn.Linear(patch.numel, settings.width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, settings.width)) if settings.class_token else None
        self.blocks = TransformerBlocks(settings.width, settings.depth, settings.heads)
        self.norm = nn.LayerNorm(settings.width)
        self.positions = Positions(settings.width)
        start_weights(self, [] if self.class_token is None else [self.class_token])

    def forward(
        self,
        values: Tensor,
        visible: Tensor | None = None,
        valid: Tensor | None = None,
        branches: Tensor | None = None,
    ) -> Tensor:
        """Embeds a clip, or the part of it that is visible.

        values: ``[B, C, *S]``; visible: int64 ``[B, n]``, positions to look at, or none for all N; valid: int64
        ``[B]``, positions of each clip that are content (see `content_mask`): padding behind them is not attended to,
        and what comes out for it means nothing. None: all of them. branches: see `TransformerBlocks.forward`.
        Returns ``[B, n, width]``, after the final norm, with the class token in front where there is one.
        """
        grid = self.patch.grid(values)
        patches = self.patch.cut(values)
        positions = self.positions(grid, self.norm.weight)  # whose dtype is that of the residual stream
        if visible is None:
            tokens = self.embed(patches.to(positions)) + positions
        else:
            tokens = self.embed(gather_positions(patches, visible).to(positions)) + positions[visible]
        content = None if valid is None else content_mask(valid, len(positions) if visible is None else visible)
        if self.class_token is not None:
            content = None if content is None else functional.pad(content, (1, 0), value=True)
            tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1).to(tokens), tokens], dim=1)
        embedded: Tensor = self.norm(self.blocks(tokens, grid, content, branches))
        return embedded

    def embeddings(self, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """Patch embeddings of the whole clip, ``[B, N, width]``, no class token: what the tokenizer learns from.

        valid: as in `forward`.
        """
        tokens: Tensor = self(values, valid=valid)
        return tokens if self.class_token is None else tokens[:, 1:]
