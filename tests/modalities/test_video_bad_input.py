"""Videos that point elsewhere, lie, bomb or break: a clear error, no hang, nothing opened."""

from __future__ import annotations

import io
import struct
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from encoded_video import encode_video, frame_number
from mutated_files import VIDEOS, modality_for, mutants, original, outcomes
from PIL import Image

from bridle.modalities import build_modality
from bridle.modalities.clip import ClipError, Limits, Modality, TooLargeError, UndecodableError, WrongKindError
from bridle.modalities.video_decode import PyAVSource

SMALL = {"frames": 8, "stride": 2, "size": [64, 96], "isolate": False}


def video(limits: Limits | None = None, **clip: object) -> Modality:
    return build_modality("video", SMALL | clip, limits)


def refused_both_ways(data: bytes, kind: type[ClipError], message: str, limits: Limits | None = None) -> None:
    with pytest.raises(kind, match=message):
        list(video(limits).windows(data))
    with pytest.raises(kind, match=message):
        video(limits).training_clip(data, np.random.default_rng(0))


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{target}'\n",
        '<?xml version="1.0"?><MPD><Period><BaseURL>{target}</BaseURL></Period></MPD>',
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        "\ufeff\n#EXTM3U\n{target}\n",
    ],
)
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_playlists_are_refused_and_what_they_name_is_not_opened(text: str, decoder: str, tmp_path: Path) -> None:
    target = tmp_path / "other.mp4"
    target.write_bytes(encode_video(20))
    accessed = target.stat().st_atime_ns
    data = text.format(target=target).encode()
    for isolate in (False, True):
        modality = video(decoder=decoder, isolate=isolate)
        assert not modality.recognises(data)
        with pytest.raises(WrongKindError, match="playlist, which points to other files, is never followed"):
            next(modality.windows(data))
    assert target.stat().st_atime_ns == accessed


def test_a_playlist_behind_a_films_first_bytes_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "other.mp4"
    target.write_bytes(encode_video(20))
    for head in (b"\0\0\0\x18ftypisom", b"\x1a\x45\xdf\xa3", b"RIFF\0\0\0\0AVI "):
        refused_both_ways(head + f"\nffconcat version 1.0\nfile '{target}'\n".encode(), UndecodableError, "corrupt")


def test_empty_file_is_refused() -> None:
    refused_both_ways(b"", UndecodableError, "0 bytes")


@pytest.mark.parametrize(
    "head", [b"fLaC\0", b"RIFF\x24\0\0\0WAVEfmt ", b"\xff\xd8\xff\xe0", b"G@\0\x10" * 50, b"\0\0\0\x20ftypM4A "]
)
def test_other_kinds_are_refused(head: bytes) -> None:
    assert not video().recognises(head)
    refused_both_ways(head + bytes(500), WrongKindError, "expected mp4, mov, webm, mkv or avi")


def sound_only(cover: bool) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        if cover:
            picture = output.add_stream("mjpeg", rate=1)
            picture.width = picture.height = 32
            picture.pix_fmt = "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if cover:
            output.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
            output.mux(picture.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize("cover", [False, True])
def test_mp4_with_sound_only_has_no_pictures_even_with_a_cover(cover: bool) -> None:
    refused_both_ways(sound_only(cover), WrongKindError, "no picture stream")


def test_codecs_off_the_list_do_not_run() -> None:
    refused_both_ways(encode_video(5, container="matroska", codec="ffv1"), WrongKindError, "codec is ffv1")


@pytest.mark.parametrize("kind", VIDEOS)
@pytest.mark.parametrize("keep", [0.01, 0.3, 0.8])
def test_truncated_video_is_refused_or_gives_its_beginning(kind: str, keep: float) -> None:
    data = encode_video(40, **VIDEOS[kind])
    part, modality = data[: int(len(data) * keep)], video()
    try:
        numbers = [frame_number(picture) for clip in modality.windows(part) for picture in modality.picture(clip)]
    except UndecodableError:
        return
    assert kind in {"mkv", "webm", "avi"} and keep > 0.01  # mp4 keeps its index at its end
    assert numbers == sorted(numbers) and set(numbers) <= set(range(0, 40, 2))


def test_limits_are_checked_from_the_header_and_named() -> None:
    data = encode_video(40)
    refused_both_ways(data, TooLargeError, "max_pixels = 1,000", Limits(max_pixels=1000))
    refused_both_ways(data, TooLargeError, "max_frames = 30", Limits(max_frames=30))
    refused_both_ways(data, TooLargeError, "max_seconds = 1.5", Limits(max_seconds=1.5))
    refused_both_ways(data, TooLargeError, "max_bytes = 100", Limits(max_bytes=100))


def test_frames_are_counted_where_the_header_does_not_say() -> None:
    for kind in ("mkv", "webm"):
        data = encode_video(40, **VIDEOS[kind])
        with av.open(io.BytesIO(data)) as container:
            assert container.streams.video[0].frames == 0
        refused_both_ways(data, TooLargeError, "max_frames = 30", Limits(max_frames=30))


@pytest.mark.parametrize("lie", [1, 7, 39, 41, 4000])
def test_avi_header_that_lies_about_its_frames_changes_nothing(lie: int) -> None:
    data = bytearray(encode_video(40, **VIDEOS["avi"]))
    struct.pack_into("<I", data, data.index(b"avih") + 8 + 16, lie)  # dwTotalFrames
    struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, lie)  # dwLength
    assert PyAVSource(bytes(data), Limits()).count == 40
    modality = video()
    numbers = [frame_number(modality.picture(clip)[0]) for clip in modality.windows(bytes(data))]
    assert numbers == [0, 16, 32]


