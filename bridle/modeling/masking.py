"""Which patches the encoder does not see."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bridle.config import MaskSettings


def draw_mask(
    settings: MaskSettings, grid: tuple[int, ...], rng: np.random.Generator, valid: int | None = None
) -> Tensor:
    """One clip's mask, bool ``[N]``, true where hidden. The number hidden depends on settings, grid and valid only.

    ``random``: patches drawn over the whole grid. ``time_frequency``: whole rows and whole columns of a 2-D grid, such
    that the two together hide `ratio`. ``tube``: positions drawn once and hidden at every step of the first axis.

    valid: steps of the first axis that are content, from 1; none: all. `ratio` is the share of content that is hidden;
    of the padding behind it nothing is. At least one position of content stays visible.

    Raises:
        ValueError: the kind does not fit the grid, or nothing of a whole clip would be hidden or left visible.
    """
    hidden_count(settings, grid)
    steps = grid[0] if valid is None else min(valid, grid[0])
    content = (steps, *grid[1:])
    if settings.kind == "random":
        part = _draw(int(np.prod(content)), settings.ratio, rng)
    elif settings.kind == "tube":
        part = np.tile(_draw(grid[1] * grid[2], settings.ratio, rng), steps)
    else:
        rows, columns = (_draw(side, _per_axis(settings.ratio), rng) for side in content)
        part = (rows[:, None] | columns[None, :]).reshape(-1)
    mask = np.zeros(int(np.prod(grid)), dtype=np.bool_)
    mask[: len(part)] = part
    return torch.from_numpy(mask)


def hidden_count(settings: MaskSettings, grid: tuple[int, ...]) -> int:
    """Positions that are hidden of a clip without padding.

    Raises:
        ValueError: as `draw_mask`.
    """
    if settings.kind == "random":
        return _checked(int(np.prod(grid)), settings.ratio)
    if settings.kind == "tube":
        if len(grid) != 3:
            raise ValueError(f"mask.kind tube needs a grid of time, height and width; this one is {grid}")
        return grid[0] * _checked(grid[1] * grid[2], settings.ratio)
    if len(grid) != 2:
        raise ValueError(f"mask.kind time_frequency needs a grid of two axes; this one is {grid}")
    seen = [side - _checked(side, _per_axis(settings.ratio)) for side in grid]
    return grid[0] * grid[1] - seen[0] * seen[1]


def split_positions(mask: Tensor, content: int, hidden: int) -> tuple[Tensor, Tensor]:
    """Visible positions, int64 ``[N - hidden]``, and masked ones, int64 ``[hidden]``, together all N.

    mask: bool ``[N]``, as `draw_mask` gives it; content: positions before the padding; hidden: `hidden_count`. Where a
    clip has padding, both lists end with positions of it, so that clips of any length stack.
    """
    masked, visible = (torch.nonzero(chosen).flatten() for chosen in (mask[:content], ~mask[:content]))
    padding = torch.arange(content, len(mask))
    spare = hidden - len(masked)
    return torch.cat([visible, padding[spare:]]), torch.cat([masked, padding[:spare]])


def _per_axis(ratio: float) -> float:
    return 1.0 - float((1.0 - ratio) ** 0.5)


def _checked(count: int, ratio: float) -> int:
    hidden = round(count * ratio)
    if not 0 < hidden < count:
        raise ValueError(f"mask.ratio {ratio} hides {hidden} of {count} patches; some must be hidden and some visible")
    return hidden


def _draw(count: int, ratio: float, rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    mask = np.zeros(count, dtype=np.bool_)
    mask[rng.permutation(count)[: min(max(1, round(count * ratio)), count - 1)]] = True
    return mask
