"""What every modality turns bytes into, and how it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

import numpy as np
from pydantic import Field

from bridle.processes.errors import RefusedError
from bridle.settings import Settings

if TYPE_CHECKING:  # a decoder's child process starts without it
    import torch


EXTENSIONS: dict[str, tuple[str, ...]] = {
    "audio": (
        "flac", "wav", "mp3", "ogg", "oga", "opus", "m4a", "m4b", "aac", "aiff", "aif", "aifc", "caf",
        "webm", "mka", "mp4", "mkv", "mov", "avi",
    ),
    "image": ("jpg", "jpeg", "jfif", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"),
    "video": ("mp4", "webm", "mkv", "avi", "mov", "m4v"),
}  # fmt: skip
"""File name endings (lower case, no dot) by modality, for packing shards and for reading them; of a
sample's several the first is read."""


@dataclass(frozen=True)
class Clip:
    """One window of content, normalised, at the size a model takes.

    values: float32 ``[C, *size]``; ``size`` is the grid times the patch (audio ``[1, T, F]``, image ``[3, H, W]``,
        video ``[3, T, H, W]``). Of a raw modality what it leaves to `Modality.finish`.
    grid: patches along each axis, in the order of the axes, e.g. ``{"time": 64, "frequency": 8}``.
    valid: patches along the first axis that hold content; the rest is padding, whose codes are cut.
    extent: of a raw clip whose values are not yet laid out in patches: what `Modality.finish` needs to know of its
        length; 0 elsewhere.
    start_s, duration_s: seconds of content from the beginning of the source and in this window; none without time.
    """

    values: torch.Tensor
    grid: dict[str, int]
    valid: int
    start_s: float | None = None
    duration_s: float | None = None
    extent: int = 0

    @property
    def positions(self) -> int:
        """Positions of the grid that are content: the first ones, the grid being row-major with `valid` outermost."""
        steps, *rest = self.grid.values()
        return min(self.valid, steps) * math.prod(rest)


class ClipError(RefusedError):
    """Content that cannot become a clip. The message names what was found, what was expected and what to do."""


class UndecodableError(ClipError):
    """Corrupt, truncated, empty or not finite."""


class WrongKindError(ClipError):
    """A kind of file that the modality does not take."""


class TooLargeError(ClipError):
    """Above a limit; the message names the limit and its value."""


class Limits(Settings):
    """Bounds on what a decoder may be asked to unfold, checked before and while decoding."""

    max_bytes: Annotated[int, Field(gt=0)] = 512_000_000
    """Encoded bytes of one item."""
    max_seconds: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds of sound or video."""
    max_pixels: Annotated[int, Field(gt=0)] = 50_000_000
    """Pixels of one picture or frame."""
    max_frames: Annotated[int, Field(gt=0)] = 36_000
    """Frames of a video that may be decoded."""


class Description(Protocol):
    """What a modality's clips are, and which files it takes: all that is known without a decoder and without torch.

    Construct with ``(settings, limits)``.
    """

    name: ClassVar[str]
    axes: ClassVar[tuple[str, ...]]
    """Names of the grid's axes, the first one being time where time exists."""
    extensions: ClassVar[tuple[str, ...]]
    """File name endings (lower case, no dot) of the shard members it reads, by preference."""
    settings_class: ClassVar[type[Settings]]
    channels: ClassVar[int]
    deviation: ClassVar[float]
    """Standard deviation of a clip's values where `settings.mean` and `std` are those of the data."""

    raw_is_small: ClassVar[bool]
    """Whether raw values take less room than finished ones, so that training has them from its loaders."""

    settings: Any
    limits: Limits

    @property
    def patch(self) -> tuple[int, ...]:
        """Size of a patch along each axis."""
        ...

    @property
    def grid(self) -> dict[str, int]:
        """Patches along each axis of a training clip."""
        ...

    @property
    def positions_per_second(self) -> float | None:
        """Grid positions per second of content; none where there is no time."""
        ...

    @classmethod
    def recognises(cls, head: bytes) -> bool:
        """Whether the first 4 KiB of a file look like this modality's (by content, never by name)."""
        ...


class Modality(Description, Protocol):
    """A modality: bytes in, `Clip`s out. One file in this folder implements it; the registry names the file.

    Construct with ``(settings, limits, raw)``. Stateless after construction: safe to share between threads and to
    pickle. `raw`: its clips end before the last steps, which `finish` does for a whole batch, on whatever device.
    """

    raw: bool

    def training_clip(self, data: bytes, rng: np.random.Generator) -> Clip:
        """One augmented clip of the training size; all randomness comes from `rng`.

        Raises:
            ClipError
        """
        ...

    def windows(self, data: bytes) -> Iterator[Clip]:
        """Consecutive clips of the training size that cover the whole content, no augmentation; the last is padded.

        Raises:
            ClipError
        """
        ...

    def finish(self, values: torch.Tensor, extent: torch.Tensor | None) -> torch.Tensor:
        """Raw clips as a model takes them: float32 ``[B, C, *size]``, on the device of `values`.

        values: ``[B, ...]`` of a raw modality's clips; extent: int64 ``[B]`` of the same, none where all are 0.
        """
        ...

    @property
    def features(self) -> dict[str, Any]:
        """Settings that the values of `content` depend on."""
        ...

    def content(self, clip: Clip) -> torch.Tensor:
        """float32 ``[channels, n]``: values of a clip's content, before `settings.mean` and `std` normalise them."""
        ...

    def rate(self, data: bytes) -> str | None:
        """What a file's header says of its rate or size, for people; none where it says nothing.

        Raises:
            ClipError
        """
        ...

    def picture(self, clip: Clip) -> np.ndarray:
        """For people: uint8 ``[H, W, 3]`` of a clip, or ``[T, H, W, 3]`` where a clip has frames. Axis order for
        audio: frequency upwards, time to the right."""
        ...

    def audible(self, data: bytes, seconds: float) -> bytes | None:
        """For people: the first `seconds` of the content as an mp3 file, 16 kHz mono; none where it is not sound."""
        ...


def check_size(size: tuple[int, ...], patch: tuple[int, ...]) -> None:
    """Raises ValueError unless every side is a multiple of the patch's."""
    if any(side % step for side, step in zip(size, patch, strict=True)):
        raise ValueError(f"size {size} is not a multiple of patch {patch}; choose one that is")
