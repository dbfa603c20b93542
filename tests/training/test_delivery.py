"""Clips that loaders leave raw and the device finishes are the clips that loaders would have finished."""

from __future__ import annotations

import pytest
import torch

from bridle.config import Recipe, load_recipe
from bridle.data.shards import open_shards
from bridle.data.stream import Stream
from bridle.modalities import build_modality
from bridle.modalities.clip import Modality
from bridle.training.clips import Delivery, MakeClip, raw_modality

CPU = torch.device("cpu")


def batch(recipe: Recipe, modality: Modality, *, augment: bool) -> dict[str, torch.Tensor]:
    shards = open_shards([f"builtin:{recipe.modality}"], extensions=modality.extensions)
    stream = Stream(shards, MakeClip(modality, recipe.mask, augment), seed=0, block=4, window=4)
    found = stream.micro_batches(
        start=0, stop=6, batch_size=6, micro_batch_size=6, rank=0, world=1, workers=0
    )  # fmt: skip
    return next(found).tensors


def both(recipe: Recipe, *, augment: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A batch finished by the loader, and the same as it comes raw."""
    finished = build_modality(recipe.modality, recipe.clip)
    return batch(recipe, finished, augment=augment), batch(recipe, raw_modality(recipe), augment=augment)


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("name", ["image-mini", "video-mini"])
def test_pictures_and_films_come_as_bytes_and_are_finished_to_the_last_bit(name: str, augment: bool) -> None:
    recipe = load_recipe(name, ["clip.isolate=false"] if name == "video-mini" else [])
    finished, raw = both(recipe, augment=augment)
    assert raw["values"].dtype == torch.uint8
    assert raw["values"].nbytes * 4 == finished["values"].nbytes
    delivered = Delivery(raw_modality(recipe), CPU)(raw)
    assert torch.equal(delivered["values"], finished["values"])
    assert torch.equal(delivered["masked"], finished["masked"])


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("seconds", [1.28, 7.0])
def test_spectrograms_made_where_the_model_is_are_the_loaders(seconds: float, augment: bool) -> None:
    changed = [f"clip.seconds={seconds}", "data.features_on_device=true"]
    finished, raw = both(load_recipe("audio-mini", changed), augment=augment)
    assert raw["values"].shape[1:] != finished["values"].shape[1:]
    assert len(set(raw["extent"].tolist())) > 1  # clips of several lengths, with padding
    delivered = Delivery(raw_modality(load_recipe("audio-mini", changed)), CPU)(raw)
    assert torch.allclose(delivered["values"], finished["values"], rtol=0, atol=1e-5)
    assert "extent" not in delivered


def test_sound_comes_as_spectrograms_unless_asked_for() -> None:
    assert not raw_modality(load_recipe("audio-mini")).raw
