"""The codebooks' moving averages and the quantizer's state."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizer_reference import MovingAverage, random_latents, random_quantizer, residuals, with_codebooks

from bridle.config import QuantizerSettings
from bridle.modeling.quantizer import ResidualQuantizer

few = settings(max_examples=25, deadline=None)


def state_of(quantizer):
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


def assert_same_state(quantizer, before):
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@few
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 12), st.sampled_from([0.1, 0.5, 0.99]), st.booleans())
def test_several_steps_follow_eqs_9_to_13(seed, stages, size, decay, every):
    norm = "every" if every else "input"
    quantizer = random_quantizer(seed, stages, size, 6, decay=decay, epsilon=1e-3, norm=norm)
    averages = [
        MovingAverage(quantizer.cluster_size[m].numpy(), quantizer.code_sum[m].numpy(), decay, 1e-3)
        for m in range(stages)
    ]
    for step in range(4):
        z = random_latents(seed + step, 30, 6)
        books = quantizer.codebooks.numpy().copy()
        codes = quantizer(z)[0].codes.numpy()
        quantizer.update(None)
        stage_inputs = list(residuals(z.numpy(), books, codes, norm))
        for m, average in enumerate(averages):
            expected = average.step(stage_inputs[m], codes[:, m])
            np.testing.assert_allclose(quantizer.cluster_size[m], average.sizes, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(quantizer.code_sum[m], average.sums, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(quantizer.codebooks[m], expected, rtol=1e-3, atol=1e-4)


def test_constant_assignments_lead_to_the_fixed_point_of_proposition_3():
    size, dim, epsilon = 5, 6, 0.05
    books = torch.eye(size, dim)[None] * 0.8
    quantizer = with_codebooks(books, decay=0.7, epsilon=epsilon)
    # 1 to 4 latents near the first four codes, none near the fifth
    owners = torch.repeat_interleave(torch.arange(4), torch.arange(1, 5))
    z = torch.eye(size, dim)[owners] + 0.1 * random_latents(0, 10, dim)
    for _ in range(100):
        result, _ = quantizer(z)
        assert torch.equal(result.codes[:, 0], owners)
        quantizer.update(None)
    n = torch.bincount(owners, minlength=size).double()
    ell = torch.zeros(size, dim, dtype=torch.double).index_add_(0, owners, result.latents.double())
    expected = ell / (n + epsilon)[:, None] * (n.sum() + size * epsilon) / n.sum()
    torch.testing.assert_close(quantizer.cluster_size[0].double(), n, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(quantizer.code_sum[0].double(), ell, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(quantizer.codebooks[0].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["kmeans", "uniform"])
def test_a_code_unused_in_the_first_step_stays_where_it_was(init):
    quantizer = ResidualQuantizer(QuantizerSettings(codebooks=2, codebook_size=16, dim=8, init=init))
    quantizer.initialize(random_latents(1, 200, 8), torch.Generator().manual_seed(0))
    start = quantizer.codebooks.clone()
    used = torch.zeros(2, 16, dtype=torch.bool)
    used.scatter_(1, quantizer(random_latents(1, 200, 8)[:6])[0].codes.t(), True)
    quantizer.update(None)
    assert (~used).sum() > 10
    torch.testing.assert_close(quantizer.codebooks[~used], start[~used], rtol=1e-3, atol=1e-5)


def test_codes_right_after_kmeans_and_one_step_are_still_the_clusters_means():
    quantizer = ResidualQuantizer(QuantizerSettings(codebooks=1, codebook_size=8, dim=8))
    z = random_latents(2, 400, 8)
    quantizer.initialize(z, torch.Generator().manual_seed(0))
    start = quantizer.codebooks.clone()
    quantizer(z)
    quantizer.update(None)
    torch.testing.assert_close(quantizer.codebooks, start, atol=5e-3, rtol=0)


def test_update_clears_the_statistics_and_calls_all_reduce_once():
    quantizer = random_quantizer(3, 4, 8, 4)
    reduced = []
    quantizer(random_latents(3, 20, 4))
    assert quantizer.counts.sum(1).tolist() == [20, 20, 20, 20]
    quantizer.update(reduced.append)
    assert len(reduced) == 1 and reduced[0].dtype == torch.float32
    assert not quantizer.statistics.any()


@few
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 3]))
def test_codebooks_do_not_depend_on_ranks_or_micro_batches(seed, ranks, micro_batches):
    whole = random_quantizer(seed, 3, 8, 6, decay=0.8)
    shares = [copy.deepcopy(whole) for _ in range(ranks)]
    for step in range(3):
        z = random_latents(seed + step, 4 * ranks * micro_batches, 6)
        whole(z)
        whole.update(None)
        for rank, share in enumerate(shares):
            for part in z.chunk(micro_batches):
                share(part.chunk(ranks)[rank])
        total = sum(share.statistics for share in shares)
        for share in shares:
            share.update(lambda tensor, total=total: tensor.copy_(total))
    for share in shares:
        assert torch.equal(share.codebooks, shares[0].codebooks)
        torch.testing.assert_close(share.codebooks, whole.codebooks, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(share.cluster_size, whole.cluster_size)


def test_latents_that_are_not_finite_leave_the_codebooks_untouched():
    quantizer = random_quantizer(4, 2, 8, 4)
    before = state_of(quantizer)
    bad = random_latents(4, 10, 4)
    bad[3, 1] = float("nan")
    quantizer(bad)
    quantizer.update(None)
    assert_same_state(quantizer, before)
    quantizer(random_latents(5, 10, 4))
    quantizer.update(None)
    assert quantizer.codebooks.isfinite().all() and not torch.equal(quantizer.codebooks, before["codebooks"])


def test_evaluation_leaves_the_state_unchanged():
    quantizer = random_quantizer(6, 3, 8, 4).eval()
    before = state_of(quantizer)
    z = random_latents(6, 30, 4)
    result, _ = quantizer(z)
    quantizer.encode(z)
    quantizer.decode(result.codes)
    quantizer.soft_codes(z, 2)
    assert_same_state(quantizer, before)
    assert not quantizer.statistics.any()


def test_encode_in_training_mode_gathers_nothing():
    quantizer = random_quantizer(7, 3, 8, 4).train()
    quantizer.encode(random_latents(7, 30, 4))
    assert not quantizer.statistics.any()


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_casts_of_the_model_leave_every_bit_of_the_state(cast):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), random_quantizer(8, 3, 8, 4))
    before = state_of(model[1])
    getattr(model, cast)()
    model.to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    assert_same_state(model[1], before)
    assert {tensor.dtype for tensor in model[1].buffers()} == {torch.float32, torch.bool}
    assert all(tensor.is_meta for tensor in model.to("meta")[1].buffers())


def test_counts_grow_past_256_one_at_a_time_after_a_bfloat16_cast():
    quantizer = random_quantizer(9, 1, 4, 4).bfloat16()
    z = random_latents(9, 1, 4).bfloat16()
    for _ in range(300):
        quantizer(z)
    assert quantizer.counts.max().item() == 300


def test_state_is_buffers_never_parameters():
    quantizer = random_quantizer(10, 2, 4, 4)
    assert not list(quantizer.parameters())
    assert set(quantizer.state_dict()) == {"codebooks", "cluster_size", "code_sum", "initialized"}


def test_strict_loading_restores_initialized_and_a_second_start_is_refused():
    source = random_quantizer(11, 2, 8, 4)
    target = ResidualQuantizer(source.settings)
    target.load_state_dict(source.state_dict())
    z = random_latents(11, 20, 4)
    assert torch.equal(target.encode(z).codes, source.encode(z).codes)
    with pytest.raises(RuntimeError, match="already initialized"):
        target.initialize(z, torch.Generator())
    assert_same_state(target, state_of(source))
    partial = source.state_dict()
    del partial["initialized"]
    with pytest.raises(RuntimeError, match="initialized"):
        ResidualQuantizer(source.settings).load_state_dict(partial)
