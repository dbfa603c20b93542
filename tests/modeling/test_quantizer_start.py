"""How the codebooks begin: k-means or uniform, the reset of unused codes, and degenerate first batches."""

from __future__ import annotations

import pytest
import torch
from quantizer_reference import random_latents

from bridle.config import QuantizerSettings
from bridle.modeling.quantizer import ResidualQuantizer, normalize


def started(latents, seed=0, **settings):
    quantizer = ResidualQuantizer(QuantizerSettings(dim=latents.shape[1], **settings))
    quantizer.initialize(latents, torch.Generator().manual_seed(seed))
    return quantizer


def clustered(seed, count, clusters, dim):
    """Unit vectors around cluster centres."""
    owners = torch.arange(count) % clusters
    return normalize(random_latents(seed, clusters, dim)[owners] + 0.2 * random_latents(seed + 1, count, dim))


@pytest.mark.parametrize("norm", ["input", "every"])
def test_start_depends_on_latents_and_generator_only(norm):
    z = clustered(0, 600, 20, 8)
    torch.manual_seed(1)
    one = started(z, codebooks=3, codebook_size=16, norm=norm)
    torch.manual_seed(2)
    two = started(z * 5, codebooks=3, codebook_size=16, norm=norm)
    other = started(z, seed=9, codebooks=3, codebook_size=16, norm=norm)
    torch.testing.assert_close(one.codebooks, two.codebooks)
    assert not torch.allclose(one.codebooks, other.codebooks)


@pytest.mark.parametrize("norm", ["input", "every"])
def test_every_stage_of_kmeans_starts_on_the_residuals_of_the_stages_before(norm):
    z = clustered(3, 800, 40, 8)
    quantizer = started(z, codebooks=3, codebook_size=16, norm=norm)
    result = quantizer.encode(z)
    assert result.errors[0] < 0.5
    if norm == "input":
        assert (result.errors.diff() < 0).all()
    residual = result.latents
    for stage in range(3):
        residual = normalize(residual) if norm == "every" else residual
        assert result.codes[:, stage].unique().numel() == 16
        residual = residual - quantizer.codebooks[stage][result.codes[:, stage]]
        torch.testing.assert_close(residual.square().sum(1).mean(), result.errors[stage])


def test_running_counts_and_sums_start_from_the_cluster_sizes():
    z = clustered(4, 500, 10, 8)
    quantizer = started(z, codebooks=2, codebook_size=16)
    torch.testing.assert_close(quantizer.code_sum, quantizer.cluster_size[..., None] * quantizer.codebooks)
    used = torch.stack([torch.bincount(codes, minlength=16) for codes in quantizer.encode(z).codes.t()])
    assert (quantizer.cluster_size >= 1).all()
    assert (quantizer.cluster_size == used.clamp(min=1)).float().mean() > 0.9
    uniform = started(z, codebooks=2, codebook_size=16, init="uniform")
    assert (uniform.cluster_size == 1).all()


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_uniform_start_covers_minus_one_to_one_times_the_inputs_scale(scale):
    z = random_latents(5, 2000, 16) * scale
    rows = started(z, codebooks=1, codebook_size=512, init="uniform", reset_threshold=0).codebooks[0]
    bound = (3 / 16) ** 0.5  # unit latents of 16 numbers have a root mean square of 1/4
    assert -bound <= rows.min() < -0.99 * bound and 0.99 * bound < rows.max() <= bound
    assert abs(rows.mean()) < 0.02 * bound
    torch.testing.assert_close(rows.square().mean(), torch.tensor(1 / 16), rtol=0.05, atol=0)


def test_codes_unused_in_the_first_batch_become_residuals_of_it_with_count_and_sum():
    z = clustered(6, 400, 6, 16)
    kept = started(z, codebooks=1, codebook_size=64, init="uniform", reset_threshold=0)
    reset = started(z, codebooks=1, codebook_size=64, init="uniform", reset_threshold=1)
    used = torch.bincount(kept.encode(z).codes[:, 0], minlength=64) > 0
    assert (~used).sum() > 20
    assert torch.equal(reset.codebooks[0][used], kept.codebooks[0][used])
    replaced = reset.codebooks[0][~used]
    assert (torch.cdist(replaced, normalize(z)).amin(1) < 1e-3).all()
    assert replaced.unique(dim=0).shape == replaced.shape
    assert (reset.cluster_size[0][~used] == 1).all() and torch.equal(reset.code_sum[0][~used], replaced)
    assert torch.bincount(reset.encode(z).codes[:, 0], minlength=64).gt(0).sum() > used.sum() + 20


def test_a_reset_code_survives_the_next_moving_average_step():
    z = clustered(7, 400, 6, 16)
    quantizer = started(z, codebooks=1, codebook_size=64, init="uniform")
    start = quantizer.codebooks.clone()
    codes = quantizer(z[:10])[0].codes[:, 0]
    quantizer.update(None)
    unused = torch.bincount(codes, minlength=64) == 0
    torch.testing.assert_close(quantizer.codebooks[0][unused], start[0][unused], rtol=2e-3, atol=1e-5)


def test_a_reset_threshold_above_one_replaces_rarely_used_codes():
    z = clustered(8, 300, 12, 8)
    kept = started(z, codebooks=1, codebook_size=32, reset_threshold=0)
    reset = started(z, codebooks=1, codebook_size=32, reset_threshold=6)
    rare = torch.bincount(kept.encode(z).codes[:, 0], minlength=32) < 6
    assert 0 < rare.sum() < 32
    assert torch.equal((reset.codebooks != kept.codebooks).any(-1)[0], rare)
    assert (reset.cluster_size[0][rare] == 1).all()


@pytest.mark.parametrize("init", ["kmeans", "uniform"])
@pytest.mark.parametrize("count", [1, 5, 40, 300])
@pytest.mark.parametrize("kind", ["equal", "few", "different"])
def test_stages_with_nothing_left_to_quantize_do_not_collapse(init, count, kind):
    z = random_latents(9, count, 8)
    if kind != "different":
        z = z[torch.arange(count) % (1 if kind == "equal" else 3)]
    quantizer = started(z, codebooks=3, codebook_size=32, init=init)
    for rows in quantizer.codebooks:
        assert rows.isfinite().all()
        apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(1)
        assert apart.min() > 1e-3
    # a later batch that differs must find codes to use in every stage
    codes = quantizer.encode(z[torch.arange(400) % count] + 0.02 * random_latents(10, 400, 8)).codes
    assert all(codes[:, stage].unique().numel() > 1 for stage in range(3))


def test_a_first_batch_that_cannot_be_used_is_refused_and_changes_nothing():
    quantizer = ResidualQuantizer(QuantizerSettings(codebooks=2, codebook_size=4, dim=3))
    for wrong, words in (
        (torch.full((5, 3), float("nan")), "not finite"),
        (torch.zeros(0, 3), "expected"),
        (torch.zeros(5, 4), r"found shape \[5, 4\]"),
        (torch.zeros(2, 5, 3), "expected"),
    ):
        with pytest.raises(ValueError, match=words):
            quantizer.initialize(wrong, torch.Generator())
    assert not quantizer.initialized and not quantizer.codebooks.any()


def test_starting_twice_is_refused():
    z = random_latents(11, 50, 4)
    quantizer = started(z, codebooks=2, codebook_size=8)
    before = quantizer.codebooks.clone()
    with pytest.raises(RuntimeError, match="already initialized"):
        quantizer.initialize(z, torch.Generator())
    assert torch.equal(quantizer.codebooks, before)
