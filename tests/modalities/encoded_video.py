"""Small real videos in which every frame says its number, made by FFmpeg's encoders."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import av
import numpy as np

WIDTH, HEIGHT = 96, 64


def frame_picture(index: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """uint8 [H, W, 3]: the number in binary as six black or white bars over a green that moves."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 1] = (np.arange(width)[None] * 2 + index * 5) % 200
    for bit in range(6):
        left, right = width * (bit + 1) // 8, width * (bit + 2) // 8
        picture[height // 4 : height * 3 // 4, left:right] = 255 * (index >> bit & 1)
    return picture


def frame_number(picture: np.ndarray) -> int:
    """The number in a whole frame, whatever its size."""
    height, width = picture.shape[:2]
    middles = [width * (2 * bit + 3) // 16 for bit in range(6)]
    return sum(int(picture[height // 2, middle].mean() > 128) << bit for bit, middle in enumerate(middles))


def encode_video(
    frames: int = 40,
    *,
    container: str = "mp4",
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    times_ms: Sequence[int] | None = None,
    gop: int = 12,
    pix_fmt: str = "yuv420p",
    rate: int = 25,
) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.gop_size = gop
        if times_ms is not None:
            from fractions import Fraction

            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(frame_picture(index, size[1], size[0]), format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[index], stream.codec_context.time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()
