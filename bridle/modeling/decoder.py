"""The main decoder: from what the encoder saw to the codes of what it did not see."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bridle.config import DecoderSettings, EncoderSettings, QuantizerSettings
from bridle.modeling.blocks import SwinBlocks, TransformerBlocks, start_weights
from bridle.modeling.patches import content_mask, gather_positions
from bridle.modeling.positions import Positions


class Decoder(nn.Module):
    """D of the paper: mask tokens fill the grid, blocks run over all of it, logits are read at the masked patches."""

    def __init__(self, settings: DecoderSettings, encoder: EncoderSettings, quantizer: QuantizerSettings) -> None:
        super().__init__()
        self.width = settings.width
        self.codebooks, self.codebook_size = quantizer.codebooks, quantizer.codebook_size
        self.class_token = encoder.class_token
        self.embed = nn.Linear(encoder.width, settings.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, settings.width))
        self.blocks: SwinBlocks | TransformerBlocks
        if settings.kind == "swin":
            self.blocks = SwinBlocks(settings, settings.window)
        else:
            self.blocks = TransformerBlocks(settings.width, settings.depth, settings.heads)
        self.norm = nn.LayerNorm(settings.width)
        self.positions = Positions(settings.width)
        self.head = nn.Linear(settings.width, self.codebooks * self.codebook_size)
        start_weights(self, [self.mask_token])

    def forward(
        self, tokens: Tensor, visible: Tensor, masked: Tensor, grid: tuple[int, ...], valid: Tensor | None = None
    ) -> Tensor:
        """Predicts the codes of masked patches.

        tokens: the encoder's output for the visible patches (with its class token, if it has one, which is dropped);
        visible, masked: int64 ``[B, n]`` and ``[B, k]``, together all N positions of the grid; valid: as the
        encoder's.
        Returns logits ``[B, k, M, K]``.
        """
        if self.class_token:
            tokens = tokens[:, 1:]
        tokens = self.embed(tokens)
        batch, hidden = masked.shape
        filled = torch.cat([tokens, self.mask_token.to(tokens).expand(batch, hidden, -1)], dim=1)
        restore = torch.argsort(torch.cat([visible, masked], dim=1), dim=1)
        filled = gather_positions(filled, restore) + self.positions(grid, tokens)
        content = None if valid is None else content_mask(valid, filled.shape[1])
        seen = gather_positions(self.blocks(filled, grid, content), masked)
        logits: Tensor = self.head(self.norm(seen))
        return logits.view(*masked.shape, self.codebooks, self.codebook_size)
