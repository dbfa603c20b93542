"""Pictures become one normalised clip each: of an animation its first frame. Pillow decodes, torchvision resizes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from PIL import UnidentifiedImageError
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from bridle.modalities.clip import Clip, ClipError, Limits, TooLargeError, UndecodableError, WrongKindError
from bridle.modalities.image_description import ImageDescription, ImageSettings
from bridle.modalities.image_png import SIGNATURE, pixels_only

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What Pillow may try. Its other parsers are never reached by a stranger's bytes."""

TAKES = "expected a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"
OTHERS = (
    ("a HEIC picture; convert it to JPEG or PNG", lambda head: head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"mif")),
    ("a JPEG XL picture; convert it to PNG", lambda head: head.startswith((b"\xff\n", b"\0\0\0\x0cJXL "))),
    ("a JPEG 2000 picture; convert it to PNG", lambda head: head.startswith((b"\0\0\0\x0cjP  ", b"\xffO\xffQ"))),
    ("an SVG drawing; draw it to PNG", lambda head: b"<svg" in head),
    ("a PDF; draw its pages to PNG", lambda head: head.startswith(b"%PDF")),
    ("a Photoshop file; export it as PNG", lambda head: head.startswith(b"8BPS")),
)
"""Kinds that are refused by name."""

STRIP = 256
"""Rows of a transparent picture that are laid over white at once."""
DRAFT_MARGIN = 2.0
"""A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the crop then still has this many times the clip's pixels
along both axes (the margin Pillow's own thumbnails keep)."""

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_270,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # on damaged tags, which nothing here reads
warnings.filterwarnings("error", category=Pillow.DecompressionBombWarning)

Box = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels."""


class Image(ImageDescription):
    """Implements `Modality` for pictures."""

    def __init__(self, settings: ImageSettings, limits: Limits | None = None, raw: bool = False) -> None:
        """raw: clips are uint8, before they are normalised."""
        super().__init__(settings, limits or Limits())
        self.raw = raw

    def training_clip(self, data: bytes, rng: np.random.Generator) -> Clip:
        """A random resized crop (bicubic, antialiased), flipped left to right at random.

        Raises:
            UndecodableError, WrongKindError, TooLargeError
        """
        image, orientation = self._open(data)
        box = random_box(_upright_size(image, orientation), self.settings, rng)
        return self._clip(image, orientation, box, flip=bool(rng.random() < self.settings.flip))

    def windows(self, data: bytes) -> Iterator[Clip]:
        """One clip: the short side resized to the clip's, and the centre cropped.

        Raises:
            UndecodableError, WrongKindError, TooLargeError
        """
        image, orientation = self._open(data)
        yield self._clip(image, orientation, centre_box(_upright_size(image, orientation), self.settings.size))

    def finish(self, values: torch.Tensor, extent: torch.Tensor | None) -> torch.Tensor:
        """uint8 ``[B, 3, H, W]``, normalised."""
        return normalise(values, self.settings.mean, self.settings.std, axes=2)

    @property
    def features(self) -> dict[str, Any]:
        return {}

    def content(self, clip: Clip) -> torch.Tensor:
        """float32 ``[3, n]``: red, green and blue in 0..1."""
        return unscaled(clip.values, self.settings.mean, self.settings.std)

    def rate(self, data: bytes) -> str | None:
        """The stored width and height."""
        return "{} x {}".format(*self._open(data)[0].size)

    def picture(self, clip: Clip) -> np.ndarray:
        """uint8 [H, W, 3]."""
        return denormalise(clip.values, self.settings.mean, self.settings.std)

    def audible(self, data: bytes, seconds: float) -> bytes | None:
        """None: no sound is read."""
        return None

    def _open(self, data: bytes) -> tuple[Pillow.Image, int]:
        """A picture whose header was read and found within the limits, and its EXIF orientation (1 to 8)."""
        if not data:
            raise UndecodableError(f"image: the file is empty (0 bytes); {TAKES}")
        if len(data) > self.limits.max_bytes:
            raise TooLargeError(
                f"image: {len(data):,} bytes are above the limit max_bytes = {self.limits.max_bytes:,}; send fewer"
            )
        if not self.recognises(data[:4096]):
            raise WrongKindError(f"image: found {_named(data)}; {TAKES}")
        data = pixels_only(data) if data.startswith(SIGNATURE) else data
        with _pillow_errors():
            image = Pillow.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > self.limits.max_pixels:
            raise TooLargeError(
                f"image: {width} x {height} pixels are above the limit max_pixels = {self.limits.max_pixels:,}; "
                "send a smaller picture"
            )
        if image.mode in ("I", "F"):
            fix = "save it with 8 or 16 bits a channel"
            raise WrongKindError(f"image: {image.format} of 32 bits a channel, whose scale no header tells; {fix}")
        if image.format == "PNG":
            with _pillow_errors():
                image.verify()  # checksums of every chunk: decoding alone skips those of the pixels
                image = Pillow.open(io.BytesIO(data), formats=FORMATS)
        return image, _orientation(image)

    def _clip(self, image: Pillow.Image, orientation: int, box: Box, *, flip: bool = False) -> Clip:
        """The box of the upright picture, resized to the clip's size and normalised."""
        height, width = self.settings.size
        with _pillow_errors():
            full = _upright_size(image, orientation)
            _draft(image, box, (height, width))
            image.load()
            if orientation in _UPRIGHT:
                image = image.transpose(_UPRIGHT[orientation])
            pixels = functional.pil_to_tensor(_rgb(image, _rescale(box, full, image.size)))
        pixels = functional.resize(
            pixels, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True
        )  # uint8 [3, H, W]
        if flip:
            pixels = functional.horizontal_flip(pixels)
        values = pixels.contiguous() if self.raw else normalise(pixels, self.settings.mean, self.settings.std, axes=2)
        return Clip(values=values, grid=self.grid, valid=self.grid["height"])


