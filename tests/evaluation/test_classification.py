"""Figures of classifiers agree with torchmetrics; intervals and differences are what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_accuracy, multilabel_average_precision

from bridle.evaluation.classification import (
    SCORES,
    Scored,
    difference,
    figures,
    joined,
    read_scores,
    values,
    write_scores,
)


def scored(seed: int, files: int = 40, classes: int = 7, skill: float = 1.0) -> Scored:
    """Scores that know the class a little; the files and classes do not depend on the seed."""
    labels = torch.from_numpy(np.random.default_rng(99).integers(classes, size=files))
    targets = torch.nn.functional.one_hot(labels, classes).bool()
    noise = torch.randn(files, classes, generator=torch.Generator().manual_seed(seed))
    scores = (noise + skill * targets).softmax(1)
    return Scored([f"file {i}" for i in range(files)], [f"c{i}" for i in range(classes)], scores, targets, False)


@given(seed=st.integers(0, 10_000), files=st.integers(3, 60), classes=st.integers(6, 12))
def test_accuracies_are_torchmetrics(seed: int, files: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(files, classes, generator=generator).softmax(1)
    labels = torch.randint(classes, (files,), generator=generator)
    found = values(scores, torch.nn.functional.one_hot(labels, classes).bool(), several=False)
    theirs = {
        "accuracy": multiclass_accuracy(scores, labels, classes, average="micro"),
        "balanced_accuracy": multiclass_accuracy(scores, labels, classes, average="none")[labels.unique()].mean(),
        "top_5_accuracy": multiclass_accuracy(scores, labels, classes, average="micro", top_k=5),
    }
    assert found == pytest.approx({name: float(value) for name, value in theirs.items()}, abs=1e-6)


@given(seed=st.integers(0, 10_000), files=st.integers(5, 60), classes=st.integers(2, 8), tied=st.booleans())
def test_mean_average_precision_is_torchmetrics(seed: int, files: int, classes: int, tied: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(files, classes, generator=generator, dtype=torch.float64)
    scores = (scores * 4).round() / 4 if tied else scores
    targets = torch.rand(files, classes, generator=generator) < 0.3
    targets[0] = True  # torchmetrics has no figure for a class that never occurs
    found = values(scores, targets, several=True)["mean_average_precision"]
    assert found == pytest.approx(float(multilabel_average_precision(scores, targets.long(), classes)), abs=1e-5)


def test_an_interval_holds_the_figure_and_narrows_with_more_files() -> None:
    few, many = (figures(one.scores, one.targets, False)["accuracy"] for one in (scored(0), scored(0, files=1600)))
    assert few[1] < few[0] < few[2] and many[1] < many[0] < many[2]
    width = np.sqrt(many[0] * (1 - many[0]) / 1600) * 2 * 1.96
    assert many[2] - many[1] == pytest.approx(width, rel=0.15)


def test_a_difference_is_of_pairs_and_holds_the_luck_of_seeds() -> None:
    better, worse = [scored(seed, 200, skill=2.0) for seed in range(3)], [scored(seed, 200) for seed in range(3, 6)]
    found = difference(better, worse)["accuracy"]
    assert found["difference"][1] > 0
    assert found["difference"][0] == pytest.approx(found["ours"][0] - found["theirs"][0])
    same = difference(better, better)["accuracy"]["difference"]
    assert same[0] == 0 and same[1] < 0 < same[2]  # not zero wide: each side draws a seed of its own
    alone = difference(better[:1], better[:1])["accuracy"]["difference"]
    assert alone == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="other files or classes"):
        difference(better, [scored(0, 199)])


def test_scores_come_back_as_they_were_kept(tmp_path: Path) -> None:
    one = scored(0)
    write_scores(tmp_path, one)
    again = read_scores(tmp_path)
    assert (again.files, again.classes, again.several) == (one.files, one.classes, False)
    assert torch.equal(again.scores, one.scores) and torch.equal(again.targets, one.targets)
    both = joined([one, again])
    assert len(both.files) == 80 and both.scores.shape == (80, 7)
    (tmp_path / SCORES).write_bytes((tmp_path / SCORES).read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"):
        read_scores(tmp_path)
