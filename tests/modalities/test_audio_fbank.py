"""The features equal Kaldi's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from encoded_audio import audio, recordings, tone, wav_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.compliance import kaldi

from bridle.modalities.audio_decode import decode
from bridle.modalities.audio_frames import frame_count
from bridle.modalities.clip import Limits
from bridle.modalities.fbank import fbank


def reference(waveform: torch.Tensor, mel_bins: int = 128) -> torch.Tensor:
    return kaldi.fbank(
        waveform[None],
        htk_compat=True,
        sample_frequency=16_000,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=mel_bins,
        dither=0.0,
        frame_shift=10,
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(400, 20_000), st.sampled_from([32, 64, 128]), st.integers(0, 2**32 - 1))
def test_fbank_equals_torchaudio_to_the_last_bit(samples: int, mel_bins: int, seed: int) -> None:
    waveform = torch.from_numpy(np.random.default_rng(seed).standard_normal(samples).astype(np.float32))
    assert torch.equal(fbank(waveform, mel_bins), reference(waveform, mel_bins))


def test_fbank_of_real_recordings_equals_torchaudio_to_the_last_bit() -> None:
    for data in recordings().values():
        waveform = torch.from_numpy(np.concatenate(list(decode(data, Limits()))))
        if len(waveform) >= 400:
            assert torch.equal(fbank(waveform, 128), reference(waveform))


@given(st.integers(0, 10_000))
def test_frame_count_follows_kaldi(samples: int) -> None:
    assert frame_count(samples) == len(range(0, samples - 400 + 1, 160))


def test_fbank_refuses_less_than_a_window() -> None:
    with pytest.raises(ValueError, match="399 samples"):
        fbank(torch.zeros(399), 128)


@pytest.mark.parametrize(("seconds", "frames"), [(10, 1024), (5, 512), (2, 256), (1, 128), (2.56, 256), (30, 3008)])
def test_clip_lengths_are_the_published_ones(seconds: float, frames: int) -> None:
    modality = audio(seconds=seconds)
    assert modality.settings.frames == frames
    assert modality.grid == {"time": frames // 16, "frequency": 8}
    assert modality.positions_per_second == 50


def test_values_are_zero_padded_features_normalised_by_two_standard_deviations() -> None:
    samples = tone(1.0)[:, 0].astype(np.float32) / 32_768
    (clip,) = audio().windows(wav_of(samples))
    features = reference(torch.from_numpy(samples - samples.mean()))
    padded = torch.nn.functional.pad(features, (0, 0, 0, 256 - len(features)))
    torch.testing.assert_close(clip.values[0], (padded + 4.4446096) / (2 * 3.3216383), rtol=0, atol=1e-6)
    assert clip.values.shape == (1, 256, 128) and clip.values.dtype == torch.float32
    assert clip.valid == 7  # 98 frames