class _pillow_errors:  # noqa: N801  (reads as a statement: with _pillow_errors())
    """Turns whatever Pillow's parsers raise into a `ClipError`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, ClipError) or not isinstance(error, Exception):
            return
        if isinstance(error, (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning)):
            raise TooLargeError(
                f"image: above the limit PIL.Image.MAX_IMAGE_PIXELS = {Pillow.MAX_IMAGE_PIXELS}"
            ) from error
        if isinstance(error, MemoryError):
            raise TooLargeError("image: decoding needs more memory than this process may take") from error
        if isinstance(error, UnidentifiedImageError):  # whose text shows an object of this program's
            raise UndecodableError(
                "image: corrupt or truncated: its header is not one of a picture; replace it"
            ) from error
        # Pillow's parsers raise SyntaxError, struct.error, zlib.error, IndexError, ... as the bytes provoke.
        raise UndecodableError(f"image: corrupt or truncated ({type(error).__name__}: {error})") from error


def _named(data: bytes) -> str:
    """What a refused file seems to be."""
    known = next((name for name, fits in OTHERS if fits(data[:512])), None)
    return known or f"a file that begins {data[:12]!r}"


def random_box(size: tuple[int, int], settings: ImageSettings, rng: np.random.Generator) -> Box:
    """The crop of torchvision's RandomResizedCrop.get_params, drawn from `rng`; `size` is (width, height).

    `ratio` counts against the clip's own shape, so that a clip that is not square is not stretched on average.
    """
    width, height = size
    aspect = settings.size[1] / settings.size[0]
    low, high = np.log(settings.ratio)
    for _ in range(10):
        area = width * height * rng.uniform(*settings.scale)
        shape = aspect * np.exp(rng.uniform(low, high))
        w, h = round(float(np.sqrt(area * shape))), round(float(np.sqrt(area / shape)))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return centre_box(size, settings.size)


def centre_box(size: tuple[int, int], target: tuple[int, int]) -> Box:
    """The largest centred box of the target's shape; `size` is (width, height), `target` (height, width)."""
    width, height = size
    scale = min(width / target[1], height / target[0])
    w, h = max(1, round(target[1] * scale)), max(1, round(target[0] * scale))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def normalise(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], axes: int) -> torch.Tensor:
    """uint8 ``[..., 3, *size]``, of so many `axes` behind the colour, to float32 ``(x / 255 - mean) / std``."""
    scale, shift = _affine(mean, std, axes, pixels.device)
    return pixels.contiguous().to(torch.float32).mul_(scale).add_(shift)


@lru_cache(maxsize=32)
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], axes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and summand, float32 ``[3, 1, ...]``; kept on the device, so that no batch waits for a copy."""
    deviation = torch.tensor(std, dtype=torch.float32)
    scale, shift = 1 / (255 * deviation), -torch.tensor(mean, dtype=torch.float32) / deviation
    return tuple(part.view(-1, *(1,) * axes).to(device) for part in (scale, shift))  # type: ignore[return-value]


def unscaled(values: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """float32 ``[3, *size]`` back to 0..1, float32 ``[3, n]``."""
    return values.flatten(1) * torch.tensor(std)[:, None] + torch.tensor(mean)[:, None]


def denormalise(values: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """float32 ``[3, *size]`` back to uint8 ``[*size, 3]``."""
    pixels = values.detach().cpu().float().movedim(0, -1)
    pixels = (pixels * torch.tensor(std) + torch.tensor(mean)) * 255
    return pixels.round_().clamp_(0, 255).to(torch.uint8).numpy()


def _orientation(image: Pillow.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block leaves a good picture good
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def _upright_size(image: Pillow.Image, orientation: int) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if orientation in _SIDEWAYS else (width, height)


def _draft(image: Pillow.Image, box: Box, target: tuple[int, int]) -> None:
    """Lets libjpeg decode a large JPEG at a fraction of its size; does nothing to other formats."""
    factor = min((box[2] - box[0]) / target[1], (box[3] - box[1]) / target[0]) / DRAFT_MARGIN
    if factor >= 2:
        image.draft(None, (int(image.size[0] / factor), int(image.size[1] / factor)))


def _rescale(box: Box, size: tuple[int, int], found: tuple[int, int]) -> Box:
    """The box in a picture that was decoded at `found` in place of `size`."""
    if size == found:
        return box
    x, y = found[0] / size[0], found[1] / size[1]
    left, top = int(box[0] * x), int(box[1] * y)
    right, bottom = max(left + 1, round(box[2] * x)), max(top + 1, round(box[3] * y))
    return left, top, min(right, found[0]), min(bottom, found[1])


def _rgb(image: Pillow.Image, box: Box) -> Pillow.Image:
    """The box as RGB: transparent parts over white, 16-bit greys by their high byte."""
    image = image if box == (0, 0, *image.size) else image.crop(box)
    if image.mode.startswith("I;16"):
        image = Pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        flat = Pillow.new("RGB", image.size)
        for top in range(0, image.height, STRIP):  # in one go, three more copies of the picture would be in memory
            part = image.crop((0, top, image.width, min(top + STRIP, image.height))).convert("RGBA")
            white = Pillow.new("RGBA", part.size, "white")
            flat.paste(Pillow.alpha_composite(white, part).convert("RGB"), (0, top))
        return flat
    return image.convert("RGB")
