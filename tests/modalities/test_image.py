"""Pictures become clips: formats, geometry, augmentation, and what is refused."""

from __future__ import annotations

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from bridle.modalities import build_modality
from bridle.modalities.clip import ClipError, Limits, TooLargeError, UndecodableError, WrongKindError
from bridle.modalities.image import centre_box, random_box
from bridle.modalities.image_description import ImageSettings
from bridle.settings import RecipeError


def gradient(width: int = 320, height: int = 240) -> Pillow.Image:
    """Red grows to the right, green downwards: every place has its own colour."""
    x = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    y = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Pillow.fromarray(np.stack([x, y, np.full_like(x, 64)], -1).astype(np.uint8))


def encode(picture: Pillow.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def tokenizing_picture(data: bytes, **clip: object) -> np.ndarray:
    modality = build_modality("image", clip)
    (window,) = modality.windows(data)
    return modality.picture(window).astype(int)


def png(width: int, height: int, body: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", body or zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(224, 224), (64, 128), (160, 96)])
def test_clip_has_the_asked_size_grid_and_no_time(size: tuple[int, int]) -> None:
    modality = build_modality("image", {"size": size})
    (clip,) = modality.windows(encode(gradient()))
    assert clip.values.shape == (3, *size) and clip.values.dtype == torch.float32 and clip.values.is_contiguous()
    assert clip.grid == modality.grid == {"height": size[0] // 16, "width": size[1] // 16}
    assert clip.valid == size[0] // 16 and clip.start_s is None and clip.duration_s is None
    assert modality.picture(clip).shape == (*size, 3)


def test_values_are_normalised_by_mean_and_std() -> None:
    modality = build_modality("image", {"size": [32, 32]})
    (clip,) = modality.windows(encode(Pillow.new("RGB", (40, 40), (255, 0, 128))))
    expected = (np.array([1, 0, 128 / 255]) - modality.settings.mean) / modality.settings.std
    assert np.allclose(clip.values.mean((1, 2)), expected, atol=1e-5)
    assert (modality.picture(clip) == [255, 0, 128]).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_every_format_gives_the_same_picture(kind: str) -> None:
    found = tokenizing_picture(encode(gradient(), kind, quality=95))
    assert np.abs(found - tokenizing_picture(encode(gradient()))).mean() < 3


def test_cmyk_palette_and_grey_pictures_are_read() -> None:
    truth = tokenizing_picture(encode(gradient()))
    cmyk = encode(gradient().convert("CMYK"), "JPEG", quality=95)
    palette = encode(gradient().quantize(256), "PNG")
    assert np.abs(tokenizing_picture(cmyk) - truth).mean() < 3
    assert np.abs(tokenizing_picture(palette) - truth).mean() < 8
    grey = tokenizing_picture(encode(gradient().convert("L")))
    assert np.abs(grey[..., 0] - grey[..., 2]).max() == 0 and np.ptp(grey) > 100


def test_16_bit_grey_keeps_its_range() -> None:
    deep = np.broadcast_to(np.linspace(0, 65535, 320), (240, 320)).astype(np.uint16)
    shallow = (deep >> 8).astype(np.uint8)
    found = tokenizing_picture(encode(Pillow.fromarray(deep)))
    assert np.array_equal(found, tokenizing_picture(encode(Pillow.fromarray(shallow))))


def test_transparent_parts_show_white() -> None:
    rgba = Pillow.new("RGBA", (64, 64), (255, 0, 0, 0))
    rgba.paste((0, 0, 255, 255), (0, 0, 32, 64))
    found = tokenizing_picture(encode(rgba), size=[64, 64])
    assert (found[:, 40:] == 255).all() and (found[:, :24] == [0, 0, 255]).all()
    palette = Pillow.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert (tokenizing_picture(encode(palette, transparency=1), size=[64, 64]) == 255).all()


def test_a_tall_transparent_picture_is_laid_over_white_to_its_last_row() -> None:
    rng = np.random.default_rng(0)
    rgba = Pillow.fromarray(rng.integers(0, 256, (600, 48, 4), dtype=np.uint8))
    flat = Pillow.alpha_composite(Pillow.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    size = [592, 48]
    assert np.array_equal(tokenizing_picture(encode(rgba), size=size), tokenizing_picture(encode(flat), size=size))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    inverse = {
        2: Pillow.Transpose.FLIP_LEFT_RIGHT,
        3: Pillow.Transpose.ROTATE_180,
        4: Pillow.Transpose.FLIP_TOP_BOTTOM,
        5: Pillow.Transpose.TRANSPOSE,
        6: Pillow.Transpose.ROTATE_90,
        7: Pillow.Transpose.TRANSVERSE,
        8: Pillow.Transpose.ROTATE_270,
    }
    stored = gradient().transpose(inverse[orientation]) if orientation in inverse else gradient()
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    found = tokenizing_picture(encode(stored, "PNG", exif=exif))
    assert np.array_equal(found, tokenizing_picture(encode(gradient())))


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_animated_picture_gives_its_first_frame(kind: str) -> None:
    frames = [gradient(), Pillow.new("RGB", (320, 240), "black"), Pillow.new("RGB", (320, 240), "white")]
    moving = encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert Pillow.open(io.BytesIO(moving)).n_frames == 3
    assert np.abs(tokenizing_picture(moving) - tokenizing_picture(encode(gradient()))).max() <= 1


def test_jpeg_named_png_is_read_by_its_content() -> None:
    jpeg = encode(gradient(), "JPEG")
    assert build_modality("image", {}).recognises(jpeg[:4096])
    assert tokenizing_picture(jpeg).shape == (224, 224, 3)  # no name reaches the decoder


def test_large_jpeg_decoded_small_looks_the_same() -> None:
    rng = np.random.default_rng(0)
    noise = Pillow.fromarray(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8)).resize(
        (2400, 1800), Pillow.Resampling.BICUBIC
    )
    jpeg = encode(noise, "JPEG", quality=92)
    whole = encode(Pillow.open(io.BytesIO(jpeg)).convert("RGB"))  # the same pixels, decoded at full size
    difference = np.abs(tokenizing_picture(jpeg) - tokenizing_picture(whole))
    assert difference.mean() < 1.0 and difference.max() <= 12


def test_tokenizing_crops_the_centre() -> None:
    wide = Pillow.new("RGB", (300, 100), "black")
    wide.paste("white", (100, 0, 200, 100))
    assert (tokenizing_picture(encode(wide), size=[64, 64]) >= 250).all()
    assert centre_box((300, 100), (64, 64)) == (100, 0, 200, 100)
    assert centre_box((100, 300), (64, 128)) == (0, 125, 100, 175)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (7, 5)])
def test_tiny_and_thin_pictures_are_read(size: tuple[int, int]) -> None:
    data = encode(Pillow.new("RGB", size, "red"))
    assert (tokenizing_picture(data) == [255, 0, 0]).all()
    clip = build_modality("image", {}).training_clip(data, np.random.default_rng(0))
    assert clip.values.shape == (3, 224, 224)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(0, 2**32 - 1), st.sampled_from([(224, 224), (64, 128)]))
