"""What clips of sound are: settings, grid, and which files hold sound. Needs no decoder and no torch."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from bridle.config import Positive
from bridle.modalities.audio_frames import FRAMES_PER_SECOND, HOP, WINDOW
from bridle.modalities.audio_kinds import kind_of
from bridle.modalities.clip import EXTENSIONS, Limits
from bridle.settings import Settings

FRAME_MULTIPLE = 64
"""Frames of a clip are a multiple of this: four patches of 16, the side of the Swin decoder's window."""


class AudioSettings(Settings):
    """The `clip` section of an audio recipe. The sample rate is always 16 kHz."""

    seconds: Annotated[float, Field(gt=0.0, le=600.0)] = 10.0
    """Length of a clip, rounded up to whole windows of `frames`, which sound fills to its last frame."""
    mel_bins: Annotated[int, Field(ge=4, le=256)] = 128
    """Mel bands; a multiple of the patch's second side."""
    patch: tuple[Positive, Positive] = (16, 16)
    """Frames by mel bands of a patch."""
    mean: float = -4.4446096
    """Mean of the log-mel energies over the data set (Table 5: AudioSet)."""
    std: Annotated[float, Field(gt=0.0)] = 3.3216383
    """Their standard deviation; clips are (x - mean) / (2 std)."""
    roll: bool = True
    """Whether a training clip is rotated in time by a random shift over its whole length."""
    magnitude: bool = True
    """Whether a training clip is made louder or softer by a factor beta(10, 10) + 0.5."""

    @model_validator(mode="after")
    def _patches_fill_the_clip(self) -> AudioSettings:
        if self.mel_bins % self.patch[1]:
            raise ValueError(f"patch {self.patch[1]} does not divide mel_bins {self.mel_bins}; choose one that does")
        if FRAME_MULTIPLE % self.patch[0]:
            raise ValueError(f"patch {self.patch[0]} does not divide {FRAME_MULTIPLE} frames; choose one that does")
        return self

    @property
    def frames(self) -> int:
        """Frames of a clip: `seconds` in steps of 10 ms, rounded up to a multiple of 64 (10 s: 1024, 5 s: 512)."""
        return math.ceil(round(self.seconds * FRAMES_PER_SECOND, 6) / FRAME_MULTIPLE) * FRAME_MULTIPLE

    @property
    def samples(self) -> int:
        """Samples at 16 kHz that the frames of a clip look at."""
        return (self.frames - 1) * HOP + WINDOW


class AudioDescription:
    """See `bridle.modalities.clip.Description`."""

    name: ClassVar[str] = "audio"
    axes: ClassVar[tuple[str, ...]] = ("time", "frequency")
    extensions: ClassVar[tuple[str, ...]] = EXTENSIONS["audio"]
    settings_class: ClassVar[type[Settings]] = AudioSettings
    channels: ClassVar[int] = 1
    deviation: ClassVar[float] = 0.5
    raw_is_small: ClassVar[bool] = False

    def __init__(self, settings: AudioSettings, limits: Limits) -> None:
        self.settings = settings
        self.limits = limits

    @property
    def patch(self) -> tuple[int, ...]:
        return self.settings.patch

    @property
    def grid(self) -> dict[str, int]:
        return {
            "time": self.settings.frames // self.settings.patch[0],
            "frequency": self.settings.mel_bins // self.settings.patch[1],
        }

    @property
    def positions_per_second(self) -> float:
        return FRAMES_PER_SECOND / self.settings.patch[0] * self.grid["frequency"]

    @classmethod
    def recognises(cls, head: bytes) -> bool:
        """Whether this may be sound. Containers that hold films too (mp4, webm, mkv, avi) are: a film has sound."""
        return kind_of(head) is not None
