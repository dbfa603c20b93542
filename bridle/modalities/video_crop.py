"""A frame of a video, where a clip is cut out of it, and how that is scaled."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

import av
import av.filter
import numpy as np
from pydantic import Field

from bridle.settings import Settings

SCALES = (1.0, 0.875, 0.75, 0.66)
"""Sides of a random crop against the largest that fits (Wang et al., Temporal Segment Networks; VideoMAE)."""

SCALE_PAIRS = tuple((i, j) for i in range(4) for j in range(4) if abs(i - j) <= 1)
"""Width's and height's scale: neighbours only, so that a crop is stretched little."""

PLACES = ((0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3))
"""Where a random crop may stand, in quarters of the room left over: the same paper's thirteen places."""


class Draws(Settings):
    """The random choices of one training clip, drawn before anything is known of the video."""

    start: Annotated[float, Field(ge=0, lt=1)]
    """Which of the possible first frames, as a share of them."""
    scales: Annotated[int, Field(ge=0, lt=len(SCALE_PAIRS))]
    place: Annotated[int, Field(ge=0, lt=len(PLACES))]
    flip: bool


@dataclass(frozen=True)
class Frame:
    """One shown frame: its number, when it starts and ends (seconds from the first), and its pixels if asked for."""

    index: int
    start_s: float
    end_s: float
    pixels: np.ndarray | None


Prepare = Callable[[Any], np.ndarray]
"""From an `av.VideoFrame` to the pixels kept of it, at once, so that no more than one frame is held at full size."""


def upright(frame: Any) -> tuple[int, bool]:
    """How an `av.VideoFrame` becomes what its display matrix says: mirrored left to right or not, then turned
    anticlockwise by quarters. `frame.rotation` alone takes a mirrored film (a front camera's) for a turned one.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0, False
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])  # 16.16; (x, y) goes to (a x + c y, b x + d y)
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    return round(-math.degrees(math.atan2(b, a)) / 90) % 4, mirrored


class Cropper:
    """Cuts a box out of a frame and scales it to `size` (height, width): the largest centred one, or the drawn one.

    FFmpeg's filters do it: the crop only moves pointers, and one pass scales (bilinear, widened where it shrinks, so
    antialiased) and converts to planes of colour (faster than to interleaved RGB, and what a model takes). The frame is
    turned, and mirrored, by the container's display matrix.
    """

    def __init__(self, size: tuple[int, int], draws: Draws | None = None) -> None:
        self.size, self.draws = size, draws
        self._graph: Any = None
        self._shape: tuple[Any, ...] = ()

    def __call__(self, frame: Any) -> np.ndarray:
        """uint8 [3, H, W], red first, of an `av.VideoFrame`."""
        turns, mirrored = upright(frame)
        shape = (frame.width, frame.height, frame.format.name, turns % 2, frame.colorspace, frame.color_range)
        if shape != self._shape:  # a stream may change its size
            self._graph, self._shape = self._build(frame, sideways=turns % 2 == 1), shape
        self._graph.push(frame)
        scaled = self._graph.pull()
        planes = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size) for plane in scaled.planes]
        green, blue, red = (plane[: scaled.height, : scaled.width] for plane in planes)
        pixels = np.stack([red, green, blue])
        pixels = np.rot90(pixels[..., ::-1] if mirrored else pixels, turns, axes=(1, 2))
        return pixels[..., ::-1] if self.draws and self.draws.flip else pixels

    def _build(self, frame: Any, *, sideways: bool) -> Any:
        height, width = self.size[::-1] if sideways else self.size
        left, top, w, h = self._box(frame.width, frame.height, width, height)
        graph = av.filter.Graph()
        graph.threads = 1
        nodes = [
            graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=frame.time_base or Fraction(1, 1000),
            ),
            graph.add("crop", f"{w}:{h}:{left}:{top}:exact=1"),
            graph.add("scale", f"{width}:{height}:flags=bilinear"),
            graph.add("format", "gbrp"),
            graph.add("buffersink"),
        ]
        graph.link_nodes(*nodes).configure()
        return graph

    def _box(self, width: int, height: int, target_w: int, target_h: int) -> tuple[int, int, int, int]:
        """Left, top, width, height; left and top even, so that colour, kept at half size, stays in place."""
        scale = min(width / target_w, height / target_h)
        scales = [SCALES[n] for n in SCALE_PAIRS[self.draws.scales]] if self.draws else [1.0, 1.0]
        w, h = max(1, round(target_w * scale * scales[0])), max(1, round(target_h * scale * scales[1]))
        x, y = PLACES[self.draws.place] if self.draws else (2, 2)
        return (width - w) * x // 4 // 2 * 2, (height - h) * y // 4 // 2 * 2, w, h