def test_random_crops_stay_inside_with_the_stated_area_and_shape(
    width: int, height: int, seed: int, target: tuple[int, int]
) -> None:
    options = ImageSettings(size=target)
    left, top, right, bottom = random_box((width, height), options, np.random.default_rng(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    if min(width, height) >= 400 and 0.5 < width / height < 2:
        share = (right - left) * (bottom - top) / (width * height)
        stretch = (right - left) / (bottom - top) / (target[1] / target[0])
        assert 0.19 <= share <= 1 and 0.73 <= stretch <= 1.36


def test_augmentation_changes_the_clip_and_repeats_with_its_generator() -> None:
    modality, data = build_modality("image", {}), encode(gradient())
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    clips = [modality.training_clip(data, np.random.default_rng(seed)).values for seed in range(12)]
    again = modality.training_clip(data, np.random.default_rng(3)).values
    assert torch.equal(clips[3], again) and len({clip.numpy().tobytes() for clip in clips}) == 12
    assert torch.equal(before, torch.random.get_rng_state())
    mirrored = {bool(clip[0, :, 0].mean() > clip[0, :, -1].mean()) for clip in clips}
    assert mirrored == {True, False}


def test_same_clip_after_pickling() -> None:
    modality, data = build_modality("image", {}), encode(gradient())
    copy = pickle.loads(pickle.dumps(modality))
    assert torch.equal(next(copy.windows(data)).values, next(modality.windows(data)).values)


def test_empty_file_is_refused() -> None:
    with pytest.raises(UndecodableError, match="0 bytes"):
        next(build_modality("image", {}).windows(b""))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.9])
