"""Transformer blocks, and how their weights start."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bridle.config import TransformerSettings

COMPILED_SHAPES = 64
"""Graphs that torch may make of a block's code: encoder, decoder, tokenizer and estimator, each in training and in
evaluation, with padding and without; torch's own limit of 8 would end the run."""


class Blocks(nn.Module):
    """Blocks one after another. recompute: keep only what goes into each, and compute the rest again for gradients."""

    blocks: nn.ModuleList

    def __init__(self) -> None:
        super().__init__()
        self.recompute = False

    def through(self, block: Callable[..., Tensor], tokens: Tensor, *given: Any, **named: Any) -> Tensor:
        """What `block` gives for `tokens`."""
        if self.recompute and torch.is_grad_enabled():
            # Nothing in a block is drawn at random.
            found: Tensor = checkpoint(block, tokens, *given, use_reentrant=False, preserve_rng_state=False, **named)
            return found
        return block(tokens, *given, **named)


def recompute_activations(module: nn.Module) -> None:
    """Has all blocks inside `module` compute again what the backward pass needs, instead of keeping it."""
    for part in module.modules():
        if isinstance(part, Blocks):
            part.recompute = True


def compile_blocks(module: nn.Module, backend: Any = "inductor") -> None:
    """Has torch compile the blocks inside `module`, each in one graph for each shape; equal blocks share theirs.

    It is an error if a block cannot be compiled whole. backend: torch.compile's.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_SHAPES)
    for part in module.modules():
        if isinstance(part, Blocks):
            for block in part.blocks:
                block.compile(backend=backend, fullgraph=True, dynamic=False)


class TransformerBlocks(Blocks):
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
                tokens = self.through(block, tokens, attn_mask=mask)
            else:
                tokens = self.through(partial(_weighted, block), tokens, mask, branches[:, i].to(tokens))
        return tokens


def _weighted(block: Any, tokens: Tensor, mask: Tensor | None, factors: Tensor) -> Tensor:
    """timm's block, each branch times its factor; factors: ``[B, 2]``."""
    attention, perceptron = factors[:, :, None, None].unbind(1)
    tokens = tokens + attention * block.ls1(block.attn(block.norm1(tokens), attn_mask=mask))
    changed: Tensor = tokens + perceptron * block.ls2(block.mlp(block.norm2(tokens)))
    return changed


class PositionwiseBlocks(Blocks):
    """Residual perceptrons, each position for itself: ``[B, N, D]`` to ``[B, N, D]``."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), Mlp(width, 4 * width)) for _ in range(depth))

    def forward(self, tokens: Tensor, grid: tuple[int, ...], content: Tensor | None = None) -> Tensor:
        """See `TransformerBlocks.forward`; no position sees another one, so padding needs no care."""
        for block in self.blocks:
            tokens = tokens + self.through(block, tokens)
        return tokens


class SwinBlocks(Blocks):
    """Swin blocks over a 2-D grid, every other one shifted by half a window: ``[B, N, D]`` to ``[B, N, D]``.

    Any grid works: what the window does not divide is padded with zeros, which are attended to as in timm. A grid
    smaller than the window in one axis is padded to it.
    """

    def __init__(self, settings: TransformerSettings, window: int) -> None:
        super().__init__()
        self.window, self.shift = window, window // 2
        self.blocks = nn.ModuleList(
            _SwinBlock(
                settings.width,
                input_resolution=(window, window),  # unused: always_partition, and masks come from here
                num_heads=settings.heads,
                window_size=window,
                shift_size=self.shift if i % 2 else 0,
                always_partition=True,
                dynamic_mask=True,
            )
            for i in range(settings.depth)
        )
        self._masks: dict[tuple[tuple[int, ...], torch.device, torch.dtype], Tensor] = {}

    def forward(self, tokens: Tensor, grid: tuple[int, ...], content: Tensor | None = None) -> Tensor:
        """See `TransformerBlocks.forward`. Raises ValueError when the grid has not two axes."""
        if len(grid) != 2:
            raise ValueError(f"decoder.kind swin needs a grid of two axes; this one is {grid}: use kind transformer")
        batch, count, width = tokens.shape
        tokens = tokens.reshape(batch, *grid, width)
        plain, shifted = None, self._shift_mask(grid, tokens)
        if content is not None:
            padding = ~content.reshape(batch, *grid, 1)
            plain, shifted = (
                self._with_padding(padding, 0, None, tokens),
                self._with_padding(padding, self.shift, shifted, tokens),
            )
        for block in self._each():
            tokens = self.through(block, tokens, shifted if any(block.shift_size) else plain)
        return tokens.reshape(batch, count, width)

    def _each(self) -> list[_SwinBlock]:
        return [block for block in self.blocks if isinstance(block, _SwinBlock)]

    def _shift_mask(self, grid: tuple[int, ...], like: Tensor) -> Tensor | None:
        """timm's mask of shifted windows, ``[windows, area, area]``: made once for a grid; none without a shift."""
        block = next((block for block in self._each() if any(block.shift_size)), None)
        key = grid, like.device, like.dtype
        if block is not None and key not in self._masks:
            with torch.inference_mode(False):
                padded = [side + -side % self.window for side in grid]
                made = block.get_attn_mask(torch.empty(1, *padded, 1, device=like.device, dtype=like.dtype))
                assert made is not None
                self._masks[key] = made
        return self._masks.get(key)

    def _with_padding(self, padding: Tensor, shift: int, mask: Tensor | None, like: Tensor) -> Tensor:
        """`mask` for every clip's windows, ``[B * windows, area, area]``, without `padding` ``[B, H, W, 1]``."""
        windows, _ = _windows(_rolled(padding, -shift), (self.window, self.window))
        hidden = windows.transpose(1, 2)
        found = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
        found = found.masked_fill(hidden, torch.finfo(like.dtype).min / 2).expand(-1, hidden.shape[-1], -1)
        return found if mask is None else found + mask.repeat(len(padding), 1, 1)


class _SwinBlock(SwinTransformerBlock):
    """timm's block, which is given its mask: ``[n, area, area]`` for n windows, which come again in each clip."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path1(self._attend(self.norm1(x), mask))
        changed: Tensor = x + self.drop_path2(self.mlp(self.norm2(x)))
        return changed

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """timm's `_attn`."""
        _, height, width, channels = x.shape
        shift = self.shift_size[0]
        windows, (down, across) = _windows(_rolled(x, -shift), self.window_size)
        # timm's own products: for windows of 16 positions torch's fused kernel is slower (docs/performance.md).
        windows = self.attn(windows, mask=mask).view(-1, *self.window_size, channels)
        x = window_reverse(windows, self.window_size, down, across)[:, :height, :width].contiguous()
        return _rolled(x, shift)


def _windows(x: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """``[B, H, W, C]`` in windows ``[B * windows, area, C]``, and height and width of all windows together."""
    down, across = (-side % step for side, step in zip(x.shape[1:3], size, strict=True))
    x = functional.pad(x, (0, 0, 0, across, 0, down))
    return window_partition(x, size).view(-1, size[0] * size[1], x.shape[-1]), (x.shape[1], x.shape[2])


def _rolled(x: Tensor, by: int) -> Tensor:
    return torch.roll(x, (by, by), dims=(1, 2)) if by else x


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
