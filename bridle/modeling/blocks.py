"""Transformer blocks, and how their weights start."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import Mlp
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional

from bridle.config import TransformerSettings


class TransformerBlocks(nn.Module):
    """Pre-norm blocks with full attention (timm's, on scaled_dot_product_attention): ``[B, N, D]`` to ``[B, N, D]``."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in range(depth))

    def forward(
        self,
        tokens: Tensor,
        grid: tuple[int, ...],
        content: Tensor | None = None,
        branches: Tensor | None = None,
    ) -> Tensor:
        """Without `content`, bool ``[B, N]``, all tokens are attended to, and attention stays fused without a mask.

        `grid` is not needed here; it is what makes these blocks and the others interchangeable. branches: float32
        ``[B, depth, 2]``, factors of each block's attention and perceptron; none: 1.
        """
        mask = None if content is None else content[:, None, None, :]
        for i, block in enumerate(self.blocks):
            if branches is None:
                tokens = block(tokens, attn_mask=mask)
            else:
                tokens = _weighted(block, tokens, mask, branches[:, i].to(tokens))
        return tokens


def _weighted(block: Any, tokens: Tensor, mask: Tensor | None, factors: Tensor) -> Tensor:
    """timm's block, each branch times its factor; factors: ``[B, 2]``."""
    attention, perceptron = factors[:, :, None, None].unbind(1)
    tokens = tokens + attention * block.ls1(block.attn(block.norm1(tokens), attn_mask=mask))
    changed: Tensor = tokens + perceptron * block.ls2(block.mlp(block.norm2(tokens)))
    return changed


class PositionwiseBlocks(nn.Module):
    """Residual perceptrons, each position for itself: ``[B, N, D]`` to ``[B, N, D]``."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), Mlp(width, 4 * width)) for _ in range(depth))

    def forward(self, tokens: Tensor, grid: tuple[int, ...], content: Tensor | None = None) -> Tensor:
        """See `TransformerBlocks.forward`; no position sees another one, so padding needs no care."""
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return tokens


class SwinBlocks(nn.Module):
    """Swin blocks over a 2-D grid, every other one shifted by half a window: ``[B, N, D]`` to ``[B, N, D]``.

    Any grid works: timm computes the mask of the shifted windows for the grid at hand and pads what the window does not
    divide. A grid smaller than the window in one axis is padded to it.
    """

    def __init__(self, settings: TransformerSettings, window: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _SwinBlock(
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

    def forward(self, tokens: Tensor, grid: tuple[int, ...], content: Tensor | None = None) -> Tensor:
        """See `TransformerBlocks.forward`. Raises ValueError when the grid has not two axes."""
        if len(grid) != 2:
            raise ValueError(f"decoder.kind swin needs a grid of two axes; this one is {grid}: use kind transformer")
        batch, count, width = tokens.shape
        tokens = tokens.reshape(batch, *grid, width)
        padding = None if content is None else ~content.reshape(batch, *grid)
        for block in self.blocks:
            tokens = block(tokens, padding)
        return tokens.reshape(batch, count, width)


class _SwinBlock(SwinTransformerBlock):
    """timm's block, which with `padding`, bool ``[B, H, W]``, attends to nothing there."""

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        if padding is None:
            attended: Tensor = self._attn(self.norm1(x))
        else:
            attended = self._attend(self.norm1(x), padding)
        x = x + self.drop_path1(attended)
        changed: Tensor = x + self.drop_path2(self.mlp(self.norm2(x)))
        return changed

    def _attend(self, x: Tensor, padding: Tensor) -> Tensor:
        """timm's `_attn` with a mask of its own for every clip's windows."""
        _, height, width, channels = x.shape
        x, padding = self._shifted(x), self._shifted(padding.unsqueeze(-1))
        down, across = (-side % step for side, step in zip((height, width), self.window_size, strict=True))
        x = functional.pad(x, (0, 0, 0, across, 0, down))
        padding = functional.pad(padding, (0, 0, 0, across, 0, down))
        padded_height, padded_width = x.shape[1:3]
        windows = window_partition(x, self.window_size).view(-1, self.window_area, channels)
        hidden = window_partition(padding, self.window_size).view(-1, 1, self.window_area)
        mask = torch.zeros(hidden.shape, dtype=x.dtype, device=x.device)
        mask = mask.masked_fill(hidden, torch.finfo(x.dtype).min / 2).expand(-1, self.window_area, -1)
        shifted = self.get_attn_mask(x)
        if shifted is not None:
            mask = mask + shifted.repeat(len(x), 1, 1)
        windows = self.attn(windows, mask=mask).view(-1, *self.window_size, channels)
        x = window_reverse(windows, self.window_size, padded_height, padded_width)[:, :height, :width].contiguous()
        return self._shifted(x, back=True)

    def _shifted(self, x: Tensor, back: bool = False) -> Tensor:
        if not any(self.shift_size):
            return x
        return torch.roll(x, [step if back else -step for step in self.shift_size], dims=(1, 2))


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
