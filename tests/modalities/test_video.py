"""Videos become clips: exact frames from every container, windows, augmentation, rotation, times."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from importlib import resources

import av
import numpy as np
import pytest
import torch
from encoded_video import encode_video, frame_number, frame_picture

from bridle.modalities import build_modality
from bridle.modalities.clip import Limits, WrongKindError
from bridle.modalities.video_decode import PyAVSource
from bridle.modalities.video_decord import DecordSource
from bridle.settings import RecipeError

SMALL = {"frames": 8, "stride": 2, "size": [64, 96], "isolate": False}

X265 = {"x265-params": "open-gop=1:keyint=12:bframes=3:log-level=none"}
KINDS = {
    "mp4-h264": {},
    "mp4-h264-open": {"options": {"x264-params": "open-gop=1:bframes=3:keyint=12"}},
    "mov-h264": {"container": "mov"},
    "mkv-h264": {"container": "matroska"},
    "mkv-hevc-open": {"container": "matroska", "codec": "libx265", "options": X265},
    "webm-vp9": {"container": "webm", "codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "webm-vp8-hidden": {
        "container": "webm",
        "codec": "libvpx",
        "options": {"cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "16", "b": "400k"},
    },
    "mp4-av1": {"codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "lp=1"}},
    "avi-mpeg4": {"container": "avi", "codec": "mpeg4", "options": {"b": "900k"}},
    "avi-h264-b": {"container": "avi"},
    "mov-mpeg2-b": {"container": "mov", "codec": "mpeg2video", "options": {"bf": "2", "b": "900k"}},
    "avi-mjpeg": {"container": "avi", "codec": "mjpeg", "pix_fmt": "yuvj420p"},
}


def rgb(frame: av.VideoFrame) -> np.ndarray:
    return frame.to_ndarray(format="rgb24")


def first_window(data: bytes, **clip: object) -> np.ndarray:
    modality = build_modality("video", SMALL | clip)
    return modality.picture(next(modality.windows(data)))


@pytest.mark.parametrize("kind", KINDS)
def test_picked_frames_equal_a_sequential_decode(kind: str) -> None:
    data = encode_video(**KINDS[kind])
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        truth = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame_number(picture) for picture in truth] == list(range(40))
    source = PyAVSource(data, Limits())
    assert source.count == 40
    for start in (0, 1, 7, 11, 12, 13, 23, 26, 30):
        indices = [start, start + 4, start + 9]
        picked = list(source.pick(indices, rgb))
        assert [frame.index for frame in picked] == indices
        for frame in picked:
            assert np.array_equal(frame.pixels, truth[frame.index]), (start, frame.index)
            assert frame.start_s == pytest.approx(frame.index / 25, abs=1e-3)
            assert frame.end_s == pytest.approx((frame.index + 1) / 25, abs=1.1e-3)
    walked = list(source.walk(3, rgb))
    assert [frame.index for frame in walked] == list(range(40))
    assert all((frame.pixels is None) == (frame.index % 3 > 0) for frame in walked)
    assert all(np.array_equal(frame.pixels, truth[frame.index]) for frame in walked[::3])


def test_seeking_into_a_video_decodes_no_more_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    source = PyAVSource(encode_video(60), Limits())
    decoded: list[int] = []
    sound = PyAVSource._sound
    monkeypatch.setattr(PyAVSource, "_sound", lambda self, frame: decoded.append(1) or sound(self, frame))
    assert len(list(source.pick([50, 54], rgb))) == 2
    assert len(decoded) < 20


def test_windows_cover_the_video_and_the_last_is_padded() -> None:
    modality = build_modality("video", SMALL)
    clips = list(modality.windows(encode_video(39)))
    assert [clip.values.shape for clip in clips] == [(3, 8, 64, 96)] * 3
    assert all(clip.values.dtype == torch.float32 and clip.values.is_contiguous() for clip in clips)
    assert clips[0].grid == modality.grid == {"time": 4, "height": 4, "width": 6}
    seen = [[frame_number(picture) for picture in modality.picture(clip)] for clip in clips]
    assert seen == [list(range(0, 16, 2)), list(range(16, 32, 2)), [32, 34, 36, 38, 38, 38, 38, 38]]
    assert [clip.valid for clip in clips] == [4, 4, 2]
    assert [clip.start_s for clip in clips] == pytest.approx([0, 0.64, 1.28])
    assert [clip.duration_s for clip in clips] == pytest.approx([0.64, 0.64, 0.28])


@pytest.mark.parametrize(("frames", "valid"), [(1, [1]), (2, [1]), (3, [1]), (5, [2]), (16, [4]), (17, [4, 1])])
def test_short_videos_repeat_their_last_frame(frames: int, valid: list[int]) -> None:
    modality, data = build_modality("video", SMALL), encode_video(frames)
    assert [clip.valid for clip in modality.windows(data)] == valid
    clip = modality.training_clip(data, np.random.default_rng(0))
    assert clip.values.shape == (3, 8, 64, 96) and clip.valid == valid[0]
    if frames < 3:
        assert torch.equal(clip.values[:, 0], clip.values[:, 7])


def test_variable_frame_rate_counts_frames_and_times_come_from_timestamps() -> None:
    times = [0, 10, 20, 500, 510, 520, 1500, 1510, *range(2000, 2000 + 12 * 100, 100)]
    data = encode_video(20, container="matroska", times_ms=times)
    modality = build_modality("video", SMALL | {"frames": 4, "stride": 2})
    clips = list(modality.windows(data))
    seen = [[frame_number(picture) for picture in modality.picture(clip)] for clip in clips]
    assert seen == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18, 18, 18]]
    assert [clip.start_s for clip in clips] == pytest.approx([0, 2.0, 2.8])
    assert [clip.duration_s for clip in clips][:2] == pytest.approx([2.0, 0.8])


def test_edit_list_is_honoured() -> None:
    data = bytearray(encode_video(40, options={"bf": "0"}))
    at = data.index(b"elst")
    duration, media_time = struct.unpack_from(">Ii", data, at + 12)
    step = 512  # ticks a frame: FFmpeg's muxer takes 12800 a second here
    struct.pack_into(">Ii", data, at + 12, duration - 400, media_time + 10 * step)
    source = PyAVSource(bytes(data), Limits())
    assert source.count == 30
    assert [frame_number(frame.pixels) for frame in source.walk(1, rgb)] == list(range(10, 40))
    assert [frame_number(frame.pixels) for frame in source.pick([0, 7], rgb)] == [10, 17]
    with pytest.raises(WrongKindError, match="edit list"):
        DecordSource(bytes(data), source)


def test_rotation_of_the_display_matrix_is_applied() -> None:
    data = bytearray(encode_video(4, size=(64, 64)))
    upright = first_window(bytes(data), size=[64, 64])[0].astype(int)
    matrix = data.index(b"tkhd") + 4 + 40  # version 0: a phone held upright turns the picture clockwise (ISO 14496-12)
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)
    turned = first_window(bytes(data), size=[64, 64])[0].astype(int)
    assert np.abs(turned - np.rot90(upright, -1)).mean() < 1
    assert np.abs(turned - np.rot90(upright, 1)).mean() > 10


MIRRORS = {
    "left and right": ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
    "up and down": ((1, 0, 0, -1), lambda frame: frame[::-1]),
    "over the diagonal": ((0, 1, 1, 0), lambda frame: frame.swapaxes(0, 1)),
    "over the other diagonal": ((0, -1, -1, 0), lambda frame: frame[::-1, ::-1].swapaxes(0, 1)),
}
"""a, b, c, d of the display matrix: (x, y) is shown at (a x + c y, b x + d y)."""


@pytest.mark.parametrize("which", MIRRORS)
def test_a_display_matrix_that_mirrors_is_applied(which: str) -> None:
    """Front cameras write such films."""
    (a, b, c, d), shown = MIRRORS[which]
    data = bytearray(encode_video(4, size=(64, 64)))
    stored = first_window(bytes(data), size=[64, 64])[0].astype(int)
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    found = first_window(bytes(data), size=[64, 64])[0].astype(int)
    assert np.abs(found - shown(stored)).mean() < 1
    with pytest.raises(WrongKindError, match="decord does not mirror"):
        DecordSource(bytes(data), PyAVSource(bytes(data), Limits()))


def test_rotated_video_is_cropped_to_the_clips_own_shape() -> None:
    data = bytearray(encode_video(4, size=(64, 96)))
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)
    turned = first_window(bytes(data), size=[96, 64])[0].astype(int)
    assert np.abs(turned - np.rot90(frame_picture(0), -1)).mean() < 12


def test_sound_beside_the_pictures_changes_nothing() -> None:
    silent = encode_video(20, container="matroska")
    buffer = io.BytesIO()
    with av.open(io.BytesIO(silent)) as source, av.open(buffer, "w", format="matroska") as output:
        pictures, sound = output.add_stream_from_template(source.streams.video[0]), output.add_stream("aac", rate=8000)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = pictures
                output.mux(packet)
        noise = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        noise.sample_rate, noise.pts = 8000, 0
        output.mux(sound.encode(noise))
        output.mux(sound.encode(None))
    assert np.array_equal(first_window(buffer.getvalue()), first_window(silent))


def test_training_clips_are_cropped_and_flipped_alike_in_all_frames_and_repeat_with_their_generator() -> None:
    modality = build_modality("video", SMALL | {"size": [64, 64], "stride": 1})
    still = encode_video(1, gop=1)
    starts, first_columns = set(), set()
    for seed in range(24):
        clip = modality.training_clip(still, np.random.default_rng(seed))
        assert all(torch.equal(clip.values[:, 0], clip.values[:, frame]) for frame in range(8))
        first_columns.add(clip.values[:, 0, :, 0].numpy().tobytes())
    assert len(first_columns) > 12
    moving = encode_video(40)
    state = torch.random.get_rng_state()
    for seed in range(12):
        clip = modality.training_clip(moving, np.random.default_rng(seed))
        assert torch.equal(clip.values, modality.training_clip(moving, np.random.default_rng(seed)).values)
        starts.add(clip.start_s)
    assert len(starts) > 6 and torch.equal(state, torch.random.get_rng_state())
    assert min(starts) >= 0 and max(starts) <= 32 / 25 + 1e-6


def test_flip_mirrors_the_whole_clip() -> None:
    still = encode_video(8)
    plain = build_modality("video", SMALL | {"flip": 0.0}).training_clip(still, np.random.default_rng(1))
    mirrored = build_modality("video", SMALL | {"flip": 1.0}).training_clip(still, np.random.default_rng(1))
    assert torch.equal(plain.values.flip(-1), mirrored.values) and not torch.equal(plain.values, mirrored.values)


@pytest.mark.parametrize("kind", ["mp4-h264", "mkv-h264", "webm-vp9"])
def test_decord_gives_the_same_frames_where_it_is_allowed(kind: str) -> None:
    data = encode_video(**KINDS[kind])
    source = PyAVSource(data, Limits())
    other = DecordSource(data, source)
    assert other.count == source.count
    indices = [1, 5, 13, 30, 39]
    for ours, theirs in zip(source.pick(indices, rgb), other.pick(indices, rgb), strict=True):
        assert np.array_equal(ours.pixels, theirs.pixels) and ours.index == theirs.index
        assert ours.start_s == pytest.approx(theirs.start_s, abs=2e-3)
    modality = build_modality("video", SMALL | {"decoder": "decord"})
    difference = modality.picture(next(modality.windows(data))).astype(int) - first_window(data)
    assert np.abs(difference).mean() < 2


@pytest.mark.parametrize("kind", ["mkv-hevc-open", "mp4-av1", "mp4-h264-open", "avi-mjpeg"])
def test_decord_is_refused_where_it_is_wrong(kind: str) -> None:
    modality = build_modality("video", SMALL | {"decoder": "decord"})
    with pytest.raises(WrongKindError, match=r"decord .* set clip.decoder: pyav"):
        next(modality.windows(encode_video(**KINDS[kind])))


def test_isolated_clips_equal_those_decoded_here() -> None:
    here, apart = build_modality("video", SMALL), build_modality("video", SMALL | {"isolate": True})
    data = encode_video(40)
    copy = pickle.loads(pickle.dumps(apart))
    for ours, theirs in zip(here.windows(data), copy.windows(data), strict=True):
        assert torch.equal(ours.values, theirs.values)
        assert (ours.valid, ours.start_s, ours.duration_s) == (theirs.valid, theirs.start_s, theirs.duration_s)
    seeds = [np.random.default_rng(3), np.random.default_rng(3)]
    assert torch.equal(here.training_clip(data, seeds[0]).values, apart.training_clip(data, seeds[1]).values)


def test_shipped_sample_is_read_whole() -> None:
    modality = build_modality("video", {"size": [64, 64], "frames": 8, "stride": 2, "isolate": False})
    shard = resources.files("bridle") / "data" / "sample" / "video-heldout-0000.tar"
    with shard.open("rb") as file, tarfile.open(fileobj=file) as tar:
        videos = [tar.extractfile(member).read() for member in tar if member.name.endswith(".mp4")]
    assert len(videos) > 3
    for data in videos[:6]:
        clips = list(modality.windows(data))
        assert clips[0].valid == 4 and torch.isfinite(torch.stack([clip.values for clip in clips])).all()


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ({"frames": 15}, "not a multiple of patch"),
        ({"size": [224, 225]}, "not a multiple of patch"),
        ({"decoder": "ffmpeg"}, "pyav"),
        ({"stride": 0}, "greater than 0"),
    ],
)
def test_wrong_settings_are_named(clip: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_modality("video", clip)
