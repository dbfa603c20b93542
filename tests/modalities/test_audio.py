"""Decoding, augmentation and pictures of sound."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import soxr
import torch
from encoded_audio import EXACT, FORMATS, audio, encode, recordings, tone, wav_of

from bridle.modalities.audio_decode import decode, excerpt
from bridle.modalities.clip import Limits
from bridle.settings import RecipeError


def decoded(data: bytes) -> np.ndarray:
    return np.concatenate(list(decode(data, Limits())))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2)])
def test_every_format_gives_the_encoded_sound(kind: str, rate: int, channels: int) -> None:
    samples = tone(2.0, rate, channels=channels)
    mono = samples.mean(axis=1).astype(np.float32) / 32_768
    expected = mono if rate == 16_000 else soxr.resample(mono, rate, 16_000, quality="HQ")
    found = decoded(encode(samples, rate, kind))
    assert found.dtype == np.float32 and found.ndim == 1
    if kind in EXACT:
        np.testing.assert_allclose(found, expected, atol=1e-6)
        return
    # Codecs without a stated delay (aac) are late by up to two frames, and round the length up to a frame.
    assert 0 <= len(found) - len(expected) < 2 * 2_048
    middle = expected[8_000:24_000]
    likeness = np.correlate(found, middle, "valid") / np.dot(middle, middle)
    assert likeness.max() > 0.95


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_wav_and_flac_give_the_same_bits(rate: int, channels: int) -> None:
    samples = tone(6.0, rate, channels=channels)
    wav, flac = encode(samples, rate, "wav"), encode(samples, rate, "flac")
    pairs = list(zip(audio().windows(wav), audio().windows(flac), strict=True))
    pairs.append(
        (audio().training_clip(wav, np.random.default_rng(3)), audio().training_clip(flac, np.random.default_rng(3)))
    )
    assert len(pairs) == 4
    for left, right in pairs:
        assert torch.equal(left.values, right.values)
        assert (left.valid, left.start_s, left.duration_s) == (right.valid, right.start_s, right.duration_s)


def test_a_flac_of_unstated_length_is_read_whole() -> None:
    flac = bytearray(encode(tone(6.0), 16_000, "flac"))
    whole = decoded(bytes(flac))
    total = int.from_bytes(flac[18:26], "big") >> 36 << 36
    flac[18:26] = total.to_bytes(8, "big")
    assert np.array_equal(decoded(bytes(flac)), whole)


def test_channels_are_averaged() -> None:
    samples = np.stack([tone(1.0)[:, 0]] * 3, axis=1).astype(np.float32) / 32_768
    samples[:, 1] = 0
    np.testing.assert_allclose(decoded(wav_of(samples)), samples[:, 0] * 2 / 3, atol=1e-6)


def test_all_real_recordings_become_clips() -> None:
    modality = audio()
    for name, data in recordings().items():
        assert modality.recognises(data[:4096]), name
        clip = modality.training_clip(data, np.random.default_rng(0))
        assert clip.values.shape == (1, 256, 128) and torch.isfinite(clip.values).all(), name
        assert 1 <= clip.valid <= 16 and 0 < clip.duration_s <= (255 * 160 + 400) / 16_000, name
        assert clip.values[:, : 16 * clip.valid].std() > 0.05, name


def test_roll_moves_the_sound_over_the_whole_length() -> None:
    samples = np.random.default_rng(0).normal(0, 1e-4, 32_000).astype(np.float32)
    samples[8_000:8_400] = 0.5
    data = wav_of(samples)
    modality = audio(magnitude=False)
    loudest = [
        int(modality.training_clip(data, np.random.default_rng(seed)).values[0, :198].mean(dim=1).argmax())
        for seed in range(60)
    ]
    assert min(loudest) < 30 and max(loudest) > 168
    assert len(set(loudest)) > 30
    assert audio(magnitude=False, roll=False).training_clip(data, np.random.default_rng(0)).values[0].mean(dim=1)[
        :198
    ].argmax() in range(47, 53)


def test_magnitude_scales_the_sound_between_half_and_one_and_a_half() -> None:
    data = wav_of(np.random.default_rng(0).normal(0, 0.1, 32_000).astype(np.float32))
    plain = next(audio().windows(data)).values[0, :198]
    factors = []
    for seed in range(40):
        louder = audio(roll=False).training_clip(data, np.random.default_rng(seed)).values[0, :198]
        shift = (louder - plain)[:, 10:] * 2 * 3.3216383  # the log of a power grows by twice the log of the factor
        assert shift.std() < 1e-3
        factors.append(float(torch.exp(shift.mean() / 2)))
    assert 0.5 < min(factors) < 0.85 and 1.15 < max(factors) < 1.5
    assert abs(np.mean(factors) - 1) < 0.06


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("kind", ["wav", "opus"])
def test_without_augmentation_a_short_training_clip_is_the_window(kind: str, rate: int) -> None:
    data = encode(tone(1.5, rate), rate, kind)
    clip = audio(roll=False, magnitude=False).training_clip(data, np.random.default_rng(0))
    assert torch.equal(clip.values, next(audio().windows(data)).values)


@pytest.mark.parametrize(("kind", "rate"), [("wav", 16_000), ("flac", 44_100), ("ogg", 22_050), ("m4a", 48_000)])
def test_a_training_excerpt_fills_the_whole_window(kind: str, rate: int) -> None:
    data = encode(tone(6.0, rate), rate, kind)
    for seed in range(5):
        clip = audio().training_clip(data, np.random.default_rng(seed))
        assert clip.valid == 16 and clip.duration_s == (255 * 160 + 400) / 16_000
        assert (clip.values[0, -1] != -audio().settings.mean / (2 * audio().settings.std)).any()


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "ogg", "opus", "m4a", "aac", "webm"])
def test_long_files_are_cropped_at_random_over_their_whole_length(kind: str) -> None:
    seconds, rate = 12.0, 22_050
    time = np.arange(int(seconds * rate)) / rate
    rising = np.round(8_000 * np.sin(2 * np.pi * (200 * time + 120 * time**2)))  # 200 Hz + 240 Hz per second
    data = encode(rising.astype(np.int16)[:, None], rate, kind)
    starts = []
    for position in (0.0, 0.3, 0.6, 0.999):
        samples = excerpt(data, Limits(), 32_000, position)
        assert len(samples) == 32_000
        spectrum = np.abs(np.fft.rfft(samples[:4_000] * np.hanning(4_000)))
        starts.append((spectrum.argmax() * 4 - 200) / 240 - 0.125)
    np.testing.assert_allclose(starts, [0.0, 3.0, 6.0, 10.0], atol=0.15)
    clips = [audio().training_clip(data, np.random.default_rng(seed)).values for seed in range(4)]
    assert len({clip.numpy().tobytes() for clip in clips}) == 4


def test_training_clips_depend_on_the_generator_alone() -> None:
    data = encode(tone(5.0), 16_000, "ogg")
    first, again = (audio().training_clip(data, np.random.default_rng(7)).values for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, audio().training_clip(data, np.random.default_rng(8)).values)


def test_the_modality_survives_pickling() -> None:
    modality = audio(seconds=5.0)
    copy = pickle.loads(pickle.dumps(modality))
    data = encode(tone(1.0), 16_000, "flac")
    assert copy.settings == modality.settings
    assert torch.equal(next(copy.windows(data)).values, next(modality.windows(data)).values)


def test_picture_shows_low_frequencies_at_the_bottom_and_padding_grey() -> None:
    modality = audio()
    clip = next(modality.windows(encode(tone(1.0, hertz=300), 16_000, "wav")))
    picture = modality.picture(clip)
    assert picture.shape == (128, 256, 3) and picture.dtype == np.uint8
    brightness = picture[:, :96].astype(int).sum(axis=(1, 2))
    assert brightness.argmax() > 96
    assert (picture[:, 112:] == 96).all() and not (picture[:, :112] == 96).all()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"secnods": 3}, "did you mean 'seconds'"),
        ({"seconds": 0}, "greater than 0"),
        ({"mel_bins": 100}, "does not divide mel_bins 100"),
        ({"patch": [48, 16]}, "does not divide 64 frames"),
        ({"std": 0}, "greater than 0"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        audio(**given)
