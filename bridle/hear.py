"""A sound model as HEAR 2021 and X-ARES ask for it: `load_model`, `get_scene_embeddings`, `get_timestamp_embeddings`.

https://hearbenchmark.com/hear-api.html. HEAR's kit takes the module by name (`bridle.hear`) and a model folder as the
model's file; X-ARES's takes a file of yours whose class gives what `load_model` gives (docs/evaluation.md).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from bridle.modalities.audio import Audio
from bridle.modalities.audio_frames import HOP, SAMPLE_RATE, WINDOW
from bridle.modalities.clip import ClipError
from bridle.model import CLIPS_AT_ONCE, BridleModel, batched, stacked
from bridle.model_folder import ModelError, load


class SoundEncoder(nn.Module):
    """The encoder of a sound model, with the attributes that the two kits read.

    An embedding is of a time step of the grid: those of all its frequency bands, one after the other.
    """

    sample_rate: int = SAMPLE_RATE
    sampling_rate: int = SAMPLE_RATE
    """X-ARES's name for it."""

    def __init__(self, model: BridleModel) -> None:
        """Raises:
        ModelError: not a model of sound."""
        super().__init__()
        if not isinstance(model.modality, Audio):
            raise ModelError(f"{model.config.name}: modality {model.config.modality}, expected audio")
        self.encoder = model.encoder  # so that `.to(device)` finds the weights
        self.model, self.sound = model, model.modality
        size = model.config.encoder.width * self.sound.grid["frequency"]
        self.scene_embedding_size = self.timestamp_embedding_size = self.output_dim = size
        self.hop_size_in_ms = self.sound.patch[0] * HOP * 1000 / SAMPLE_RATE

    def forward(self, audio: Tensor) -> Tensor:
        """Sounds, float ``[B, samples]`` at 16 kHz, mono, from -1 to 1, to float32 ``[B, T, output_dim]``.

        Each sound is cut into windows as a file is; T is its number of time steps, the last one padded.

        Raises:
            ClipError: no sound, no samples, or values that are not finite.
        """
        if audio.ndim != 2 or not audio.numel() or not audio.is_floating_point():
            found = f"{audio.dtype} {list(audio.shape)}"
            raise ClipError(f"found {found}, expected floats [sounds, samples], at least one of each")
        if not audio.isfinite().all():
            raise ClipError("holds samples that are not finite numbers; mend the sounds")
        sounds = audio.detach().float().cpu().numpy()
        steps: list[list[Tensor]] = [[] for _ in sounds]
        clips = ((number, clip) for number, sound in enumerate(sounds) for clip in self.sound.windows_of([sound]))
        for some in batched(clips, CLIPS_AT_ONCE):
            embeddings = self.model.embed(*stacked([clip for _, clip in some]))
            for (number, clip), found in zip(some, embeddings, strict=True):
                content = found[: clip.positions].unflatten(0, (-1, clip.grid["frequency"]))
                steps[number].append(content.flatten(1))
        return torch.stack([torch.cat(parts) for parts in steps]).to(audio.device)


def load_model(model_file_path: str = "") -> SoundEncoder:
    """The model in a folder or of the hub; without a path, the demo model of sound that ships with the package.

    Raises:
        ModelError: no model, or not one of sound; see `bridle.load`.
    """
    return SoundEncoder(load(model_file_path or "builtin:audio"))


def get_timestamp_embeddings(audio: Tensor, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Embeddings of time steps, float32 ``[B, T, size]``, and when they are, float32 ``[B, T]``.

    audio: as `SoundEncoder.forward`; model: of `load_model`. A time is in milliseconds from the beginning of the sound,
    the middle of what the step's patch sees.

    Raises:
        ClipError: see `SoundEncoder.forward`.
    """
    encoder = cast(SoundEncoder, model)
    embeddings = encoder(audio)
    frames = encoder.sound.patch[0]
    middle = ((frames - 1) * HOP + WINDOW) / 2 * 1000 / SAMPLE_RATE
    times = middle + encoder.hop_size_in_ms * torch.arange(embeddings.shape[1], device=audio.device)
    return embeddings, times.float().expand(len(audio), -1).contiguous()


def get_scene_embeddings(audio: Tensor, model: nn.Module) -> Tensor:
    """One embedding a sound, float32 ``[B, size]``: the mean over its time steps; arguments as above.

    Raises:
        ClipError: see `SoundEncoder.forward`.
    """
    scene: Tensor = cast(SoundEncoder, model)(audio).mean(1)
    return scene