def test_truncated_picture_is_refused(kind: str, keep: float) -> None:
    rng = np.random.default_rng(0)
    data = encode(Pillow.fromarray(rng.integers(0, 256, (100, 100, 3), dtype=np.uint8)), kind)
    with pytest.raises(UndecodableError, match="corrupt or truncated"):
        next(build_modality("image", {}).windows(data[: int(len(data) * keep)]))


def test_corrupt_png_is_refused() -> None:
    data = bytearray(encode(gradient()))
    data[60:90] = bytes(30)
    with pytest.raises(UndecodableError, match="corrupt"):
        next(build_modality("image", {}).windows(bytes(data)))


@pytest.mark.parametrize(
    "head",
    [
        b"fLaC\0\0\0\x22",
        b"RIFF\x24\0\0\0WAVEfmt ",
        b"ID3\x04",
        b"\0\0\0\x18ftypheic",
        b"%PDF-1.7",
        b"%!PS-Adobe",
        b"#EXTM3U",
        b"<svg>",
    ],
)
def test_files_of_another_kind_are_refused(head: bytes) -> None:
    modality = build_modality("image", {})
    assert not modality.recognises(head)
    with pytest.raises(WrongKindError, match="expected a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"):
        next(modality.windows(head + bytes(200)))


def test_decompression_bomb_is_refused_from_its_header() -> None:
    with pytest.raises(TooLargeError, match="max_pixels = 50,000,000"):
        next(build_modality("image", {}).windows(png(8000, 8000)))
    small = build_modality("image", {}, Limits(max_pixels=1000))
    with pytest.raises(TooLargeError, match="max_pixels = 1,000"):
        small.training_clip(encode(gradient()), np.random.default_rng(0))
    generous = build_modality("image", {}, Limits(max_pixels=10**12))
    with pytest.raises(TooLargeError, match="MAX_IMAGE_PIXELS"):
        next(generous.windows(png(60000, 60000)))


@pytest.mark.parametrize("name", [b"tEXt", b"IDAT"])
def test_chunks_without_end_are_refused_once_there_are_too_many(name: bytes) -> None:
    header, rest = encode(gradient())[:33], encode(gradient())[33:]
    empty = struct.pack(">I", 0) + name + struct.pack(">I", zlib.crc32(name))
    with pytest.raises(TooLargeError, match="more than 10,000 chunks"):
        next(build_modality("image", {}).windows(header + 1_000_000 * empty + rest))


def test_too_many_bytes_are_refused() -> None:
    with pytest.raises(TooLargeError, match="max_bytes = 100"):
        next(build_modality("image", {}, Limits(max_bytes=100)).windows(encode(gradient())))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_a_good_picture_good() -> None:
    jpeg = encode(gradient(), "JPEG", quality=95, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(8))
    assert np.abs(tokenizing_picture(jpeg) - tokenizing_picture(encode(gradient()))).mean() < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_mutated_pictures_give_a_clip_or_a_clear_error(kind: str) -> None:
    rng = np.random.default_rng(7)
    data = encode(gradient(96, 64), kind)
    modality = build_modality("image", {"size": [32, 32]}, Limits(max_pixels=1_000_000))
    refused = 0
    for _ in range(30):
        damaged = bytearray(data[: len(data) if rng.random() < 0.7 else int(rng.integers(1, len(data)))])
        for _ in range(int(rng.integers(1, 8))):
            damaged[int(rng.integers(len(damaged)))] = int(rng.integers(256))
        try:
            (clip,) = modality.windows(bytes(damaged))
            assert clip.values.shape == (3, 32, 32) and torch.isfinite(clip.values).all()
        except ClipError:
            refused += 1
    assert refused > (0 if kind == "BMP" else 5)  # which has no checksum, and hardly a header


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ({"size": [225, 224]}, "not a multiple of patch"),
        ({"scale": [0.5, 0.2]}, "0 < least <= greatest <= 1"),
        ({"std": [0.0, 1.0, 1.0]}, "above 0"),
        ({"flips": 1}, "did you mean 'flip'"),
    ],
)
def test_wrong_settings_are_named(clip: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_modality("image", clip)
