"""Video: mp4, mov, webm, mkv and avi become normalised clips of frames. PyAV decodes, in a child process by default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bridle.modalities.clip import Clip, Limits
from bridle.modalities.image import denormalise, normalise, unscaled
from bridle.modalities.isolation import isolated
from bridle.modalities.video_crop import PLACES, SCALE_PAIRS, Draws
from bridle.modalities.video_decode import Request, answers
from bridle.modalities.video_description import VideoDescription, VideoSettings
from bridle.modalities.video_kinds import container_of

LATEST = 1 - 2**-20
"""The greatest start of a view: a start is below 1."""
_TARGET = "bridle.modalities.video_decode:answers"


class Video(VideoDescription):
    """Implements `Modality` for video."""

    def __init__(self, settings: VideoSettings, limits: Limits | None = None, raw: bool = False) -> None:
        """raw: clips are uint8, before they are normalised."""
        super().__init__(settings, limits or Limits())
        self.raw = raw

    def training_clip(self, data: bytes, rng: np.random.Generator) -> Clip:
        """Frames from a random start, all cut by one multi-scale crop and all flipped or none; a shorter video's last
        frame is repeated.

        Raises:
            UndecodableError, WrongKindError, TooLargeError
        """
        draws = Draws(
            start=float(rng.random()),
            scales=int(rng.integers(len(SCALE_PAIRS))),
            place=int(rng.integers(len(PLACES))),
            flip=bool(rng.random() < self.settings.flip),
        )
        (clip,) = self._clips(data, draws)
        return clip

    def windows(self, data: bytes) -> Iterator[Clip]:
        """Runs of ``frames * stride`` source frames, one after another to the end, centre-cropped.

        `valid` counts the tubelets that begin within the video; the last frame is repeated after it.

        Raises:
            UndecodableError, WrongKindError, TooLargeError
        """
        return self._clips(data, None)

    def finish(self, values: torch.Tensor, extent: torch.Tensor | None) -> torch.Tensor:
        """uint8 ``[B, 3, T, H, W]``, normalised."""
        return normalise(values, self.settings.mean, self.settings.std, axes=3)

    def view(self, data: bytes, start: float, place: int) -> Clip:
        """One clip for classification: `start` from 0 (the film's beginning) to 1 (as late as fits), cropped at the
        centre (`place` 0), or at one end (-1) or the other (1) of the longer side; not flipped.

        Raises:
            UndecodableError, WrongKindError, TooLargeError
        """
        where = {-1: (0, 0), 0: (2, 2), 1: (4, 4)}[place]
        draws = Draws(start=min(start, LATEST), scales=SCALE_PAIRS.index((0, 0)), place=PLACES.index(where), flip=False)
        (clip,) = self._clips(data, draws)
        return clip

    @property
    def features(self) -> dict[str, Any]:
        return {}

    def content(self, clip: Clip) -> torch.Tensor:
        """float32 ``[3, n]``: red, green and blue in 0..1 of the frames that are not repeated."""
        frames = clip.valid * self.settings.patch[0]
        return unscaled(clip.values[:, :frames], self.settings.mean, self.settings.std)

    def rate(self, data: bytes) -> str | None:
        """None: only a decoder knows."""
        return None

    def picture(self, clip: Clip) -> np.ndarray:
        """uint8 [T, H, W, 3]."""
        return denormalise(clip.values, self.settings.mean, self.settings.std)

    def audible(self, data: bytes, seconds: float) -> bytes | None:
        """None: no sound is read."""
        return None

    def _clips(self, data: bytes, draws: Draws | None) -> Iterator[Clip]:
        for header, pixels in self._answers(data, draws):
            values = torch.from_numpy(pixels).contiguous()
            if not self.raw:
                values = normalise(values, self.settings.mean, self.settings.std, axes=3)
            yield Clip(values=values, grid=self.grid, **header)

    def _answers(self, data: bytes, draws: Draws | None) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        settings = self.settings
        request = Request(
            frames=settings.frames,
            stride=settings.stride,
            size=settings.size,
            tubelet=settings.patch[0],
            decoder=settings.decoder,
            limits=self.limits,
            draws=draws,
        ).model_dump(mode="json")
        if not settings.isolate:
            return answers(data, request)
        container_of(data, self.limits)  # what cannot be a video is not worth a trip to the child
        memory_bytes = settings.decode_memory_mb << 20
        return isolated(_TARGET, data, request, seconds=settings.decode_seconds, memory_bytes=memory_bytes)
