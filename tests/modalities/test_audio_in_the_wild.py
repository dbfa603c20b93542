"""Sound files as public bug reports have them: good ones give all their sound, others are refused by name."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from collections.abc import Callable

import av
import numpy as np
import pytest
import soundfile
from encoded_audio import audio, encode, encode_with_ffmpeg, tone, wav_of

from bridle.modalities.audio_decode import decode, excerpt
from bridle.modalities.clip import Limits, UndecodableError, WrongKindError

RATE = 16_000


def seconds(data: bytes) -> float:
    return sum(map(len, decode(data, Limits()))) / RATE


def samples(data: bytes) -> np.ndarray:
    return np.concatenate(list(decode(data, Limits())))


def many_channels(channels: int, codec: str, container: str) -> tuple[bytes, np.ndarray]:
    """2 s of as many tones, and their mean at 16 kHz."""
    rate, layout = 48_000, f"{channels} channels" if channels != 8 else "7.1"
    time = np.arange(2 * rate) / rate
    tones = np.stack([0.5 * np.sin(2 * np.pi * (300 + 40 * i) * time) for i in range(channels)]).astype(np.float32)
    options = {"mapping_family": "1" if channels == 8 else "255"} if codec == "libopus" else {}
    target = io.BytesIO()
    with av.open(target, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout, options=options)
        for first in range(0, tones.shape[1], 960):
            packed = np.ascontiguousarray(tones[:, first : first + 960].T).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
            frame.sample_rate, frame.pts = rate, first
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return target.getvalue(), tones.mean(axis=0)[::3]


@pytest.mark.parametrize(
    ("channels", "codec", "container"),
    [(8, "libopus", "ogg"), (8, "aac", "mp4"), (12, "libopus", "ogg"), (16, "libopus", "webm")],
)
def test_planar_sound_of_eight_channels_and_more_is_their_mean(channels: int, codec: str, container: str) -> None:
    """In a process of its own: what this is about is a segmentation fault."""
    data, mean = many_channels(channels, codec, container)
    code = (
        "import sys, numpy; from bridle.modalities.audio_decode import decode, Limits;"
        "sys.stdout.buffer.write(numpy.concatenate(list(decode(sys.stdin.buffer.read(), Limits()))).tobytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    found = np.frombuffer(done.stdout, np.float32)
    assert len(found) >= 1.99 * RATE
    lag = int(np.argmax(np.correlate(found[8_000:12_000], mean[8_000 - 600 : 12_000 + 600], "valid"))) - 600
    compared = found[4_000:28_000], mean[4_000 + lag : 28_000 + lag]
    assert np.corrcoef(*compared)[0, 1] > 0.9 and abs(compared[0].std() / compared[1].std() - 1) < 0.2


def chunk_at(data: bytes, name: bytes) -> int:
    return data.index(name)


def with_sizes(data: bytes, riff: int | None, sound: int | None) -> bytes:
    changed, order = bytearray(data), "<I" if data[:4] != b"RIFX" else ">I"
    if riff is not None:
        changed[4:8] = struct.pack(order, riff)
    if sound is not None:
        place = chunk_at(data, b"data") + 4
        changed[place : place + 4] = struct.pack(order, sound)
    return bytes(changed)


def wav(format_name: str = "WAV", endian: str | None = None) -> bytes:
    target = io.BytesIO()
    soundfile.write(target, tone(3.0), RATE, format=format_name, subtype="PCM_16", endian=endian)
    return target.getvalue()


def rf64_of_a_stopped_recorder() -> bytes:
    data = bytearray(wav("RF64"))
    sizes = data.index(b"ds64") + 8
    data[sizes : sizes + 24] = bytes(24)
    return bytes(data)


def flac_claiming(share: float) -> bytes:
    data = bytearray(encode(tone(3.0), RATE, "flac"))
    field = int.from_bytes(data[18:26], "big") >> 36 << 36 | int(3 * RATE * share)
    data[18:26] = field.to_bytes(8, "big")
    return bytes(data)


def aiff(format_name: str, subtype: str) -> bytes:
    target = io.BytesIO()
    soundfile.write(target, tone(3.0) / np.float32(32_768), RATE, format=format_name, subtype=subtype)
    return target.getvalue()


GOOD: dict[str, Callable[[], bytes]] = {
    "wav of a stopped recorder": lambda: with_sizes(wav(), 0, 0),
    "wav with only its data size 0": lambda: with_sizes(wav(), None, 0),
    "wav with only its riff size 0": lambda: with_sizes(wav(), 0, None),
    "wav written into a pipe": lambda: with_sizes(wav(), 0xFFFFFFFF, 0xFFFFFFFF),
    "rifx": lambda: wav(endian="BIG"),
    "rifx of a stopped recorder": lambda: with_sizes(wav(endian="BIG"), 0, 0),
    "rf64": lambda: wav("RF64"),
    "rf64 of a stopped recorder": rf64_of_a_stopped_recorder,
    "bw64": lambda: b"BW64" + wav("RF64")[4:],
    "bw64 of a stopped recorder": lambda: b"BW64" + rf64_of_a_stopped_recorder()[4:],
    "flac that claims half": lambda: flac_claiming(0.5),
    "flac that claims one frame": lambda: flac_claiming(0.01),
    "aiff": lambda: aiff("AIFF", "PCM_16"),
    "aiff of floats": lambda: aiff("AIFF", "FLOAT"),
    "caf": lambda: aiff("CAF", "PCM_16"),
    "caf of alac": lambda: aiff("CAF", "ALAC_16"),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_gives_all_its_sound(name: str) -> None:
    found, expected = samples(GOOD[name]()), samples(wav())
    assert len(found) == len(expected) == 3 * RATE
    assert np.abs(found - expected).max() < 1e-3
    clip = audio().training_clip(GOOD[name](), np.random.default_rng(0))
    assert clip.duration_s == 2.575  # all that the 256 frames of two seconds see: 255 hops of 10 ms and a window of 25


def test_a_wav_that_is_truly_empty_stays_empty() -> None:
    empty = wav()[: chunk_at(wav(), b"data")] + b"data" + bytes(4) + b"LIST" + struct.pack("<I", 4) + b"INFO"
    with pytest.raises(UndecodableError, match="holds no samples"):
        seconds(empty)


def test_joined_files_give_the_sound_of_all(mp3: bytes) -> None:
    assert seconds(mp3) == pytest.approx(3.0, abs=0.03)
    assert seconds(mp3 + mp3) == pytest.approx(6.0, abs=0.06)
    assert seconds(mp3 + b"TAG" + bytes(125) + b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + mp3 + mp3) == pytest.approx(
        9.0, abs=0.1
    )
    flac = encode(tone(3.0), RATE, "flac")
    assert seconds(flac + flac) == 6.0
    other = encode(tone(1.0, 44_100), 44_100, "mp3")
    assert seconds(mp3 + other) == pytest.approx(4.0, abs=0.06)
    late = excerpt(flac + encode(tone(3.0, hertz=2_000.0), RATE, "flac"), Limits(), RATE, 0.999)
    assert np.abs(np.fft.rfft(late)).argmax() == 2_000


@pytest.fixture(scope="module")
def mp3() -> bytes:
    """3 s by LAME, with its header."""
    data = encode(tone(3.0, 44_100), 44_100, "mp3")
    assert b"Info" in data[:400] or b"Xing" in data[:400]
    return data


def without_tag(mp3: bytes) -> bytes:
    return (
        mp3[10 + sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(mp3[6:10])) :] if mp3[:3] == b"ID3" else mp3
    )


def test_an_mp3_behind_padding_zeros_or_half_a_frame_is_read(mp3: bytes) -> None:
    bare = without_tag(mp3)
    tag = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10)
    for data in (tag + bytes(2_000) + bare, bytes(3_000) + bare, bytes(200_000) + bare, tag + bare):
        assert seconds(data) == pytest.approx(3.0, abs=0.03)
    for cut in (500, 900, 1_313):
        assert seconds(bare[cut:]) == pytest.approx(3.0, abs=0.15)
    assert audio().recognises((bytes(3_000) + bare)[:4096]) and audio().recognises(bare[700:][:4096])


def test_an_mp3_whose_header_claims_too_little_is_read_to_the_end(mp3: bytes) -> None:
    bare = bytearray(without_tag(mp3))
    place = bare.index(b"Info" if b"Info" in bare[:400] else b"Xing")
    assert bare[place + 7] & 3 == 3
    frames, size = struct.unpack(">II", bare[place + 8 : place + 16])
    bare[place + 8 : place + 16] = struct.pack(">II", frames // 2, size // 2 + 100)
    assert seconds(bytes(bare)) == pytest.approx(3.0, abs=0.1)


def test_floats_at_the_scale_of_integers_are_named() -> None:
    for scale in (32_768, 2**31):
        for door in (seconds, lambda data: audio().training_clip(data, np.random.default_rng(0))):
            with pytest.raises(
                UndecodableError, match=r"its float samples reach \d+, expected -1 to 1: integers saved"
            ):
                door(wav_of(tone(3.0)[:, 0].astype(np.float32) / 32_768 * scale))
    assert seconds(wav_of(tone(3.0)[:, 0] / np.float32(32_768) * 4)) == 3.0  # loud, as some are


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b".snd" + bytes(400), "a Sun AU file"),
        (b"riff.\x91\xcf\x11" + bytes(400), "a Wave64 file"),
        ((b"G" + bytes(187)) * 9, "an MPEG transport stream"),
        (b"\0\0\x01\xba" + bytes(400), "an MPEG program stream"),
        (b"0&\xb2u\x8ef\xcf\x11" + bytes(400), "a Windows Media file"),
        (bytes(5_000), "a file of 5000 zeros"),
    ],
)
def test_what_is_not_read_is_refused_by_name(data: bytes, named: str) -> None:
    with pytest.raises(WrongKindError, match=named):
        seconds(data)


def test_a_film_with_a_transport_streams_name_only_is_no_sound_either() -> None:
    data = encode_with_ffmpeg(tone(1.0, 48_000), 48_000, "mpegts", "aac", {})
    with pytest.raises(WrongKindError, match="an MPEG transport stream; convert it: ffmpeg"):
        seconds(data)
