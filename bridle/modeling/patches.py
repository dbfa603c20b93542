"""Cutting a clip into patches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PatchShape:
    """How a clip is cut: its channels, and the size of a patch along each axis.

    Audio ``(1, (16, 16))``, images ``(3, (16, 16))``, video tubelets ``(3, (2, 16, 16))``.
    """

    channels: int
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Values in one patch."""
        count = self.channels
        for side in self.size:
            count *= side
        return count

    def grid(self, values: Tensor) -> tuple[int, ...]:
        """Patches along each axis of ``values`` ``[B, C, *S]``.

        Raises:
            ValueError: wrong number of channels or axes, or a side that the patch does not divide.
        """
        channels, sides = values.shape[1], tuple(values.shape[2:])
        if channels != self.channels or len(sides) != len(self.size):
            raise ValueError(
                f"clip of shape {tuple(values.shape)}: expected [B, {self.channels}] and {len(self.size)} axes after it"
            )
        if any(side % patch or not side for side, patch in zip(sides, self.size, strict=True)):
            raise ValueError(f"clip of size {sides}: each side must be a positive multiple of the patch {self.size}")
        return tuple(side // patch for side, patch in zip(sides, self.size, strict=True))

    def count(self, values: Tensor) -> int:
        """N, patches of a clip of ``values`` ``[B, C, *S]``. Raises ValueError as `grid`."""
        return math.prod(self.grid(values))

    def cut(self, values: Tensor) -> Tensor:
        """``[B, C, *S]`` to ``[B, N, C * prod(patch)]``; N is row-major over the grid, the first axis outermost."""
        grid = self.grid(values)
        axes = len(grid)
        split = [values.shape[0], self.channels]
        for count, side in zip(grid, self.size, strict=True):
            split += [count, side]
        order = [0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2)]
        return values.reshape(split).permute(order).reshape(values.shape[0], -1, self.numel)


def content_mask(valid: Tensor, positions: Tensor | int) -> Tensor:
    """Which positions hold content, bool: padding lies behind it, since positions are row-major over the grid.

    valid: int64 ``[B]``, positions of content of each clip; positions: int64 ``[B, n]``, or N for all of ``[0, N)``.
    Returns ``[B, n]``, ``[B, N]``.
    """
    if isinstance(positions, int):
        return torch.arange(positions, device=valid.device) < valid[:, None]
    return positions < valid[:, None]


def clip_weights(content: Tensor) -> Tensor:
    """Weights of positions for a mean over clips of each clip's mean over its content: float32 ``[B, n]``.

    content: bool ``[B, n]``. A clip without content weighs nothing; the others 1 / B each, however many positions they
    have, so that how a batch is split over ranks and accumulation steps changes no loss.
    """
    counts = content.sum(1, keepdim=True).clamp(min=1)
    return content / (counts * len(content))


def gather_positions(tokens: Tensor, index: Tensor) -> Tensor:
    """Picks positions: ``tokens`` ``[B, N, D]``, ``index`` int64 ``[B, n]`` to ``[B, n, D]``."""
    return torch.gather(tokens, 1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
