"""Lookup, decoding, gradients and precision of the residual quantizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizer_reference import (
    random_latents,
    random_quantizer,
    residuals,
    squared_distances,
    unit,
    with_codebooks,
)
from torch.nn import functional

from bridle.config import QuantizerSettings
from bridle.modeling import lookup
from bridle.modeling.lookup import Codebook, full_float32, nearest_codes
from bridle.modeling.quantizer import ResidualQuantizer

seeds = st.integers(0, 10_000)
norms = st.sampled_from(["input", "every"])
few = settings(max_examples=40, deadline=None)


@few
@given(seeds, st.integers(1, 5), st.integers(2, 40), st.integers(2, 48), st.integers(1, 50), norms)
def test_each_stage_picks_a_nearest_code_of_its_residual_as_eqs_1_to_3(seed, stages, size, dim, count, norm):
    quantizer = random_quantizer(seed, stages, size, dim, norm=norm)
    z = random_latents(seed, count, dim) * 3
    result = quantizer.encode(z)
    codes, books = result.codes.numpy(), quantizer.codebooks.numpy()
    seen = list(residuals(z.numpy(), books, codes, norm))
    for stage in range(stages):
        distances = squared_distances(seen[stage], books[stage])
        picked = distances[np.arange(count), codes[:, stage]]
        assert (picked <= distances.min(1) + 1e-5).all()
        # what this stage leaves over, before a next stage normalises it
        left = seen[stage] - books[stage][codes[:, stage]]
        np.testing.assert_allclose(result.errors[stage], (left**2).sum(-1).mean(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result.latents, seen[0], atol=1e-6)
    total = sum(books[m][codes[:, m]].astype(np.float64) for m in range(stages))
    np.testing.assert_allclose(result.quantized, total, atol=1e-6)


@few
@given(seeds, st.integers(1, 5), st.integers(2, 40), st.integers(1, 48), norms)
def test_decode_of_encode_equals_quantized_bit_for_bit(seed, stages, size, dim, norm):
    quantizer = random_quantizer(seed, stages, size, dim, norm=norm)
    result = quantizer.encode(random_latents(seed, 3, 7, dim))
    assert result.codes.shape == (3, 7, stages) and result.codes.dtype == torch.int64
    assert torch.equal(quantizer.decode(result.codes), result.quantized)
    assert torch.equal(quantizer.decode(result.codes.to(torch.int16)), result.quantized)
    trained, _ = quantizer(random_latents(seed, 3, 7, dim).requires_grad_())
    assert torch.equal(trained.quantized, result.quantized) and torch.equal(trained.codes, result.codes)


def test_decode_of_more_positions_than_a_chunk_is_still_bit_equal():
    quantizer = random_quantizer(0, 3, 16, 8)
    result = quantizer.encode(random_latents(0, 20_000, 8))
    assert torch.equal(quantizer.decode(result.codes), result.quantized)


def test_decode_takes_a_prefix_of_the_stages():
    quantizer = random_quantizer(1, 4, 16, 8)
    codes = quantizer.encode(random_latents(1, 5, 8)).codes
    expected = quantizer.codebooks[0][codes[:, 0]] + quantizer.codebooks[1][codes[:, 1]]
    assert torch.equal(quantizer.decode(codes[:, :2]), expected)
    for wrong in (codes.repeat(1, 2), codes[:, :0]):
        with pytest.raises(ValueError, match="expected 1 to 4"):
            quantizer.decode(wrong)


def test_validate_codes_refuses_values_and_types_that_are_no_codes():
    quantizer = random_quantizer(2, 2, 16, 8)
    quantizer.validate_codes(torch.tensor([[0, 15]]))
    quantizer.validate_codes(torch.empty(0, 2, dtype=torch.int32))
    for wrong, words in (
        (torch.tensor([[0, 16]]), "found 16, expected 0 to 15"),
        (torch.tensor([[-1, 3]]), "found -1"),
        (torch.tensor([[0.0, 1.0]]), "expected integers"),
        (torch.tensor([[0, 1, 2]]), "found 3 stages"),
        (torch.tensor(3), "found 0 stages"),
    ):
        with pytest.raises(ValueError, match=words):
            quantizer.validate_codes(wrong)


@few
@given(seeds, st.sampled_from([3, 17, 61, 257]), st.sampled_from([3, 8, 33]), st.integers(1, 70))
def test_of_equal_codes_the_lowest_index_wins(seed, size, dim, count):
    generator = torch.Generator().manual_seed(seed)
    distinct = torch.randn(1, 3, dim, generator=generator)
    owners = torch.randint(3, (size,), generator=generator)
    quantizer = with_codebooks(distinct[:, owners])
    lowest = torch.tensor([int((owners == owner).nonzero()[0]) for owner in owners])
    z = random_latents(seed, count, dim)
    codes = quantizer.encode(z).codes[:, 0]
    assert torch.equal(codes, lowest[codes])
    assert torch.equal(quantizer.soft_codes(z, 1)[:, 0, 0], codes)


def test_of_equal_codes_the_lowest_index_wins_even_if_the_product_is_rounded_in_favour_of_another():
    rows = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))[torch.tensor([0, 1, 0, 1, 1])]
    codebook = Codebook.of(rows)
    rounded = codebook._replace(squares=codebook.squares - 1e-5 * torch.arange(5))
    assert nearest_codes(rows, rounded).tolist() == [0, 1, 0, 1, 1]


def test_a_collision_of_hashes_joins_no_codes_that_differ(monkeypatch):
    monkeypatch.setattr(lookup, "_hash_multipliers", lambda dim, device: torch.zeros(dim, dtype=torch.int64))
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert Codebook.of(rows).first.tolist() == [0, 1, 2, 3, 4, 5]


def test_negative_zero_is_equal_to_zero_and_equal_norms_tie_at_the_origin():
    books = torch.tensor([[[0.0, -1.0], [-0.0, -1.0], [1.0, 0.0], [0.0, 1.0]]])
    assert Codebook.of(books[0]).first.tolist() == [0, 0, 2, 3]
    quantizer = with_codebooks(books)
    assert quantizer.encode(torch.tensor([[0.0, -3.0]])).codes.item() == 0
    assert quantizer.encode(torch.zeros(1, 2)).codes.item() == 0


@pytest.mark.parametrize("norm", ["input", "every"])
def test_subtracting_from_the_raw_residual_after_a_normalised_lookup_is_neither_reading(norm):
    quantizer = random_quantizer(3, 4, 32, 16, norm=norm)
    z = random_latents(3, 200, 16)
    books = quantizer.codebooks.double().numpy()
    raw, faulty = unit(z.double().numpy()), []
    for book in books:
        faulty.append(squared_distances(unit(raw), book).argmin(1))
        raw = raw - book[faulty[-1]]
    codes = quantizer.encode(z).codes.numpy()
    assert (codes[:, 0] == faulty[0]).all()
    assert (codes != np.stack(faulty, 1)).any(1).mean() > 0.1


def test_error_of_norm_input_does_not_depend_on_the_latents_length():
    quantizer = random_quantizer(4, 4, 64, 16)
    z = random_latents(4, 100, 16)
    near, far = quantizer.encode(z * 1e-2), quantizer.encode(z * 1e3)
    assert torch.equal(near.codes, far.codes)
    torch.testing.assert_close(near.errors, far.errors)


@pytest.mark.parametrize("norm", ["input", "every"])
def test_soft_codes_are_the_nearest_not_the_farthest(norm):
    quantizer = random_quantizer(5, 3, 24, 8, norm=norm)
    z = random_latents(5, 2, 20, 8)
    soft = quantizer.soft_codes(z, 4)
    codes = quantizer.encode(z).codes
    assert soft.shape == (2, 20, 3, 4) and torch.equal(soft[..., 0], codes)
    flat = codes.reshape(-1, 3).numpy()
    seen = list(residuals(z.reshape(-1, 8).numpy(), quantizer.codebooks.numpy(), flat, norm))
    for stage in range(3):
        distances = squared_distances(seen[stage], quantizer.codebooks[stage].numpy())
        picked = np.take_along_axis(distances, soft.reshape(-1, 3, 4)[:, stage].numpy(), 1)
        np.testing.assert_allclose(picked, np.sort(distances, 1)[:, :4], atol=1e-5)
    with pytest.raises(ValueError, match="expected 1 to 24"):
        quantizer.soft_codes(z, 25)


def test_gradient_of_quantized_goes_straight_to_the_latents():
    quantizer = random_quantizer(6, 4, 16, 8)
    z = random_latents(6, 9, 8).requires_grad_()
    weight = random_latents(7, 9, 8)
    (quantizer(z)[0].quantized * weight).sum().backward()
    plain = z.detach().clone().requires_grad_()
    (functional.normalize(plain, dim=-1) * weight).sum().backward()
    torch.testing.assert_close(z.grad, plain.grad)


def test_commitment_is_beta_times_the_squared_distance_to_all_stages_and_moves_the_latents():
    quantizer = random_quantizer(8, 4, 16, 8, beta=0.5)
    z = random_latents(8, 9, 8).requires_grad_()
    result, commitment = quantizer(z)
    target = quantizer.decode(result.codes)
    torch.testing.assert_close(commitment, 0.5 * (result.latents - target).square().sum(-1).mean())
    torch.testing.assert_close(commitment.detach() / 0.5, result.errors[-1])
    (gradient,) = torch.autograd.grad(commitment, result.latents)
    torch.testing.assert_close(gradient, 0.5 * 2 * (result.latents - target) / 9)


def test_zero_latents_keep_finite_gradients():
    quantizer = random_quantizer(9, 2, 8, 4)
    z = torch.zeros(3, 4, requires_grad=True)
    result, commitment = quantizer(z)
    (commitment + result.quantized.sum()).backward()
    assert z.grad.isfinite().all()


def test_bfloat16_autocast_and_reduced_matmul_precision_change_nothing_inside():
    quantizer = random_quantizer(10, 4, 64, 32)
    z = random_latents(10, 500, 32)
    expected = quantizer.encode(z)
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        with torch.autocast("cpu", torch.bfloat16):
            inside, commitment = quantizer(z)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert commitment.dtype == inside.quantized.dtype == torch.float32
    assert torch.equal(inside.codes, expected.codes) and torch.equal(inside.quantized, expected.quantized)


def test_full_precision_lasts_until_the_last_user_leaves():
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16"
        with full_float32(torch.device("cpu")):
            with full_float32(torch.device("cpu")):
                assert backend.fp32_precision == "ieee"
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_input_is_quantized_as_its_float32_value(dtype):
    quantizer = random_quantizer(11, 3, 32, 16)
    z = random_latents(11, 40, 16).to(dtype)
    result, expected = quantizer.encode(z), quantizer.encode(z.float())
    assert torch.equal(result.codes, expected.codes) and result.latents.dtype == torch.float32


def test_an_empty_batch_gives_empty_codes_and_no_nan():
    quantizer = random_quantizer(12, 3, 8, 4)
    result, commitment = quantizer(torch.zeros(0, 5, 4))
    assert result.codes.shape == (0, 5, 3) and commitment.item() == 0 and result.errors.tolist() == [0, 0, 0]


def test_codebooks_that_were_never_initialized_are_refused():
    quantizer = ResidualQuantizer(QuantizerSettings(codebooks=2, codebook_size=4, dim=3))
    with pytest.raises(RuntimeError, match="not initialized"):
        quantizer.encode(torch.ones(1, 3))


def test_latents_of_another_width_are_refused_with_both_widths():
    with pytest.raises(ValueError, match="found width 5, expected 4"):
        random_quantizer(13, 2, 8, 4).encode(torch.ones(2, 5))
