"""Kaldi's log-mel filter bank, with the settings of AST, AudioMAE and the paper."""

from __future__ import annotations

from functools import lru_cache

import torch
from torchaudio.compliance.kaldi import get_mel_banks

from bridle.modalities.audio_frames import HOP, SAMPLE_RATE, WINDOW

_FFT = 512
_PREEMPHASIS = 0.97
_LOWEST_HZ = 20.0


def fbank(waveform: torch.Tensor, mel_bins: int) -> torch.Tensor:
    """Log-mel energies of recordings at 16 kHz, on any device.

    Equal to the last bit to ``torchaudio.compliance.kaldi.fbank(htk_compat=True, use_energy=False,
    window_type="hanning", dither=0.0, frame_shift=10, num_mel_bins=mel_bins)``, in less time: the filters are kept
    and the steps work in place. Elsewhere than on a CPU the filters' product is in float64, since TF32 may be on.

    Args:
        waveform: float32 ``[..., samples]``, at least 400 of them.
        mel_bins: number of mel bands.

    Returns:
        float32 ``[..., frame_count(samples), mel_bins]``.

    Raises:
        ValueError: shorter than one window.
    """
    if waveform.shape[-1] < WINDOW:
        raise ValueError(
            f"found {waveform.shape[-1]} samples, expected at least one window of {WINDOW}; pad the waveform"
        )
    framed = waveform.unfold(-1, WINDOW, HOP)
    shape = (*framed.shape[:-1], mel_bins)
    framed = framed.reshape(-1, WINDOW)
    framed = framed - framed.mean(dim=1, keepdim=True)
    scaled = framed * _PREEMPHASIS
    padded = torch.zeros(len(framed), _FFT, device=waveform.device)
    emphasised = padded[:, :WINDOW]
    # Multiplied and subtracted in two steps: a fused one rounds differently from torchaudio.
    torch.sub(framed[:, 1:], scaled[:, :-1], out=emphasised[:, 1:])
    torch.sub(framed[:, 0], scaled[:, 0], out=emphasised[:, 0])
    emphasised.mul_(_hanning(waveform.device))
    power = torch.fft.rfft(padded).abs().square_()
    filters = _filters(mel_bins, waveform.device)
    energies = torch.mm(power.to(filters), filters).float()
    return energies.clamp_(min=torch.finfo(torch.float32).eps).log_().view(shape)


@lru_cache(maxsize=8)
def _hanning(device: torch.device) -> torch.Tensor:
    return torch.hann_window(WINDOW, periodic=False, dtype=torch.float32).to(device)


@lru_cache(maxsize=16)
def _filters(mel_bins: int, device: torch.device) -> torch.Tensor:
    """``[257, mel_bins]``, float32 on CPUs, else float64; the last row, the Nyquist frequency, is zero as in Kaldi."""
    banks, _ = get_mel_banks(mel_bins, _FFT, float(SAMPLE_RATE), _LOWEST_HZ, 0.0, 100.0, -500.0, 1.0)
    filters = torch.nn.functional.pad(banks.to(torch.float32), (0, 1)).T
    return filters if device.type == "cpu" else filters.to(device, torch.float64)
