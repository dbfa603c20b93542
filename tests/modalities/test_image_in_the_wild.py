"""Pictures as public bug reports have them: good ones become clips, others are refused by name."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL import PngImagePlugin

from bridle.modalities import build_modality
from bridle.modalities.clip import ClipError, UndecodableError, WrongKindError


def picture() -> Pillow.Image:
    x = np.broadcast_to(np.linspace(0, 255, 320), (240, 320))
    return Pillow.fromarray(np.stack([x, x[:, ::-1], np.full_like(x, 64)], -1).astype(np.uint8))


def encode(kind: str, image: Pillow.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, kind, **options)
    return buffer.getvalue()


def values(data: bytes) -> np.ndarray:
    (clip,) = build_modality("image", {}).windows(data)
    return clip.values.numpy()


def chunk(name: bytes, content: bytes, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


def with_chunk(added: bytes) -> bytes:
    png = encode("PNG")
    return png[:33] + added + png[33:]  # behind IHDR


@pytest.mark.parametrize(
    "added",
    [
        chunk(b"iTXt", b"workflow\0\x01\0\0\0" + zlib.compress(b"node " * 700_000)),
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"node " * 700_000)),
        chunk(b"tEXt", b"parameters\0" + b"x" * 3_000_000),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2_100_000))),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(os.urandom(2_100_000))),
        chunk(b"tEXt", b"Comment\0made by hand", checksum=1),
        chunk(b"eXIf", b"MM\0*\0\0\0\x08", checksum=1),
        chunk(b"zTXt", b"broken\0\0" + b"no zlib"),
    ],
)
def test_what_stands_beside_the_pixels_of_a_png_changes_nothing(added: bytes) -> None:
    assert (values(with_chunk(added)) == values(encode("PNG"))).all()


def test_a_real_workflow_in_a_png_is_no_obstacle() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("workflow", "{}" * 1_600_000, zip=True)
    assert (values(encode("PNG", pnginfo=info)) == values(encode("PNG"))).all()


def test_a_bad_checksum_of_the_pixels_is_still_refused() -> None:
    png = bytearray(with_chunk(chunk(b"tEXt", b"Comment\0x", checksum=1)))
    png[png.index(b"IDAT") + 40] ^= 1
    with pytest.raises(UndecodableError, match="corrupt or truncated"):
        values(bytes(png))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "AVIF"])
def test_further_formats_give_the_same_picture(kind: str) -> None:
    options = {"quality": 95} if kind == "AVIF" else {}
    found, expected = values(encode(kind, **options)), values(encode("PNG"))
    assert np.abs(found - expected).mean() < (0.2 if kind == "GIF" else 0.05)  # which has 256 colours
    modality = build_modality("image", {})
    assert modality.recognises(encode(kind)[:4096])
    assert modality.training_clip(encode(kind), np.random.default_rng(0)).values.shape == (3, 224, 224)


def test_the_first_frame_stands_for_an_animation() -> None:
    still = picture().quantize(256).convert("RGB")
    moving = encode("GIF", still, save_all=True, append_images=[Pillow.new("RGB", (320, 240), "red")])
    assert np.abs(values(moving) - values(encode("PNG", still))).mean() < 0.1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_whose_scale_nobody_knows_are_refused(mode: str) -> None:
    with pytest.raises(WrongKindError, match="TIFF of 32 bits a channel"):
        values(encode("TIFF", Pillow.new(mode, (64, 64), 1_000)))


@pytest.mark.parametrize(
    ("head", "named"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC picture"),
        (b"\xff\x0a\xfa\x1f", "a JPEG XL picture"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 picture"),
        (b"<?xml version='1.0'?><svg>", "an SVG drawing"),
        (b"8BPS\0\x01", "a Photoshop file"),
    ],
)
def test_what_is_not_read_is_refused_by_name(head: bytes, named: str) -> None:
    with pytest.raises(WrongKindError, match=f"found {named}.*; expected a JPEG"):
        values(head + bytes(300))


def test_no_object_of_ours_is_shown_in_an_error() -> None:
    for data in (b"\x89PNG\r\n\x1a\n" + bytes(100), b"GIF89a" + bytes(3), b"BM" + bytes(50), b"II*\0" + bytes(20)):
        with pytest.raises(ClipError) as raised:
            values(data)
        assert "object at 0x" not in str(raised.value) and "BytesIO" not in str(raised.value)
