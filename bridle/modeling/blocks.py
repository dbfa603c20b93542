"""Transformer blocks, and how their weights start."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from bridle.config import TransformerSettings


class TransformerBlocks(nn.Module):
    """Pre-norm blocks with full attention (timm's, on scaled_dot_product_attention): ``[B, N, D]`` to ``[B, N, D]``."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in range(depth))

    def forward(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        """`grid` is not needed here; it is what makes these blocks and `SwinBlocks` interchangeable."""
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class SwinBlocks(nn.Module):
    """Swin blocks over a 2-D grid, every other one shifted by half a window: ``[B, N, D]`` to ``[B, N, D]``.

    Any grid works: timm computes the mask of the shifted windows for the grid at hand and pads what the window does not
    divide. A grid smaller than the window in one axis is padded to it.
    """

    def __init__(self, settings: TransformerSettings, window: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(
                settings.width,
                input_resolution=(window, window),  # unused: always_partition and dynamic_mask take the grid at hand
                num_heads=settings.heads,
                window_size=window,
                shift_size=window // 2 if i % 2 else 0,
                always_partition=True,
                dynamic_mask=True,
            )
            for i in range(settings.depth)
        )

    def forward(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Raises ValueError when the grid has not two axes."""
        if len(grid) != 2:
            raise ValueError(f"decoder.kind swin needs a grid of two axes; this one is {grid}: use kind transformer")
        batch, count, width = tokens.shape
        tokens = tokens.reshape(batch, *grid, width)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.reshape(batch, count, width)


def start_weights(module: nn.Module, tokens: Iterable[nn.Parameter] = ()) -> None:
    """Xavier-uniform matrices and zero biases (as MAE), learned tokens normal with deviation 0.02."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for token in tokens:
        with torch.no_grad():
            token.normal_(std=0.02)
