"""Broken and hostile files get one clear line, in bounded time and memory, and nothing else."""

from __future__ import annotations

import io
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from encoded_audio import (
    FORMATS,
    TRUNCATION_IS_AN_ERROR,
    audio,
    encode,
    encode_with_ffmpeg,
    recordings,
    remux,
    silent_film,
    tone,
    wav_of,
)

from bridle.modalities.audio_decode import open_recording
from bridle.modalities.clip import ClipError, Limits, TooLargeError, UndecodableError, WrongKindError


def seconds_of(data: bytes, limits: Limits | None = None) -> float:
    return sum(clip.duration_s or 0.0 for clip in audio(limits).windows(data))


def both_doors(data: bytes, limits: Limits | None = None) -> list[Callable[[], object]]:
    modality = audio(limits)
    return [lambda: list(modality.windows(data)), lambda: modality.training_clip(data, np.random.default_rng(0))]


def refuses(data: bytes, error: type[ClipError], says: str, limits: Limits | None = None) -> None:
    for door in both_doors(data, limits):
        with pytest.raises(error, match=says) as raised:
            door()
        assert "\n" not in str(raised.value)


def flac_claiming(total: int) -> bytes:
    """A flac of 2 s whose header states `total` samples."""
    data = bytearray(encode(tone(2.0), 16_000, "flac"))
    field = int.from_bytes(data[18:26], "big") >> 36 << 36 | total
    data[18:26] = field.to_bytes(8, "big")
    return bytes(data)


def test_zero_bytes_are_named() -> None:
    refuses(b"", UndecodableError, "empty")


