"""k-means for the codebooks' start."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizer_reference import random_latents, squared_distances

from bridle.modeling.kmeans import kmeans, random_rows


def run(points, size, steps=10, seed=0):
    return kmeans(points, size, steps, torch.Generator().manual_seed(seed))


def inertia(points, centres):
    return squared_distances(points.numpy(), centres.numpy()).min(1).mean()


def test_one_step_is_lloyds_step_from_the_drawn_points():
    points = random_latents(0, 300, 5)
    start = points[random_rows(300, 7, torch.Generator().manual_seed(3))].numpy()
    owners = squared_distances(points.numpy(), start).argmin(1)
    expected = np.stack([points.numpy()[owners == i].mean(0) for i in range(7)])
    np.testing.assert_allclose(run(points, 7, steps=1, seed=3), expected, atol=1e-5)


def test_error_falls_with_every_further_step():
    points = random_latents(1, 500, 6)
    errors = [inertia(points, run(points, 12, steps)) for steps in range(1, 11)]
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.97 * errors[0]


def test_equal_generators_give_equal_centres_and_others_do_not():
    points = random_latents(2, 200, 4)
    torch.manual_seed(0)
    one = run(points, 9)
    torch.manual_seed(1)
    assert torch.equal(one, run(points, 9))
    assert not torch.equal(one, run(points, 9, seed=1))


def test_more_points_than_a_chunk_give_the_clusters_too():
    centres = torch.eye(4) * 10
    points = centres[torch.arange(20_000) % 4] + 0.1 * random_latents(3, 20_000, 4)
    found = run(points, 12)
    assert torch.cdist(centres, found).amin(1).max() < 0.3


def test_a_cluster_without_points_keeps_its_centre():
    points = torch.ones(20, 2)
    points[13] = torch.tensor([5.0, 0.0])
    found = run(points, 3, steps=4)  # at least one centre is drawn twice and loses its points to the lower index
    assert torch.cdist(found, points.unique(dim=0)).amin(1).max() < 1.2 and found.isfinite().all()
    assert inertia(torch.ones(6, 2), run(torch.ones(6, 2), 4)) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 30), st.integers(2, 40), st.integers(1, 5))
def test_any_number_of_points_gives_finite_centres_within_their_range(seed, count, size, dim):
    points = random_latents(seed, count, dim)
    found = run(points, size, steps=3)
    assert found.shape == (size, dim) and found.isfinite().all()
    assert (found >= points.amin(0) - 1e-5).all() and (found <= points.amax(0) + 1e-5).all()
    if count <= size:
        assert inertia(points, found) < 1e-10


def test_drawn_rows_are_distinct_while_there_are_enough():
    drawn = random_rows(10, 25, torch.Generator().manual_seed(0))
    assert drawn[:10].unique().numel() == 10 and drawn[10:20].unique().numel() == 10
    assert len(drawn) == 25 and drawn.max() < 10
    assert len(random_rows(5, 0, torch.Generator())) == 0
