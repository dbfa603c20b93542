"""Which patches the encoder does not see."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bridle.config import MaskSettings


def draw_mask(settings: MaskSettings, grid: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """One clip's mask, bool ``[N]``, true where hidden. The number hidden depends on settings and grid only.

    ``random``: patches drawn over the whole grid. ``time_frequency``: whole rows and whole columns of a 2-D grid, such
    that the two together hide `ratio`. ``tube``: positions drawn once and hidden at every step of the first axis.

    Raises:
        ValueError: the kind does not fit the grid, or nothing would be hidden or left visible.
    """
    if settings.kind == "random":
        mask = _draw(int(np.prod(grid)), settings.ratio, rng)
    elif settings.kind == "tube":
        if len(grid) != 3:
            raise ValueError(f"mask.kind tube needs a grid of time, height and width; this one is {grid}")
        mask = np.tile(_draw(grid[1] * grid[2], settings.ratio, rng), grid[0])
    else:
        if len(grid) != 2:
            raise ValueError(f"mask.kind time_frequency needs a grid of two axes; this one is {grid}")
        per_axis = 1.0 - (1.0 - settings.ratio) ** 0.5
        rows, columns = (_draw(side, per_axis, rng) for side in grid)
        mask = (rows[:, None] | columns[None, :]).reshape(-1)
    return torch.from_numpy(mask)


def _draw(count: int, ratio: float, rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    hidden = round(count * ratio)
    if not 0 < hidden < count:
        raise ValueError(f"mask.ratio {ratio} hides {hidden} of {count} patches; some must be hidden and some visible")
    mask = np.zeros(count, dtype=np.bool_)
    mask[rng.permutation(count)[:hidden]] = True
    return mask
