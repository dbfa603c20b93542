"""`bridle.hear`: what HEAR 2021's validator and X-ARES's checker ask, and that embeddings are those of `encode`."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import soundfile
import torch
from evaluation_inputs import tone, write_random_model

import bridle
from bridle import hear
from bridle.modalities.clip import ClipError
from bridle.model_folder import ModelError


def _samples(file: bytes) -> torch.Tensor:
    return torch.from_numpy(soundfile.read(io.BytesIO(file), dtype="float32")[0])


def test_it_keeps_the_rules_that_the_kits_check(model_folder: Path) -> None:
    model = hear.load_model(str(model_folder))
    assert isinstance(model, torch.nn.Module) and type(model).__name__.endswith("Encoder")
    assert model.to("cpu").sample_rate == model.sampling_rate == 16_000
    audio = torch.rand(3, 32_000) * 2 - 1
    embeddings, times = hear.get_timestamp_embeddings(audio, model)
    assert embeddings.dtype == torch.float32 and times.dtype == torch.float32
    assert embeddings.shape == (3, 13, model.timestamp_embedding_size) and times.shape == (3, 13)
    assert torch.allclose(times, 87.5 + 160.0 * torch.arange(13).expand(3, -1))  # 16 frames, 10 ms apart, of 25 ms
    scenes = hear.get_scene_embeddings(audio, model)
    assert scenes.dtype == torch.float32 and scenes.shape == (3, model.scene_embedding_size)
    encoded = model(torch.randn(2, 50_000))
    assert encoded.shape == (2, round(50_000 / 16 / model.hop_size_in_ms), model.output_dim)


def test_embeddings_are_those_of_the_file_whatever_else_is_in_the_batch(model_folder: Path) -> None:
    sound = _samples(tone(2.5))
    others = torch.randn(4, len(sound)) * 0.1
    expected = bridle.load(model_folder).encode(tone(2.5)).unflatten(0, (-1, 8)).flatten(1)
    model = hear.load_model(str(model_folder))
    embeddings, _ = hear.get_timestamp_embeddings(torch.stack([*others, sound]), model)
    assert torch.allclose(embeddings[-1], expected, atol=1e-5)
    assert torch.allclose(hear.get_scene_embeddings(sound[None], model)[0], expected.mean(0), atol=1e-5)


@pytest.mark.parametrize(
    "audio", [torch.zeros(0, 16_000), torch.zeros(16_000), torch.full((1, 800), torch.inf), torch.ones(1, 800).int()]
)
def test_what_is_no_batch_of_sounds_is_refused(model_folder: Path, audio: torch.Tensor) -> None:
    with pytest.raises(ClipError):
        hear.get_scene_embeddings(audio, hear.load_model(str(model_folder)))


def test_a_model_of_pictures_is_refused(tmp_path: Path) -> None:
    clip = {"size": [32, 32], "patch": [8, 8]}
    pictures = write_random_model(tmp_path / "pictures", modality="image", clip=clip)
    with pytest.raises(ModelError, match="expected audio"):
        hear.load_model(str(pictures))
