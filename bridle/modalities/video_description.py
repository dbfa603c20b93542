"""What clips of films are: settings, grid, and which files may be films. Needs no decoder and no torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from bridle.modalities.clip import EXTENSIONS, Limits, check_size
from bridle.modalities.video_kinds import sniff
from bridle.settings import Settings

Count = Annotated[int, Field(gt=0)]


class VideoSettings(Settings):
    """The `clip` section of a video recipe."""

    frames: Count = 16
    """Frames of a clip; a multiple of the patch's first side."""
    stride: Count = 4
    """Every stride-th frame of the video is taken."""
    size: tuple[Count, Count] = (224, 224)
    """Height and width of a clip; multiples of the patch."""
    patch: tuple[Count, Count, Count] = (2, 16, 16)
    """Frames, height and width of a patch."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from red, green and blue in 0..1; ImageNet's."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divides red, green and blue after that; ImageNet's."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Pretraining: probability of a horizontal flip of the whole clip."""
    decoder: Literal["pyav", "decord"] = "pyav"
    """decord only for shards you trust; it refuses what it is known to decode wrongly."""
    isolate: bool = True
    """Decode in a child process, which may crash, hang or be killed without harm."""
    decode_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Wall-clock time that the child may take for one clip."""
    decode_memory_mb: Count = 4096
    """Memory (2^20 bytes) that the child may take above what it starts with."""

    @model_validator(mode="after")
    def _fits(self) -> VideoSettings:
        check_size((self.frames, *self.size), self.patch)
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std}: expected three figures above 0")
        return self


class VideoDescription:
    """See `bridle.modalities.clip.Description`."""

    name: ClassVar[str] = "video"
    axes: ClassVar[tuple[str, ...]] = ("time", "height", "width")
    extensions: ClassVar[tuple[str, ...]] = EXTENSIONS["video"]
    settings_class: ClassVar[type[Settings]] = VideoSettings
    channels: ClassVar[int] = 3
    deviation: ClassVar[float] = 1.0
    raw_is_small: ClassVar[bool] = True

    def __init__(self, settings: VideoSettings, limits: Limits) -> None:
        self.settings = settings
        self.limits = limits

    @property
    def patch(self) -> tuple[int, ...]:
        """Frames, height and width of a patch."""
        return self.settings.patch

    @property
    def grid(self) -> dict[str, int]:
        """Patches along time, down and across."""
        size = (self.settings.frames, *self.settings.size)
        return {axis: side // step for axis, side, step in zip(self.axes, size, self.settings.patch, strict=True)}

    @property
    def positions_per_second(self) -> float | None:
        """None: windows count frames, so the rate is the file's. A stream's own is its positions over its duration."""
        return None

    @classmethod
    def recognises(cls, head: bytes) -> bool:
        """mp4 and mov, webm and mkv, avi by their first bytes. Such a file may still hold sound only, which `windows`
        and `training_clip` find out and refuse with `WrongKindError`."""
        return sniff(head) is not None
