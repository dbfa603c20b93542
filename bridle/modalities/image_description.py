"""What clips of pictures are: settings, grid, and which files are pictures. Needs no decoder and no torch."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from bridle.modalities.clip import EXTENSIONS, Limits, check_size
from bridle.modalities.image_png import SIGNATURE
from bridle.settings import Settings

MAGICS = (b"\xff\xd8\xff", SIGNATURE, b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*")

Pixels = Annotated[int, Field(gt=0)]


class ImageSettings(Settings):
    """The `clip` section of an image recipe."""

    size: tuple[Pixels, Pixels] = (224, 224)
    """Height and width of a clip; multiples of the patch."""
    patch: tuple[Pixels, Pixels] = (16, 16)
    """Height and width of a patch."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from red, green and blue in 0..1; ImageNet's."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divides red, green and blue after that; ImageNet's."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Pretraining: least and greatest share of the picture's area in a random crop."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Pretraining: least and greatest stretch of a random crop against the clip's own shape."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Pretraining: probability of a horizontal flip."""

    @model_validator(mode="after")
    def _fits(self) -> ImageSettings:
        check_size(self.size, self.patch)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {self.scale}: expected 0 < least <= greatest <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {self.ratio}: expected 0 < least <= greatest")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std}: expected three figures above 0")
        return self


class ImageDescription:
    """See `bridle.modalities.clip.Description`."""

    name: ClassVar[str] = "image"
    axes: ClassVar[tuple[str, ...]] = ("height", "width")
    extensions: ClassVar[tuple[str, ...]] = EXTENSIONS["image"]
    settings_class: ClassVar[type[Settings]] = ImageSettings
    channels: ClassVar[int] = 3
    deviation: ClassVar[float] = 1.0
    raw_is_small: ClassVar[bool] = True

    def __init__(self, settings: ImageSettings, limits: Limits) -> None:
        self.settings = settings
        self.limits = limits

    @property
    def patch(self) -> tuple[int, ...]:
        """Height and width of a patch."""
        return self.settings.patch

    @property
    def grid(self) -> dict[str, int]:
        """Patches down and across."""
        size, patch = self.settings.size, self.settings.patch
        return {axis: side // step for axis, side, step in zip(self.axes, size, patch, strict=True)}

    @property
    def positions_per_second(self) -> float | None:
        """None: a picture has no time."""
        return None

    @classmethod
    def recognises(cls, head: bytes) -> bool:
        """JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF by their first bytes."""
        webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
        avif = head[4:8] == b"ftyp" and b"avif" in _brands(head)
        return webp or avif or head.startswith(MAGICS)


def _brands(head: bytes) -> bytes:
    """The brands of an ISO file (ISO 14496-12, ftyp), one after another."""
    return head[8 : min(int.from_bytes(head[:4], "big"), 256)]
