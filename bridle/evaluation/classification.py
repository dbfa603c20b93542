"""How well a classifier tells labels of files that it never saw, and whether better than another; with intervals.

n files, C classes. Scores are float ``[n, C]``, targets bool ``[n, C]``. A figure is its value, and the ends of its
95 % interval over bootstrap draws of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from bridle.errors import MistakeError
from bridle.evaluation.probe_scores import accuracy, balanced_accuracy, draws, mean_average_precision, top_accuracy
from bridle.files import whole_file
from bridle.modalities.clip import Clip, Modality
from bridle.settings import RecipeError

DRAWS = 1000
LEVEL = (0.025, 0.975)
"""Quantiles of an interval."""
TOP = 5
SCORES = "heldout_scores.npz"
"""Of a run folder: what the classifier made of each held-out file."""
Metric = Callable[[Tensor, Tensor, Tensor], Tensor]
Figure = tuple[float, float, float]


def metrics_of(classes: int, several: bool) -> dict[str, Metric]:
    """The metrics of a data set, the one of the claims first."""
    if several:
        return {"mean_average_precision": mean_average_precision}
    found: dict[str, Metric] = {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy}
    if classes > TOP:
        found["top_5_accuracy"] = lambda scores, targets, weights: top_accuracy(scores, targets, weights, TOP)
    return found


def values(scores: Tensor, targets: Tensor, several: bool) -> dict[str, float]:
    """Every metric, without intervals."""
    once = torch.ones(1, len(scores), dtype=torch.float64)
    metrics = metrics_of(scores.shape[1], several)
    return {name: float(metric(scores.double(), targets, once)[0]) for name, metric in metrics.items()}


def figures(scores: Tensor, targets: Tensor, several: bool, seed: int = 0) -> dict[str, Figure]:
    """Every metric's figure."""
    weights = draws([str(i) for i in range(len(scores))], DRAWS, seed)
    return {
        name: figure(metric(scores.double(), targets, weights))
        for name, metric in metrics_of(scores.shape[1], several).items()
    }


def figure(drawn: Tensor) -> Figure:
    """drawn: float64 ``[1 + B]``, the first of all files."""
    low, high = np.quantile(drawn[1:].numpy(), LEVEL)
    return float(drawn[0]), float(low), float(high)


@dataclass(frozen=True)
class Scored:
    """What a classifier made of held-out files. files: their names, in the order of the rows."""

    files: list[str]
    classes: list[str]
    scores: Tensor
    targets: Tensor
    several: bool


def write_scores(run: Path, scored: Scored) -> None:
    """Keeps them in a run folder as an NPZ, whole or not at all."""
    with whole_file(run / SCORES) as aside, aside.open("wb") as stream:
        np.savez_compressed(
            stream, files=np.array(scored.files), classes=np.array(scored.classes), scores=scored.scores.numpy(),
            targets=scored.targets.numpy(), several=np.array(scored.several),
        )  # fmt: skip


def read_scores(run: Path) -> Scored:
    """What a run folder keeps of its held-out files, or the folders of folds below it together.

    Raises:
        RecipeError: nothing of that kind. ValueError: it is damaged.
    """
    path, folds = run / SCORES, sorted(run.glob(f"fold-*/{SCORES}"))
    if not path.is_file() and folds:
        return joined([read_scores(fold.parent) for fold in folds])
    if not path.is_file():
        raise RecipeError(f"{path}: not there; give run folders of fine-tuning that had held-out files and are done")
    try:
        with np.load(path, allow_pickle=False) as found:
            return Scored(
                found["files"].tolist(), found["classes"].tolist(), torch.from_numpy(found["scores"]),
                torch.from_numpy(found["targets"]), bool(found["several"]),
            )  # fmt: skip
    except (KeyError, OSError, BadZipFile) as error:
        raise MistakeError(f"{path}: damaged ({error}); start that run again, which writes it anew") from None


def joined(parts: Sequence[Scored]) -> Scored:
    """Files of several folds as one.

    Raises:
        ValueError: the folds' classes are not the same.
    """
    first = parts[0]
    if any(part.classes != first.classes for part in parts):
        raise MistakeError("the folds were trained on other classes; some have too few files to be in every fold")
    return Scored(
        [file for part in parts for file in part.files], first.classes, torch.cat([part.scores for part in parts]),
        torch.cat([part.targets for part in parts]), any(part.several for part in parts),
    )  # fmt: skip


def difference(ours: Sequence[Scored], theirs: Sequence[Scored], seed: int = 0) -> dict[str, dict[str, Figure]]:
    """Every metric of two kinds of runs, each of one or several seeds, and what the first is above the second.

    Draws are the same for both, so that the interval is of pairs; each draw takes one of the seeds of either, so that
    luck with a seed is in it.

    Raises:
        ValueError: they were not scored on the same files and classes.
    """
    first = ours[0]
    for run in (*ours[1:], *theirs):
        alike = run.files == first.files and run.classes == first.classes
        if not alike or not torch.equal(run.targets, first.targets):
            raise MistakeError("these runs were scored on other files or classes, so that nothing can be paired")
    weights = draws(first.files, DRAWS, seed)
    found = {}
    for name, metric in metrics_of(len(first.classes), first.several).items():
        own, control = (
            over_seeds([metric(run.scores.double(), run.targets, weights) for run in runs], seed + number)
            for number, runs in enumerate((ours, theirs))
        )
        found[name] = {"ours": figure(own), "theirs": figure(control), "difference": figure(own - control)}
    return found


def over_seeds(drawn: Sequence[Tensor], seed: int) -> Tensor:
    """float64 ``[1 + B]`` of each seed to ``[1 + B]``: their mean over all files, and one seed's in each draw."""
    stacked = torch.stack(tuple(drawn))
    seeds, count = stacked.shape
    picked = torch.from_numpy(np.random.default_rng([seed, seeds]).integers(seeds, size=count - 1))
    return torch.cat([stacked[:, :1].mean(0), stacked[picked, torch.arange(1, count)]])


def spelled(found: Figure) -> str:
    """A figure and its interval."""
    return f"{found[0]:.3f} [{found[1]:.3f}, {found[2]:.3f}]"


def views(modality: Modality, data: bytes, clips: int, crops: int) -> Iterator[Clip]:
    """The clips of a file whose probabilities are averaged: of a film so many evenly spaced ones, each cropped at the
    centre or at both ends of its longer side too; of anything else, or where one of each is asked for, all windows.

    Raises:
        ClipError
    """
    if clips * crops > 1 and hasattr(modality, "view"):
        for clip in range(clips):
            for crop in range(crops):
                yield modality.view(data, clip / max(1, clips - 1), crop - 1 if crops > 1 else 0)
    else:
        yield from modality.windows(data)


def plain(found: dict[str, Figure]) -> dict[str, Any]:
    """Figures as plain data."""
    return {name: {"value": value, "interval": [low, high]} for name, (value, low, high) in found.items()}
