"""The recipes named after the paper's modalities build the paper's models, and every phase takes a real step."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from bridle.config import load_recipe
from bridle.modalities import build_modality
from bridle.model_folder import patch_shape
from bridle.modeling.bridle import Components, parameter_count
from bridle.modeling.masking import draw_mask
from bridle.training.phases import EncoderPhaseJob, TokenizerPhaseJob

CPU = torch.device("cpu")
COUNTS = {
    "audio": {"encoder": 85_254_144, "decoder": 51_371_264, "tokenizer": 86_041_600, "estimator": 22_053_120},
    "image": {"encoder": 85_647_360, "decoder": 51_371_264, "tokenizer": 86_434_816, "estimator": 22_053_120},
    "video": {"encoder": 86_236_416, "decoder": 7_788_544, "tokenizer": 87_023_872, "estimator": 29_140_992},
}
GRIDS = {"audio": (64, 8), "image": (14, 14), "video": (8, 14, 14)}


@pytest.mark.parametrize("name", COUNTS)
def test_the_recipe_builds_the_papers_model(name):
    recipe = load_recipe(name)
    modality = build_modality(recipe.modality, recipe.clip)
    make = Components(recipe.model, patch_shape(modality))
    assert tuple(modality.grid.values()) == GRIDS[name]
    with torch.device("meta"):  # shapes tell the counts; weights would be 240 million drawn numbers
        assert {part: parameter_count(getattr(make, part)(0)) for part in COUNTS[name]} == COUNTS[name]


def before_and_after_a_step(job, batch: dict[str, torch.Tensor]) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in job.module.parameters() if p.requires_grad], lr=1e-4)
    inputs = job.inputs(batch)
    before, *_ = job.module(*inputs)
    before.backward()
    optimizer.step()
    job.after_step(None)
    with torch.no_grad():
        after, *_ = job.module(*inputs)
    return [before.item(), after.item()]


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_every_kind_of_phase_of_the_papers_model_takes_a_step_that_lowers_its_loss(name):
    recipe = load_recipe(name)
    modality = build_modality(recipe.modality, recipe.clip)
    patch, quantizer = patch_shape(modality), recipe.model.quantizer
    make = Components(recipe.model, patch)
    grid = tuple(modality.grid.values())
    sides = [count * side for count, side in zip(grid, patch.size, strict=True)]
    generator = torch.Generator().manual_seed(0)
    batch = {"values": torch.randn(1, patch.channels, *sides, generator=generator)}
    mask = draw_mask(recipe.mask, grid, np.random.default_rng(0))
    batch["masked"], batch["visible"] = mask.nonzero().T, (~mask).nonzero().T

    cold = make.cold_start_tokenizer(0)
    cold.quantizer.initialize(cold.latents(batch["values"]).flatten(0, 1), generator)
    job = EncoderPhaseJob(make.encoder(1), make.decoder(2), cold, quantizer, CPU, bf16=False)
    first = before_and_after_a_step(job, batch)
    del job, cold
    gc.collect()
    learner = make.tokenizer(3)
    with torch.no_grad():
        learner.quantizer.initialize(learner.latents(batch["values"]).flatten(0, 1), generator)
    job = TokenizerPhaseJob(learner, make.estimator(4), make.encoder(1), quantizer, CPU, bf16=False)
    second = before_and_after_a_step(job, batch)
    for losses in (first, second):  # the second iteration's encoder phase is the first's with another frozen tokenizer
        assert losses[1] < losses[0]
        assert np.isfinite(losses).all()
    assert first[0] == pytest.approx(4 * np.log(256), rel=0.2)
