"""Fixed sine-cosine positions for any grid."""

from __future__ import annotations

import torch
from torch import Tensor

KEPT = 16
"""Tables that `Positions` keeps, the last made: a run has one grid, a service a few."""


def sincos_positions(grid: tuple[int, ...], width: int) -> Tensor:
    """Position table of a grid, float32 ``[N, width]``, N row-major (the order of `PatchShape.cut`).

    The width is shared out evenly over the axes; along each, sines and cosines of geometrically spaced frequencies
    (Vaswani et al. 2017, per axis as in MAE). What does not divide by twice the number of axes stays zero.

    Raises:
        ValueError: a width too small for the number of axes.
    """
    if width < least_width(grid):
        raise ValueError(
            f"width {width} is too small for positions on {len(grid)} axes; it must be {least_width(grid)} or more"
        )
    per_axis = width // (2 * len(grid))
    frequencies = 1.0 / 10000 ** (torch.arange(per_axis, dtype=torch.float64) / per_axis)
    axes = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    table = torch.zeros(axes[0].numel(), width, dtype=torch.float64)
    for i, axis in enumerate(axes):
        angles = axis.reshape(-1, 1) * frequencies
        start = 2 * per_axis * i
        table[:, start : start + per_axis] = angles.sin()
        table[:, start + per_axis : start + 2 * per_axis] = angles.cos()
    return table.float()


def least_width(grid: tuple[int, ...]) -> int:
    """The smallest width that a grid's table has room in: a sine and a cosine for each axis."""
    return 2 * len(grid)


class Positions:
    """Tables of the grids at hand, kept on the device where they are used, so that no step copies them there.

    No buffers, so that neither a cast of the module nor a state dict knows of them.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._tables: dict[tuple[tuple[int, ...], torch.device, torch.dtype], Tensor] = {}

    def __call__(self, grid: tuple[int, ...], like: Tensor) -> Tensor:
        """`sincos_positions` of `grid`, ``[N, width]``, with the device and dtype of `like`; not to be written to.

        Raises:
            ValueError: see `sincos_positions`.
        """
        key = grid, like.device, like.dtype
        table = self._tables.get(key)
        if table is None:
            with torch.inference_mode(False):
                table = sincos_positions(grid, self.width).to(like.device, like.dtype)
            for old in list(self._tables)[: 1 - KEPT]:
                self._tables.pop(old, None)
            self._tables[key] = table
        return table
