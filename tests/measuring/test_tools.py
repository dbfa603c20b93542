"""What is computed for machines that are not at hand holds where it can be checked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bridle.config import Recipe, load_recipe
from bridle.modalities import build_modality
from bridle.model_folder import patch_shape
from bridle.modeling.bridle import Components
from bridle.training.flops import ClipFlops

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import memory_table
import roofline
import scaling


def parts_of(recipe: Recipe) -> tuple[Components, tuple[int, ...]]:
    modality = build_modality(recipe.modality, recipe.clip)
    return Components(recipe.model, patch_shape(modality)), tuple(modality.grid.values())


def test_without_memory_or_launches_the_bound_is_the_products_alone() -> None:
    recipe = load_recipe("audio-mini")
    make, grid = parts_of(recipe)
    flops = ClipFlops(recipe, make.patch, grid)
    expected = {"encoder": flops.of_phase(3), "tokenizer": flops.of_phase(2)}
    with FakeTensorMode(allow_non_fake_inputs=True):
        clips = memory_table.batch(recipe, make.patch, grid, 2)
        for name, job in memory_table.jobs(recipe, make).items():
            bounds = roofline.Bounds(rate=1.0, bandwidth=float("inf"), launch=0.0)
            roofline.step(job, clips, True, bounds)
            # Fused attention computes one product of its backward pass again.
            assert 1.0 <= bounds.seconds / (2 * expected[name]) < 1.02


def test_activations_are_what_a_real_step_holds() -> None:
    """A step keeps its inputs' products until the backward pass: twice the clips, twice the bytes."""
    recipe = load_recipe("audio-mini")
    make, grid = parts_of(recipe)
    with FakeTensorMode(allow_non_fake_inputs=True):
        held = [
            memory_table.activations(
                memory_table.jobs(recipe, make)["tokenizer"], memory_table.batch(recipe, make.patch, grid, micro)
            )
            for micro in (4, 8)
        ]
    tokens, width, depth = 4 * 64, recipe.model.encoder.width, recipe.model.encoder.depth
    assert held[1] / held[0] == pytest.approx(2.0, rel=0.1)
    assert held[0] > depth * tokens * width * 20  # of a block inputs, q, k, v and hidden layer


def test_more_gpus_keep_less_and_larger_batches_more() -> None:
    cluster = scaling.Cluster()
    waits = [scaling.exposed(1e8, 2, n, 0.02, 1e6, cluster) for n in (1, 8, 64, 1024)]
    assert waits[0] == 0 and waits == sorted(waits)
    codebooks = 2 * scaling.collective(0, 64, cluster)
    assert scaling.exposed(1e8, 3, 64, 0.5, 0, cluster) == codebooks  # all weights and gradients behind a long step
    # One collective of 200 MB over 8 GPUs: 7/8 of it over a link of 450 GB/s at 0.8, and 2 buckets of 7 hops.
    assert scaling.collective(2e8, 8, cluster) == pytest.approx(2e8 * 7 / 8 / 360e9 + 2 * 7e-6)
    assert memory_table.states(1000, 0, 1, 10) == 2000 + 2000 + 1200
    assert memory_table.states(1000, 10, 3, 10) == 1600 + 20


def test_torch_is_left_as_it_was() -> None:
    assert torch.nn.Linear(1, 1).to(torch.float64).weight.dtype == torch.float64