def test_zero_samples_are_named() -> None:
    refuses(encode(np.zeros((0, 1), np.int16), 16_000, "wav"), UndecodableError, "no samples")
    headers_of_a_flac = encode(tone(1.0), 16_000, "flac")[:42]
    refuses(headers_of_a_flac, UndecodableError, "corrupt or truncated")
    webm = encode(tone(1.0), 16_000, "webm")
    refuses(webm[: len(webm) // 50], UndecodableError, "corrupt or truncated|no samples")


@pytest.mark.parametrize("kind", FORMATS)
def test_half_a_file_is_an_error_or_its_sound_as_documented(kind: str) -> None:
    whole = encode(tone(6.0), 16_000, kind)
    half = whole[: len(whole) // 2]
    if kind in TRUNCATION_IS_AN_ERROR:
        refuses(half, UndecodableError, "truncated")
    else:
        assert 2.0 < seconds_of(half) < 4.0
    for door in both_doors(whole[:30]):
        with pytest.raises(ClipError):
            door()


def test_an_mp4_cut_between_two_packets_is_an_error() -> None:
    data = encode(tone(6.0), 16_000, "m4a", movflags="faststart")
    with av.open(io.BytesIO(data), format="mov") as container:
        ends = [packet.pos + packet.size for packet in container.demux() if packet.size]
    refuses(data[: ends[len(ends) // 2]], UndecodableError, "truncated")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(value: float) -> None:
    sound = tone(1.0)[:, 0] / np.float32(32_768)
    sound[8_000] = value
    refuses(wav_of(sound), UndecodableError, "not finite")


def test_absurd_samples_are_clipped_to_a_finite_clip() -> None:
    sound = tone(1.0, 44_100)[:, 0] / np.float32(32_768)
    sound[20_000:20_050] = 1e30
    for clip in audio().windows(wav_of(sound, 44_100)):
        assert np.isfinite(clip.values.numpy()).all() and clip.values.max() < 10


@pytest.mark.parametrize("total", [2**36 - 1, 2**35])
def test_a_flac_that_claims_days_is_refused_from_its_header(total: int) -> None:
    refuses(flac_claiming(total), TooLargeError, "max_seconds = 3600")


def test_a_flac_that_claims_more_than_it_holds_is_truncated() -> None:
    with pytest.raises(UndecodableError, match="truncated"):
        seconds_of(flac_claiming(16_000 * 3_000))


@pytest.mark.parametrize("kind", FORMATS)
def test_more_seconds_than_the_limit_are_refused(kind: str) -> None:
    refuses(
        encode(np.zeros((16_000 * 8, 1), np.int16), 16_000, kind),
        TooLargeError,
        "max_seconds = 5",
        Limits(max_seconds=5),
    )


@pytest.mark.parametrize("kind", ["flac", "webm", "aac"])
def test_long_silence_without_a_stated_length_stops_at_the_limit_in_bounded_memory(kind: str) -> None:
    data = encode(np.zeros((16_000 * 200, 1), np.int16), 16_000, kind)
    if kind == "flac":
        data = data[:18] + (int.from_bytes(data[18:26], "big") >> 36 << 36).to_bytes(8, "big") + data[26:]
    elif kind == "webm":
        at = data.index(b"\x44\x89\x88")  # the Duration element
        data = data[:at] + b"\xec\x89\x88" + data[at + 3 :]  # becomes a Void
    assert open_recording(data, Limits()).frames is None
    tracemalloc.start()
    try:
        refuses(data, TooLargeError, "max_seconds = 150", Limits(max_seconds=150))
        assert tracemalloc.get_traced_memory()[1] < 6_000_000  # 150 s are 10 MB
    finally:
        tracemalloc.stop()


def test_more_bytes_than_the_limit_are_refused() -> None:
    refuses(encode(tone(1.0), 16_000, "wav"), TooLargeError, "max_bytes = 1000", Limits(max_bytes=1000))


def test_too_many_channels_are_refused() -> None:
    target = io.BytesIO()
    soundfile.write(target, np.zeros((10, 500), np.int16), 16_000, format="WAV")
    refuses(target.getvalue(), TooLargeError, "500 channels, expected at most 64")


@pytest.mark.parametrize("rate", [1, 2**31 - 1])
def test_absurd_sample_rates_are_refused(rate: int) -> None:
    data = bytearray(encode(tone(1.0), 16_000, "wav"))
    struct.pack_into("<I", data, 24, rate)
    with pytest.raises(ClipError, match=r"sample rate|max_seconds"):
        seconds_of(bytes(data))


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile {path}\n",
        "#EXTM3U\n#EXTINF:2,\n{path}\n#EXT-X-ENDLIST\n",
        "v=0\nm=audio 5004 RTP/AVP 0\n",
    ],
)
def test_playlists_are_refused_and_never_followed(text: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.wav"
    secret.write_bytes(encode(tone(1.0), 16_000, "wav"))
    refuses(text.format(path=secret).encode(), WrongKindError, "a playlist, which points to other files")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "a picture"),
        (b"\xff\xd8\xff\xe0" + bytes(200), "a picture"),
        (b"\x00\x00\x00\x1cftypavif" + bytes(200), "a picture"),
        (b"just some words", "text"),
        (bytes(range(256)), "an unknown kind of file"),
        (silent_film(), "no sound track"),
    ],
)
def test_other_kinds_of_file_are_refused(data: bytes, says: str) -> None:
    refuses(data, WrongKindError, says)


@pytest.mark.parametrize(("container", "codec"), [("avi", "adpcm_ms"), ("mov", "adpcm_ima_qt")])
def test_codecs_off_the_list_are_never_opened(container: str, codec: str) -> None:
    refuses(encode_with_ffmpeg(tone(1.0), 16_000, container, codec, {}), WrongKindError, f"codec {codec} is not")


@pytest.mark.parametrize("kind", [*FORMATS, "vorbis in mka"])
def test_mutated_files_raise_nothing_but_clip_errors(kind: str) -> None:
    if kind == "vorbis in mka":  # without Ogg's checksums, so that changed bytes reach the decoder
        data = remux(encode(tone(0.7, 22_050, channels=2), 22_050, "ogg"), "matroska")
    else:  # Ogg pages hold a second or more, and are dropped whole
        data = encode(tone(6.0 if kind in ("ogg", "opus") else 0.7, 22_050, channels=2), 22_050, kind)
    original = np.frombuffer(data, np.uint8)
    for seed in range(50):
        _mutate_and_read(original, np.random.default_rng(seed))


def test_mutated_recordings_raise_nothing_but_clip_errors() -> None:
    for name, data in list(recordings().items())[:8]:
        for seed in range(6):
            _mutate_and_read(np.frombuffer(data, np.uint8), np.random.default_rng([seed, len(name)]))


def _mutate_and_read(original: np.ndarray, rng: np.random.Generator) -> None:
    """Changes bytes anywhere or behind the first 12 of the headers, cuts every third file, and tries both doors."""
    mutated = original.copy()
    first, behind = [(0, len(mutated)), (12, min(400, len(mutated)))][rng.integers(2)]
    at = rng.integers(first, behind, rng.integers(1, 6))
    mutated[at] = rng.integers(0, 256, len(at))
    if rng.integers(3) == 0:
        mutated = mutated[: rng.integers(1, len(mutated))]
    for door in both_doors(mutated.tobytes(), Limits(max_seconds=60)):
        try:
            door()
        except ClipError as error:
            assert "\n" not in str(error)
