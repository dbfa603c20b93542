"""Windows join to one stream of constant rate."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from encoded_audio import audio, encode, tone, wav_of
from hypothesis import given, settings
from hypothesis import strategies as st

from bridle.modalities.clip import UndecodableError

STEP = 256 * 160


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3 * STEP + 1_000))
def test_windows_cover_every_frame_once_at_a_constant_rate(samples: int) -> None:
    clips = list(audio().windows(wav_of(tone(samples / 16_000 + 1e-9)[:samples, 0] / np.float32(32_768))))
    frames = max(1, 1 + (samples - 400) // 160)
    assert len(clips) == math.ceil(frames / 256)
    assert [clip.start_s for clip in clips] == [k * 2.56 for k in range(len(clips))]
    assert all(clip.valid == 16 and clip.duration_s == 2.56 for clip in clips[:-1])
    assert clips[-1].valid == math.ceil((frames - 256 * (len(clips) - 1)) / 16)
    assert math.isclose(sum(clip.duration_s for clip in clips), samples / 16_000)
    positions = sum(clip.valid for clip in clips) * 8
    assert abs(positions / 50 - samples / 16_000) < 0.16 + 0.03  # a patch, and what is left of a frame
    assert all(clip.grid == {"time": 16, "frequency": 8} for clip in clips)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2), st.integers(0, 2 * STEP), st.integers(0, 10_000))
def test_a_window_depends_on_its_own_samples_only(index: int, more: int, seed: int) -> None:
    sound = np.random.default_rng(seed).normal(0, 0.1, (index + 1) * STEP + 240 + more).astype(np.float32)
    whole = list(audio().windows(wav_of(sound)))[index]
    alone = next(audio().windows(wav_of(sound[index * STEP : (index + 1) * STEP + 240])))
    assert torch.equal(whole.values, alone.values)
    assert whole.valid == alone.valid == 16


@pytest.mark.parametrize("samples", [1, 100, 399, 400])
def test_less_than_one_frame_is_one_padded_window(samples: int) -> None:
    (clip,) = audio().windows(wav_of(tone(0.1)[:samples, 0] / np.float32(32_768)))
    assert clip.valid == 1 and clip.duration_s == samples / 16_000
    assert torch.isfinite(clip.values).all()
    trained = audio().training_clip(wav_of(tone(0.1)[:samples, 0] / np.float32(32_768)), np.random.default_rng(0))
    assert trained.values.shape == (1, 256, 128) and torch.isfinite(trained.values).all()


def test_a_last_frame_short_of_one_opens_no_window() -> None:
    sound = tone(6.0)[:, 0] / np.float32(32_768)
    assert len(list(audio().windows(wav_of(sound[: STEP + 399])))) == 1
    assert len(list(audio().windows(wav_of(sound[: STEP + 400])))) == 2


@pytest.mark.parametrize("kind", ["flac", "opus"])
def test_an_hour_is_tokenized_without_holding_it(kind: str) -> None:
    """200 s stand for it: 13 MB when decoded."""
    data = encode(tone(200.0, 8_000), 8_000, kind)
    windows = audio().windows(data)
    next(windows)
    tracemalloc.start()
    try:
        count = 1 + sum(1 for _ in windows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == math.ceil(200 / 2.56)
    assert peak < 6_000_000


def test_a_flac_cut_half_way_raises_after_its_good_windows() -> None:
    data = encode(tone(12.0), 16_000, "flac")
    windows = audio().windows(data[: len(data) // 2])
    first = next(windows)
    assert torch.equal(first.values, next(audio().windows(data)).values)
    with pytest.raises(UndecodableError):
        list(windows)
