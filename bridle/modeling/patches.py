"""Cutting a clip into patches."""

from __future__ import annotations

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

    def cut(self, values: Tensor) -> Tensor:
        """``[B, C, *S]`` to ``[B, N, C * prod(patch)]``; N is row-major over the grid, the first axis outermost."""
        grid = self.grid(values)
        axes = len(grid)
        split = [values.shape[0], self.channels]
        for count, side in zip(grid, self.size, strict=True):
            split += [count, side]
        order = [0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2)]
        return values.reshape(split).permute(order).reshape(values.shape[0], -1, self.numel)


def gather_positions(tokens: Tensor, index: Tensor) -> Tensor:
    """Picks positions: ``tokens`` ``[B, N, D]``, ``index`` int64 ``[B, n]`` to ``[B, n, D]``."""
    return torch.gather(tokens, 1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
