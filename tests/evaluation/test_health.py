"""Health figures: what each says of codes that are known to be good or bad, and that ranks add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridle.evaluation.health import (
    FOLDS,
    CodeFit,
    MeanAtPosition,
    Spread,
    participation_ratio,
    position_accuracy,
    verdict,
)

CPU = torch.device("cpu")


def alone(values: torch.Tensor) -> torch.Tensor:
    return values


def test_participation_ratio_counts_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    for directions in (1, 3, 8):
        points = (
            torch.randn(4000, directions, generator=generator) @ torch.linalg.qr(torch.randn(16, 16))[0][:directions]
        )
        spread = Spread(16, CPU)
        for part in points.split(700):
            spread.add(part + 5.0)
        found = spread.covariance(alone)
        np.testing.assert_allclose(found, np.cov(points.double().numpy().T, bias=True), atol=1e-5)
        assert participation_ratio(found) == pytest.approx(directions, rel=0.02)


def test_r2_is_that_of_a_ridge_regression_fitted_on_the_other_folds() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 5, (600, 2), generator=generator)
    means = torch.randn(2, 5, 7, generator=generator)
    embeddings = means[0, codes[:, 0]] + means[1, codes[:, 1]] + torch.randn(600, 7, generator=generator) + 3.0
    fold = torch.arange(600) % FOLDS
    fit = CodeFit(2, 5, 7, CPU)
    for part in torch.arange(600).split(130):
        fit.add(codes[part], embeddings[part], fold[part])
    design = torch.nn.functional.one_hot(codes, 5).flatten(1).double().numpy()
    y, errors, total = embeddings.double().numpy(), 0.0, 0.0
    for each in range(FOLDS):
        train, test = (fold != each).numpy(), (fold == each).numpy()
        centred, mean = design[train] - design[train].mean(0), y[train].mean(0)
        penalised = np.concatenate([centred, np.eye(10)])  # ridge of 1 as ten more rows
        weights = np.linalg.lstsq(penalised, np.concatenate([y[train] - mean, np.zeros((10, 7))]), rcond=None)[0]
        found = (design[test] - design[train].mean(0)) @ weights + mean
        errors += ((y[test] - found) ** 2).sum()
        total += ((y[test] - y[train].mean(0)) ** 2).sum()
    assert fit.r2(alone) == pytest.approx(1 - errors / total, abs=1e-4)


def test_r2_of_codes_that_say_nothing_is_none() -> None:
    generator = torch.Generator().manual_seed(2)
    embeddings, fold = torch.randn(2000, 4, generator=generator), torch.arange(2000) % FOLDS
    said, silent = CodeFit(1, 8, 4, CPU), CodeFit(1, 8, 4, CPU)
    said.add((embeddings[:, :1] > 0).long(), embeddings, fold)
    silent.add(torch.randint(0, 8, (2000, 1), generator=generator), embeddings, fold)
    assert said.r2(alone) > 0.1
    assert abs(silent.r2(alone)) < 0.02
    one_fold = CodeFit(1, 8, 4, CPU)
    one_fold.add(torch.zeros(5, 1, dtype=torch.int64), embeddings[:5], torch.zeros(5, dtype=torch.int64))
    assert one_fold.r2(alone) is None


def test_two_folds_of_clips_are_enough_and_empty_ones_change_nothing() -> None:
    generator = torch.Generator().manual_seed(5)
    codes, embeddings = torch.randint(0, 8, (200, 1), generator=generator), torch.randn(200, 4, generator=generator)
    content = torch.ones(200, 1, dtype=torch.bool)
    found = []
    for fold in (torch.arange(200) % 2, 1 + 2 * (torch.arange(200) % 2)):
        fit, mean = CodeFit(1, 8, 4, CPU), MeanAtPosition(1, 4, CPU)
        fit.add(codes, embeddings, fold)
        mean.add(embeddings[:, None], content, fold)
        found.append((fit.r2(alone), mean.cosine(alone)))
    assert None not in found[0]
    assert found[0] == pytest.approx(found[1])


def test_ranks_add_up_to_what_one_process_finds() -> None:
    generator = torch.Generator().manual_seed(3)
    codes, embeddings = torch.randint(0, 4, (40, 6, 2), generator=generator), torch.randn(40, 6, 5, generator=generator)
    content = torch.rand(40, 6, generator=generator) < 0.8
    fold = torch.arange(40) % FOLDS

    def built(clips: torch.Tensor) -> tuple[Spread, CodeFit, MeanAtPosition]:
        spread, fit, mean = Spread(5, CPU), CodeFit(2, 4, 5, CPU), MeanAtPosition(6, 5, CPU)
        kept = content[clips]
        spread.add(embeddings[clips][kept])
        fit.add(codes[clips][kept], embeddings[clips][kept], fold[clips][:, None].expand_as(kept)[kept])
        mean.add(embeddings[clips], kept, fold[clips])
        return spread, fit, mean

    everything, first, second = built(torch.arange(40)), built(torch.arange(0, 13)), built(torch.arange(13, 40))

    def with_second(parts: list[torch.Tensor]):
        rest = iter(parts)
        return lambda values: values + next(rest)

    spread, fit, mean = everything
    torch.testing.assert_close(first[0].covariance(with_second([second[0].sums])), spread.covariance(alone))
    summed = with_second([second[1].inner, second[1].cross, second[1].squares])
    assert first[1].r2(summed) == pytest.approx(fit.r2(alone))
    assert first[2].cosine(with_second([second[2].sums, second[2].counts])) == pytest.approx(mean.cosine(alone))


def test_the_mean_at_a_position_is_found_where_embeddings_are_all_position() -> None:
    generator = torch.Generator().manual_seed(4)
    places = torch.randn(9, 32, generator=generator)
    content, fold = torch.ones(50, 9, dtype=torch.bool), torch.arange(50) % FOLDS
    for noise, low, high in ((0.0, 0.999, 1.001), (100.0, -0.1, 0.1)):
        mean = MeanAtPosition(9, 32, CPU)
        mean.add(places + noise * torch.randn(50, 9, 32, generator=generator), content, fold)
        assert low < mean.cosine(alone) < high


@given(st.integers(2, 12), st.integers(1, 5), st.integers(2, 6), st.integers(0, 999))
def test_position_accuracy_is_that_of_leaving_each_clip_out(clips: int, positions: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes, content = rng.integers(0, size, (clips, positions, 2)), rng.random((clips, positions)) < 0.8
    content[0, 0] = True
    found = position_accuracy(torch.from_numpy(codes), torch.from_numpy(content), size)
    for stage in range(2):
        overall = np.bincount(codes[..., stage][content], minlength=size)
        hits = 0
        for clip, place in zip(*np.nonzero(content), strict=True):
            others = content[:, place].copy()
            others[clip] = False
            scores = np.bincount(codes[others, place, stage], minlength=size) + 4.0 * overall / overall.sum()
            own = codes[clip, place, stage]
            hits += scores[own] > np.delete(scores, own).max() + 1e-9
        assert found[stage] == pytest.approx(hits / content.sum())


def test_a_verdict_names_both_sides_and_says_no_when_the_control_wins() -> None:
    cold = {"r2_cold_start": 0.7, "participation_ratio_cold_start": 2.1}
    good, text = verdict({"r2": 0.85, "participation_ratio": 8.3, **cold})
    assert good and "R² 0.850 against 0.700" in text and "8.3 directions against 2.1" in text and "NOT" not in text
    bad, text = verdict({"r2": 0.57, "participation_ratio": 8.3, **cold})
    assert not bad and "codes do NOT" in text
    bad, text = verdict({"r2": 0.92, "participation_ratio": 1.4, **cold})  # teacher and tokenizer collapsed together
    assert not bad and "latents do NOT" in text
    bad, text = verdict({"accuracy": [0.3, 0.1], "position_accuracy": [0.35, 0.1]})
    assert not bad and "0.200 against 0.225" in text
    assert verdict({"loss": 1.0}) is None
