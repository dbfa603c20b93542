"""`bridle probe`: its readers and scores against plain references, its splits, and the whole way through the door."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_inputs import write_pitches, write_random_model, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from bridle.cli import main
from bridle.evaluation.linear_probe import ProbeSettings
from bridle.evaluation.probe import Labelled, figures, make_task, verdicts
from bridle.evaluation.probe_features import Comparison, Feature
from bridle.evaluation.probe_scores import (
    PENALTIES,
    accuracy,
    balanced_accuracy,
    draws,
    folds_of,
    linear_scores,
    mean_average_precision,
    neighbour_scores,
)


def _one_hot(labels: np.ndarray, classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.from_numpy(labels), classes).bool()


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(2, 30))
@settings(max_examples=40, deadline=None)
def test_metrics_equal_their_definitions_on_the_files_written_out_as_often_as_drawn(
    seed: int, classes: int, count: int
) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    scores = rng.integers(0, 6, size=(count, classes)) + 0.1 * np.arange(classes)  # ties within a class, none in a row
    weights = rng.integers(0, 3, size=count)
    weights[0] = 1
    drawn = np.repeat(np.arange(count), weights)
    hit = scores[drawn].argmax(1) == labels[drawn]
    per_class = [hit[labels[drawn] == c].mean() for c in range(classes) if (labels[drawn] == c).any()]
    precisions = []
    for c in range(classes):
        positive, column = labels[drawn] == c, scores[drawn, c]
        if positive.any():
            recall, area = 0.0, 0.0
            for threshold in sorted(set(column), reverse=True):
                chosen = column >= threshold
                area += ((positive & chosen).sum() / positive.sum() - recall) * (positive & chosen).sum() / chosen.sum()
                recall = (positive & chosen).sum() / positive.sum()
            precisions.append(area)
    arguments = (torch.from_numpy(scores), _one_hot(labels, classes), torch.from_numpy(weights[None].astype(float)))
    assert accuracy(*arguments).item() == pytest.approx(hit.mean())
    assert balanced_accuracy(*arguments).item() == pytest.approx(np.mean(per_class))
    assert mean_average_precision(*arguments).item() == pytest.approx(np.mean(precisions))


@pytest.mark.parametrize("columns", [4, 30], ids=["fewer columns than files", "more"])
def test_the_linear_reader_is_the_ridge_whose_penalty_wins_when_files_are_left_out_and_fitted_again(
    columns: int,
) -> None:
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat([0, 1, 2], [4, 7, 9]))
    x = rng.normal(size=(20, columns)) + labels[:, None] * rng.normal(size=columns)
    asked, targets = rng.normal(size=(5, columns)), np.eye(3)[labels] * 2 - 1
    weight = 1 / np.bincount(labels)[labels]
    weight /= weight.sum()

    def fitted(rows: np.ndarray, penalty: float, at: np.ndarray) -> np.ndarray:
        w = weight[rows]
        mean, offset = w @ x[rows] / w.sum(), w @ targets[rows] / w.sum()
        centred = x[rows] - mean
        inner = centred.T @ (w[:, None] * centred) + penalty * np.eye(columns)
        return (at - mean) @ np.linalg.solve(inner, centred.T @ (w[:, None] * (targets[rows] - offset))) + offset

    centred = np.sqrt(weight)[:, None] * (x - weight @ x)
    values = np.linalg.svd(centred, compute_uv=False)
    unit = (values[values > 1e-7 * values.max()] ** 2).mean()
    errors = []
    for penalty in PENALTIES.numpy() * unit:
        left = [np.delete(np.arange(20), i) for i in range(20)]
        errors.append(sum(weight[i] * ((targets[i] - fitted(left[i], penalty, x[i])) ** 2).sum() for i in range(20)))
    best = PENALTIES.numpy()[int(np.argmin(errors))] * unit
    found = linear_scores(torch.from_numpy(x), _one_hot(labels, 3), torch.from_numpy(asked), balanced=True)
    np.testing.assert_allclose(found.numpy(), fitted(np.arange(20), best, asked), rtol=1e-6, atol=1e-8)


def test_neighbours_vote_and_the_more_similar_wins_a_tie() -> None:
    train = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, -1.0]]).double()
    targets = _one_hot(np.array([0, 0, 1, 1, 2]), 3)
    scores = neighbour_scores(train, targets, torch.tensor([[1.0, 0.2], [0.2, 1.0]]).double())
    assert scores.argmax(1).tolist() == [0, 1]


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3)), min_size=1, max_size=60), st.integers(0, 99))
@settings(deadline=None)
def test_a_group_never_straddles_folds(files: list[tuple[int, int]], seed: int) -> None:
    groups = [f"group {group}" for group, _ in files] + [f"group {group}" for group in range(3)]
    labels = np.array([label for _, label in files] + [0, 1, 2])
    fold = folds_of(groups, _one_hot(labels, 4), 3, seed).tolist()
    owners = {group: {fold[i] for i, name in enumerate(groups) if name == group} for group in groups}
    assert all(len(folds) == 1 for folds in owners.values())
    assert set(fold) <= {0, 1, 2}


@given(st.lists(st.integers(2, 9), min_size=2, max_size=5), st.integers(2, 5), st.integers(0, 99))
@settings(deadline=None)
def test_without_groups_each_class_is_spread_evenly_over_the_folds(sizes: list[int], folds: int, seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    if len(labels) < folds:
        return
    fold = folds_of([str(i) for i in range(len(labels))], _one_hot(labels, len(sizes)), folds, seed).numpy()
    for c in range(len(sizes)):
        held = np.bincount(fold[labels == c], minlength=folds)
        assert held.max() - held.min() <= 1


def test_draws_take_or_leave_a_group_as_a_whole() -> None:
    drawn = draws(["a", "b", "a", "c", "b"], 50, seed=0)
    assert drawn.shape == (51, 5) and (drawn[0] == 1).all()
    assert torch.equal(drawn[:, 0], drawn[:, 2]) and torch.equal(drawn[:, 1], drawn[:, 4])
    assert (drawn[1:, [0, 1, 3]].sum(1) == 3).all()


SOME = ProbeSettings(4e-2, 50, 256)


def _planted(shuffled: bool) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 30)
    signal = np.eye(4)[labels] @ rng.normal(size=(4, 16)) + rng.normal(size=(120, 16))
    noise = rng.normal(size=(120, 16))
    named = rng.permutation(labels) if shuffled else labels
    files = [Labelled(i, (str(label),), str(i)) for i, label in enumerate(named)]
    features = [Feature("signal", [torch.from_numpy(signal)]), Feature("noise", [torch.from_numpy(noise)] * 2)]
    found = figures(features, [Comparison("signal", "noise", ("linear",))], make_task(files, None, 5, 0), 0, SOME)
    assert found["chance"] == 0.25 and len(found["scores"]) == 6
    return {f"{row['reader']} of {row['feature']}": row["balanced_accuracy"] for row in found["scores"]} | {
        "word": found["comparisons"][0]["word"], "verdict": verdicts(found)[0]
    }  # fmt: skip


def test_planted_features_are_found_and_told_apart_from_noise() -> None:
    found = _planted(shuffled=False)
    for reader in ("linear", "k-NN", "paper"):
        assert found[f"{reader} of signal"]["interval"][0] > 0.5  # type: ignore[operator]
        low, high = found[f"{reader} of noise"]["interval"]  # type: ignore[misc]
        assert low < 0.25 < high
    assert found["word"] == "above"
    assert str(found["verdict"]).startswith("signal above noise: balanced accuracy 0.")


def test_with_shuffled_labels_the_interval_contains_chance_and_nothing_is_claimed() -> None:
    found = _planted(shuffled=True)
    for reader in ("linear", "k-NN", "paper"):
        low, high = found[f"{reader} of signal"]["interval"]  # type: ignore[misc]
        assert low < 0.25 < high
    assert found["word"] == "not told apart from"


def test_a_model_that_is_one_lucky_draw_of_random_weights_is_not_said_to_be_above_them() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 50)
    files = [Labelled(i, (str(label),), str(i)) for i, label in enumerate(labels)]
    centres = np.eye(4)[labels] @ rng.normal(size=(4, 8))
    made = [torch.from_numpy(k * centres + rng.normal(size=(200, 8))) for k in (0.2, 0.3, 0.4, 0.6, 0.7)]
    features = [Feature("one", made[3:4]), Feature("all", made), Feature("worst", made[:1])]
    compared = [Comparison("one", "all"), Comparison("one", "worst")]
    rows = figures(features, compared, make_task(files, None, 5, 0), 0, None)["comparisons"]
    words = {row["control"]: row["word"] for row in rows if row["reader"] == "linear"}
    assert words == {"all": "not told apart from", "worst": "above"}


@pytest.fixture(scope="module")
def two_pitches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pitches(tmp_path_factory.mktemp("pitches") / "pitches.tar")


def _probed(folder: Path, *arguments: str) -> dict:
    assert main(["probe", *arguments, "--out", str(folder)]) == 0
    return json.loads((folder / "probe.json").read_text())


def test_pitches_are_told_from_codes_and_a_group_stays_together(
    model_folder: Path, two_pitches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(model_folder), str(two_pitches), "--labels", "cls", "--group", "json.room", "--folds", "2"]
    found = _probed(tmp_path / "first", *given, "--workers", "0")
    told = capsys.readouterr()
    assert found["classes"] == {"high": 6, "low": 6} and found["groups"] == 4
    assert found["unlabelled"] == 1 and len(found["skipped"]) == 1
    assert "skipped" in told.err and "key 51" in told.err
    scores = {(row["feature"], row["reader"]): row["balanced_accuracy"]["value"] for row in found["scores"]}
    assert scores["log-mel statistics", "linear"] == 1.0
    assert scores["codes (depth 4)", "linear"] >= 0.9
    names = {name for name, _ in scores}
    assert {f"codes (depth {m})" for m in range(1, 5)} < names
    assert {f"cold start codes (depth {m})" for m in range(1, 5)} < names
    for line in verdicts(found):
        assert line in told.out
    page = (tmp_path / "first" / "probe.html").read_text()
    assert all(name in page for name in names) and "http" not in page.replace("http-equiv", "")
    assert scores["encoder (regions)", "paper"] >= 0.9 and found["paper"] == {"lr": 0.04, "epochs": 400, "batch": 256}
    assert "encoder (mean) not told apart from random weights (mean), by the paper's probe: balanced" in told.out
    again = _probed(tmp_path / "again", *given, "--workers", "2")
    assert again == found


def test_the_sample_is_probed_with_other_shards_to_test_on(
    model_folder: Path, two_pitches: Path, tmp_path: Path
) -> None:
    folds = ["--labels", "json", "--folds", "3", "--fast"]
    found = _probed(tmp_path, str(model_folder), "builtin:audio-heldout", *folds)
    assert found["tested"] == found["files"] and found["folds"] == 3 and len(found["classes"]) >= 2
    copy = tmp_path / "copy.tar"
    copy.write_bytes(two_pitches.read_bytes())
    test = _probed(tmp_path, str(model_folder), str(two_pitches), "--labels", "cls", "--test", str(copy))
    assert test["files"] == 24 and test["tested"] == 12 and test["folds"] is None
    best = [row["accuracy"]["value"] for row in test["scores"] if row["feature"] == "log-mel statistics"]
    assert best == [1.0, 1.0, 1.0]


def test_several_labels_a_file_are_scored_by_average_precision(
    model_folder: Path, two_pitches: Path, tmp_path: Path
) -> None:
    found = _probed(tmp_path, str(model_folder), str(two_pitches), "--labels", "json.tags", "--folds", "2")
    assert found["metric"] == "mean_average_precision" and found["classes"] == {"0": 6, "1": 6, "all": 12}
    assert found["chance"] == pytest.approx(2 / 3)
    scores = {(row["feature"], row["reader"]): row["mean_average_precision"]["value"] for row in found["scores"]}
    assert scores["log-mel statistics", "linear"] == pytest.approx(1.0)


def test_pictures_are_probed_beside_pixel_statistics(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "image", modality="image", clip={"size": [32, 32]},
                               data={"shards": ["builtin:image"], "workers": 0})  # fmt: skip
    found = _probed(tmp_path / "out", str(model), "builtin:image-heldout", "--labels", "json", "--folds", "2", "--fast")
    widths = {row["feature"]: row["columns"] for row in found["scores"]}
    assert widths["pixel statistics"] == 3 + 3 + 3 * 4 * 4
    assert widths["encoder (mean+std)"] == 2 * widths["random weights (mean)"]
    assert widths["encoder (regions)"] == 2 * 2 * widths["random weights (mean)"]
    assert {row["reader"] for row in found["scores"]} == {"linear", "k-NN"} and found["paper"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--labels", "txt"], "none of 14 files has a label there; their members are: wav (14)"),
        (["--labels", "json.tag"], "none of 14 files has a label"),
        (["--labels", "wav"], "'wav' is what the model reads"),
        (["--labels", "cls.x"], "give an extension such as cls, or json.FIELD"),
        (["--labels", "cls", "--group", "json.tags"], "key 51: has labels but no group 'json.tags'"),
        (["--labels", "cls", "--group", "json.room", "--folds", "9"], "--folds 9: 5 groups"),
        (["--labels", "cls", "--test", "SAME"], "is among the shards to learn from as well"),
    ],
)
def test_a_wrong_argument_is_one_clear_line(
    model_folder: Path, two_pitches: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(two_pitches) if word == "SAME" else word for word in arguments]
    assert main(["probe", str(model_folder), str(two_pitches), *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_too_few_classes_and_a_missing_model_are_said(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_tar(tmp_path / "one.tar", {"a.wav": b"x", "a.cls": b"bell", "b.wav": b"x", "b.cls": b"drum"})
    assert main(["probe", str(model_folder), str(shard), "--labels", "cls"]) == 2
    assert "found bell (1), drum (1); a probe needs two classes or more, each in 2" in capsys.readouterr().err
    files = {f"{i}.{kind}": (b"bell", b"drum")[i % 2] for i in range(6) for kind in ("wav", "cls")}
    shard = write_tar(tmp_path / "two.tar", files)
    assert main(["probe", str(model_folder), str(shard), "--labels", "cls"]) == 1
    assert "none of the first 6 files could be decoded as audio" in capsys.readouterr().err
    assert main(["probe", str(tmp_path / "gone"), str(shard), "--labels", "cls"]) == 1
    assert "no config.json there" in capsys.readouterr().err
