"""Sound: 16 kHz mono, Kaldi-compatible log-mel spectrograms, cut into patches of time by frequency."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from bridle.modalities.audio_decode import as_mp3, decode, excerpt, open_recording
from bridle.modalities.audio_description import AudioDescription, AudioSettings
from bridle.modalities.audio_frames import HOP, SAMPLE_RATE, WINDOW, frame_count
from bridle.modalities.clip import Clip, Limits
from bridle.modalities.fbank import fbank


class Audio(AudioDescription):
    """The audio modality; see `bridle.modalities.clip.Modality`."""

    def __init__(self, settings: AudioSettings, limits: Limits, raw: bool = False) -> None:
        """raw: clips are the samples that their frames look at, float32 ``[1, n]``; `extent` counts whole frames."""
        super().__init__(settings, limits)
        self.raw = raw

    def training_clip(self, data: bytes, rng: np.random.Generator) -> Clip:
        """A random crop, rolled and scaled (AudioMAE's augmentations); float32 ``[1, frames, mel_bins]``.

        Raises:
            ClipError: the bytes cannot be decoded, or lie beyond a limit.
        """
        samples = excerpt(data, self.limits, self.settings.samples, rng.random())
        if self.settings.roll:
            samples = np.roll(samples, rng.integers(len(samples)))
        if self.settings.magnitude:
            samples = samples * np.float32(rng.beta(10, 10) + 0.5)
        return self._clip(samples, start_s=None, duration_s=len(samples) / SAMPLE_RATE)

    def windows(self, data: bytes) -> Iterator[Clip]:
        """Clips at every `frames` * 160 samples, so that their valid patches join to one stream of constant rate.

        Raises:
            ClipError: as `training_clip`; corruption further on is raised when the windows before it have been given.
        """
        yield from self.windows_of(decode(data, self.limits))

    def windows_of(self, blocks: Iterable[np.ndarray]) -> Iterator[Clip]:
        """The windows of sound in memory: blocks of float32 samples at 16 kHz, mono, one after the other.

        Window k sees the samples from k * frames * 160 on, as many as `frames` frames need (240 more than the step),
        whatever follows. A window exists where at least one frame (400 samples) is left; fewer remaining samples count
        to the last window's duration. Memory: a window and a block of decoded sound, whatever the length.
        """
        step = self.settings.frames * HOP
        pending = np.zeros(0, np.float32)
        start = 0
        for block in blocks:
            pending = np.concatenate((pending, block))
            while len(pending) >= step + WINDOW:
                yield self._clip(pending[: self.settings.samples], start / SAMPLE_RATE, step / SAMPLE_RATE)
                pending = pending[step:]
                start += step
        yield self._clip(pending[: self.settings.samples], start / SAMPLE_RATE, len(pending) / SAMPLE_RATE)

    def finish(self, values: torch.Tensor, extent: torch.Tensor | None) -> torch.Tensor:
        """float32 ``[B, 1, n]`` to float32 ``[B, 1, frames, mel_bins]``, equal to a clip's own to rounding."""
        assert extent is not None
        energies = fbank(values, self.settings.mel_bins)
        behind = torch.arange(self.settings.frames, device=values.device) >= extent[:, None]
        energies = energies.masked_fill_(behind[:, None, :, None], 0.0)
        return energies.sub_(self.settings.mean).div_(2 * self.settings.std)

    @property
    def features(self) -> dict[str, Any]:
        return {"mel_bins": self.settings.mel_bins}

    def content(self, clip: Clip) -> torch.Tensor:
        """float32 ``[1, n]``: log-mel energies of whole frames."""
        frames = frame_count(max(WINDOW, round((clip.duration_s or 0.0) * SAMPLE_RATE)))
        energies = clip.values[:, : min(frames, self.settings.frames)]
        return energies.reshape(1, -1) * (2 * self.settings.std) + self.settings.mean

    def rate(self, data: bytes) -> str | None:
        """The file's own sample rate."""
        return f"{open_recording(data, self.limits).rate} Hz"

    def picture(self, clip: Clip) -> np.ndarray:
        """uint8 ``[mel_bins, frames, 3]``: low frequencies at the bottom, padding grey."""
        from matplotlib import colormaps  # only people's pages need it; importing it costs every worker 0.3 s

        energies = clip.values[0].numpy().T[::-1]
        content = energies[:, : clip.valid * self.settings.patch[0]]
        low, high = np.percentile(content, (1, 99.8))
        shade = np.clip((energies - low) / max(high - low, 1e-6), 0, 1)
        picture = colormaps["magma"](shade, bytes=True)[..., :3]
        picture[:, content.shape[1] :] = 96
        return picture

    def audible(self, data: bytes, seconds: float) -> bytes | None:
        """What the model hears of it."""
        return as_mp3(excerpt(data, self.limits, round(seconds * SAMPLE_RATE), 0.0)) if seconds else None

    def _clip(self, samples: np.ndarray, start_s: float | None, duration_s: float) -> Clip:
        """Mean removed, features, zeros up to the clip's frames (before normalising, as AST does), normalised."""
        settings = self.settings
        centred = samples - samples.mean()
        if len(centred) < WINDOW:
            centred = np.pad(centred, (0, WINDOW - len(centred)))
        valid = math.ceil(frame_count(len(centred)) / settings.patch[0])
        if self.raw:
            filled = torch.zeros(1, settings.samples)
            filled[0, : len(centred)] = torch.from_numpy(centred)
            return Clip(filled, self.grid, valid, start_s, duration_s, extent=frame_count(len(centred)))
        energies = fbank(torch.from_numpy(centred), settings.mel_bins)
        values = torch.zeros(1, settings.frames, settings.mel_bins)
        values[0, : len(energies)] = energies
        values.sub_(settings.mean).div_(2 * settings.std)
        return Clip(values, self.grid, valid, start_s, duration_s)
