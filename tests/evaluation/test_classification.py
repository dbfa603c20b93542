"""Figures of classifiers agree with torchmetrics; intervals and differences are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import sample_files, write_classifier

from bridle.classifier import load_classifier
from bridle.cli import main
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
from bridle.evaluation.probe_scores import accuracy, balanced_accuracy, draws, mean_average_precision, top_accuracy


def scored(seed: int, files: int = 40, classes: int = 7, skill: float = 1.0) -> Scored:
    """Scores that know the class a little; the files and classes do not depend on the seed."""
    labels = torch.from_numpy(np.random.default_rng(99).integers(classes, size=files))
    targets = torch.nn.functional.one_hot(labels, classes).bool()
    noise = torch.randn(files, classes, generator=torch.Generator().manual_seed(seed))
    scores = (noise + skill * targets).softmax(1)
    return Scored([f"file {i}" for i in range(files)], [f"c{i}" for i in range(classes)], scores, targets, False)


@given(seed=st.integers(0, 10_000), files=st.integers(3, 60), classes=st.integers(6, 12))
def test_accuracies_are_torchmetrics(seed: int, files: int, classes: int) -> None:
    from torchmetrics.functional.classification import multiclass_accuracy  # two seconds that collecting can do without

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
    from torchmetrics.functional.classification import multilabel_average_precision

    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(files, classes, generator=generator, dtype=torch.float64)
    scores = (scores * 4).round() / 4 if tied else scores
    targets = torch.rand(files, classes, generator=generator) < 0.3
    targets[0] = True  # torchmetrics has no figure for a class that never occurs
    found = values(scores, targets, several=True)["mean_average_precision"]
    assert found == pytest.approx(float(multilabel_average_precision(scores, targets.long(), classes)), abs=1e-5)


@given(seed=st.integers(0, 10_000), files=st.integers(8, 40), classes=st.integers(6, 9))
def test_on_a_bootstrap_draw_metrics_are_torchmetrics_on_the_files_as_often_as_drawn(
    seed: int, files: int, classes: int
) -> None:
    from torchmetrics.functional.classification import multiclass_accuracy, multilabel_average_precision

    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(files, classes, generator=generator, dtype=torch.float64).softmax(1)
    labels = torch.randint(classes, (files,), generator=generator)
    targets = torch.nn.functional.one_hot(labels, classes).bool()
    drawn = draws([str(i) for i in range(files)], 3, seed)
    for row in range(1, 4):
        taken = torch.repeat_interleave(torch.arange(files), drawn[row].long())
        given = scores[taken], labels[taken], classes
        theirs = [
            multiclass_accuracy(*given, average="micro"),
            multiclass_accuracy(*given, average="none")[labels[taken].unique()].mean(),
            multiclass_accuracy(*given, average="micro", top_k=5),
        ]
        ours = [
            accuracy(scores, targets, drawn)[row], balanced_accuracy(scores, targets, drawn)[row],
            top_accuracy(scores, targets, drawn, 5)[row],
        ]  # fmt: skip
        assert [float(value) for value in ours] == pytest.approx([float(value) for value in theirs], abs=1e-6)
        several = torch.rand(files, classes, generator=generator) < 0.4
        several[taken[0]] = True  # torchmetrics has no figure for a class that never occurs
        wanted = multilabel_average_precision(scores[taken], several[taken].long(), classes)
        assert float(mean_average_precision(scores, several, drawn)[row]) == pytest.approx(float(wanted), abs=1e-5)


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


def test_a_film_is_told_by_its_clips_and_crops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_classifier(tmp_path / "films", "video")
    classifier = load_classifier(folder)
    data = max(sample_files("video", ("mp4", "webm", "avi"), 200), key=len)
    film = tmp_path / "film.mp4"
    film.write_bytes(data)
    found = {}
    for clips, crops in ((1, 1), (3, 1), (5, 3)):
        words = ["classify", str(folder), str(film), "--top", "7", "--clips", str(clips), "--crops", str(crops)]
        assert main(words) == 0
        classes = json.loads(capsys.readouterr().out)["classes"]
        found[clips, crops] = {each["class"]: each["probability"] for each in classes}
    for clips, crops in ((3, 1), (5, 3)):
        starts, places = np.linspace(0, 1, clips), [0] if crops == 1 else [-1, 0, 1]
        seen = torch.stack(
            [classifier.modality.view(data, start, place).values for start in starts for place in places]
        )
        assert len(seen.flatten(1).unique(dim=0)) > clips * crops // 2, "views differ"
        mean = classifier.probabilities(seen).mean(0)
        assert list(map(found[clips, crops].get, classifier.config.classes)) == pytest.approx(mean.tolist(), abs=1e-5)
    whole = classifier.classify(film).tolist()
    assert list(map(found[1, 1].get, classifier.config.classes)) == pytest.approx(whole, abs=1e-5)
    assert main(["classify", str(write_classifier(tmp_path / "sounds")), str(film), "--clips", "3"]) == 2
    assert "for films, and" in capsys.readouterr().err