@pytest.mark.parametrize(("count", "size"), [(1 << 30, 0), (4000, 0), (4000, 50), (1 << 30, 1)])
def test_mp4_index_that_lies_about_its_frames_is_refused_at_once(count: int, size: int) -> None:
    data = bytearray(encode_video(40))
    at = data.index(b"stsz")
    struct.pack_into(">II", data, at + 8, size, count)
    struct.pack_into(">I", data, data.index(b"stts") + 12, count)
    begin = time.monotonic()
    try:
        clips = list(video(Limits(max_frames=5000)).windows(bytes(data)))
        assert sum(clip.valid for clip in clips) <= 40
    except ClipError:
        pass
    assert time.monotonic() - begin < 5


def test_mp4_that_claims_a_small_picture_is_measured_by_its_stream() -> None:
    data = bytearray(encode_video(20))
    at = data.index(b"avc1", data.index(b"stsd"))
    struct.pack_into(">HH", data, at + 28, 16, 16)
    refused_both_ways(bytes(data), TooLargeError, "max_pixels = 1,000", Limits(max_pixels=1000))


def grows_on_the_way() -> bytes:
    """VP8 whose second half is nine times as large as its header says."""
    buffer = io.BytesIO()
    options = {
        "container": "webm",
        "codec": "libvpx",
        "options": {"cpu-used": "8", "deadline": "realtime", "b": "900k"},
    }
    halves = [encode_video(20, size=size, **options) for size in ((64, 96), (192, 288))]
    with av.open(buffer, "w", format="webm") as output:
        stream = None
        for number, half in enumerate(halves):
            with av.open(io.BytesIO(half)) as source:
                stream = stream or output.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.pts += 800 * number
                        packet.dts = packet.pts
                        packet.stream = stream
                        output.mux(packet)
    return buffer.getvalue()


def test_video_that_grows_on_the_way_is_followed_within_the_limit() -> None:
    modality, data = video(), grows_on_the_way()
    numbers = [frame_number(picture) for clip in modality.windows(data) for picture in modality.picture(clip)]
    assert numbers[:10] == numbers[10:20] == list(range(0, 20, 2))
    with pytest.raises(ClipError):
        list(video(Limits(max_pixels=10_000)).windows(data))


def test_memory_of_a_huge_picture_is_bounded_by_the_child() -> None:
    data = encode_video(3, size=(2160, 3840), gop=1)
    generous = Limits(max_pixels=100_000_000)
    modest = build_modality("video", {"frames": 2, "stride": 1, "decode_memory_mb": 8}, generous)
    with pytest.raises(ClipError):  # FFmpeg does not always say that it was memory
        next(modest.windows(data))
    enough = build_modality("video", {"frames": 2, "stride": 1, "decode_memory_mb": 1024}, generous)
    assert next(enough.windows(data)).values.shape == (3, 2, 224, 224)


def test_jpeg_named_mp4_is_an_image() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    refused_both_ways(buffer.getvalue(), WrongKindError, "expected mp4")
    assert build_modality("image", {}).recognises(buffer.getvalue()[:4096])


@pytest.mark.parametrize("kind", VIDEOS)
def test_mutated_videos_give_clips_or_clear_errors(kind: str) -> None:
    found, longest = outcomes(modality_for(kind), mutants(original(kind), 30, seed=11))
    assert sum(found.values()) == 30 and longest < 10 and found["clips"] < 30


def test_wrong_pictures_are_never_not_finite() -> None:
    modality = video()
    for data in mutants(original("avi"), 10, seed=2):
        try:
            for clip in modality.windows(data):
                assert torch.isfinite(clip.values).all()
        except ClipError as error:
            assert str(error).startswith("video: ")
