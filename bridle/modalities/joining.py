"""How the windows of a file become one again: once, for the library, the service and bulk work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bridle.modalities.clip import Clip


@dataclass(frozen=True)
class Place:
    """Where a window stands in its file: a `Clip` without its values, so that those of a long file can be forgotten."""

    grid: dict[str, int]
    valid: int
    start_s: float | None = None
    duration_s: float | None = None

    @classmethod
    def of(cls, clip: Clip) -> Place:
        """The place of a clip."""
        return cls(clip.grid, clip.valid, clip.start_s, clip.duration_s)

    @property
    def positions(self) -> int:
        """Positions with content; those of padding come after them, and are cut."""
        first, *others = self.grid.values()
        return min(self.valid, first) * math.prod(others)


@dataclass(frozen=True)
class Extent:
    """What a whole file's windows cover: `grid` without padding, seconds of content, the start of each window."""

    grid: dict[str, int]
    duration_s: float | None
    starts_s: list[float]


def joined(places: Sequence[Place]) -> Extent:
    """The extent of consecutive windows (at least one)."""
    first, *others = places[0].grid
    durations = [place.duration_s for place in places if place.duration_s is not None]
    return Extent(
        grid={first: sum(place.valid for place in places), **{axis: places[0].grid[axis] for axis in others}},
        duration_s=round(sum(durations), 6) if durations else None,
        starts_s=[place.start_s for place in places if place.start_s is not None],
    )
