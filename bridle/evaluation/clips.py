"""Clips for people's eyes: the picture, what masking leaves of it, and a map of its codes for each codebook."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from bridle.config import MaskSettings
from bridle.data.errors import ShardError
from bridle.data.shards import ShardSet
from bridle.evaluation.palette import code_colours
from bridle.modalities.clip import Clip, ClipError, Modality
from bridle.model_folder import BridleModel, stacked
from bridle.modeling.masking import draw_mask

HIDDEN, PADDING = (176, 176, 176), (96, 96, 96)
CANDIDATES = 8
"""Samples looked at for each one shown."""
FRAMES = 4
"""Moments of a video that are shown, a GAP-th of their width apart."""
GAP = 32
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Tile:
    """A picture, uint8 ``[H, W, 3]`` (or 4, with alpha), a caption, and words for those who cannot see it."""

    pixels: Pixels
    caption: str
    alt: str


@dataclass(frozen=True)
class ShownClip:
    """A clip's tiles: the picture, the masked one, then one per codebook; sound: an mp3, where it can be heard."""

    name: str
    tiles: list[Tile]
    sound: bytes | None = None


def show_clips(
    shards: ShardSet, modality: Modality, mask: MaskSettings, model: BridleModel | None, count: int = 3
) -> list[ShownClip]:
    """The first windows of `count` samples spread over the shards, such as decode and have little padding.

    mask: drawn as in training, from the sample's number; model: where the codes come from, none: no code maps.
    """
    shown: list[ShownClip] = []
    bounds = np.linspace(0, len(shards), min(count, len(shards)) + 1).astype(int).tolist()
    for start, end in pairwise(bounds):
        chosen = _fullest(shards, modality, range(start, end))
        if chosen is not None:
            index, name, clip, sound = chosen
            shown.append(ShownClip(name, _tiles(clip, modality, mask, model, index), sound))
    return shown


Found = tuple[int, str, Clip, bytes | None]


def _fullest(shards: ShardSet, modality: Modality, indexes: range) -> Found | None:
    """Number, name, first window and sound of the sample with the least padding, among the first few that decode."""
    found: list[Found] = []
    for index in indexes:
        try:
            sample = shards.read(index)
            clip = next(iter(modality.windows(sample.data)))
            name = ", ".join([sample.key, *sample.labels])
            found.append((index, name, clip, modality.audible(sample.data, clip.duration_s or 0.0)))
        except (ClipError, ShardError):
            continue
        if len(found) == CANDIDATES or clip.valid == next(iter(clip.grid.values())):
            break
    return max(found, key=lambda candidate: candidate[2].valid, default=None)


def _tiles(clip: Clip, modality: Modality, mask: MaskSettings, model: BridleModel | None, seed: int) -> list[Tile]:
    grid = tuple(clip.grid.values())
    view = _View(tuple(clip.grid), modality.picture(clip), clip.valid)
    hidden = draw_mask(mask, grid, np.random.default_rng(seed), clip.valid).numpy().reshape(grid)
    seconds = f", {clip.duration_s:.2f} s" if clip.duration_s is not None else ""
    about = f"{view.what}{seconds}{view.orientation}"
    share = round(100 * hidden.mean())
    tiles = [
        Tile(view.picture(), about, f"Picture of the clip: {about}"),
        Tile(view.with_hidden(hidden), f"{share} % hidden", f"The same with {share} % of its patches hidden in grey"),
    ]
    if model is None:
        return tiles
    codes = model.codes(*stacked([clip]))[0].cpu().numpy()
    for stage, row in enumerate(codes.T, start=1):
        different = len(np.unique(row[: clip.valid * math.prod(grid[1:])]))
        size = model.config.quantizer.codebook_size
        caption = f"codebook {stage}: {different} of {size} codes"
        tiles.append(Tile(view.code_map(row.reshape(grid)), caption, f"Code map, {caption}; one colour per code"))
    return tiles


class _View:
    """How a grid lies over a clip's picture.

    Two axes that begin with time (sound) are turned: time to the right, the second axis upwards. Two others (images)
    lie as they are. Three (video) become a row of a few moments.
    """

    def __init__(self, axes: tuple[str, ...], picture: Pixels, valid: int) -> None:
        self.turned = len(axes) == 2 and axes[0] == "time"
        self.film = picture.ndim == 4
        self.axes, self.pixels, self.valid = axes, picture, valid

    @property
    def what(self) -> str:
        """Name of the picture."""
        return "spectrogram" if self.turned else "frames" if self.film else "image"

    @property
    def orientation(self) -> str:
        """Which way it lies, where that is not plain to see."""
        if self.turned:
            return f": time to the right, {self.axes[1]} upwards"
        return ": from early to late" if self.film else ""

    def picture(self) -> Pixels:
        """The clip."""
        return self._joined(self.pixels)

    def with_hidden(self, hidden: NDArray[np.bool_]) -> Pixels:
        """The clip, its hidden patches painted over; hidden: ``[*grid]``."""
        cover = self._over_pixels(hidden)[..., None]
        return self._joined(np.where(cover, np.array(HIDDEN, np.uint8), self.pixels))

    def code_map(self, codes: NDArray[np.int64]) -> Pixels:
        """A colour for each code, padding in grey; codes: ``[*grid]``."""
        colours = code_colours(codes)
        colours[self.valid :] = PADDING
        return self._joined(self._over_pixels(colours))

    def _over_pixels(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """``[*grid, ...]`` stretched over the picture's pixels."""
        if self.turned:
            values = np.swapaxes(values, 0, 1)[::-1]
        for axis, side in enumerate(self.pixels.shape[:-1]):
            values = np.repeat(values, side // values.shape[axis], axis=axis)
        return values

    def _joined(self, pixels: NDArray[np.generic]) -> Pixels:
        """A film's moments side by side with transparent gaps; anything else as it is."""
        if not self.film:
            return pixels.astype(np.uint8)
        moments = np.linspace(0, len(pixels), min(FRAMES, len(pixels)), endpoint=False).astype(int)
        _, height, width, _ = pixels.shape
        row = np.zeros((height, len(moments), width + max(1, width // GAP), 4), np.uint8)
        row[:, :, :width, :3] = np.swapaxes(pixels[moments], 0, 1)
        row[:, :, :width, 3] = 255
        return row.reshape(height, -1, 4)[:, : row.shape[1] * row.shape[2] - (row.shape[2] - width)]


def heldout_clips(
    patterns: list[str], modality: Modality, mask: MaskSettings, model: BridleModel | None, cache: str | None
) -> list[ShownClip]:
    """`show_clips` of the shards that the patterns name.

    Raises:
        ShardError: they cannot be opened, or nothing in them decodes.
    """
    from bridle.data.shards import open_shards

    with torch.inference_mode():
        shown = show_clips(open_shards(patterns, extensions=modality.extensions, cache=cache), modality, mask, model)
    if not shown:
        raise ShardError(f"no sample of {', '.join(patterns)} can be decoded; run `bridle shards check` on them")
    return shown
