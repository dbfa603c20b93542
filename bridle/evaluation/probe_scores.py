"""Readers of frozen features (ridge, nearest neighbours), how files are split for them, and scores with intervals.

Everything is float64 on the CPU and a pure function of its arguments. n files, C classes, D numbers of a feature, B
rows of `draws`. Targets are bool ``[n, C]``; one label a file is the special case of one True a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bridle.errors import MistakeError

NEIGHBOURS = 5
"""The nearest training files that vote."""
PENALTIES = torch.logspace(-5, 4, 19, dtype=torch.float64)
"""Ridge penalties tried, in units of the features' mean squared singular value."""
RANK = 1e-7
"""Singular values below this part of the greatest count as none."""


def folds_of(groups: Sequence[str], targets: Tensor, folds: int, seed: int) -> Tensor:
    """The fold, int64 ``[n]``, of each file: a group's files share one, and each class is spread over all of them.

    Groups come in a random order, and each goes where its classes are rarest so far, then where files are fewest.

    Raises:
        ValueError: fewer groups than folds.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < folds:
        raise MistakeError(
            f"{len(names)} groups (files, without --group) for {folds} folds; ask for fewer with --folds"
        )
    sizes = np.bincount(member)
    classes = np.zeros((len(names), targets.shape[1]))
    np.add.at(classes, member, targets.numpy().astype(float))
    shares = classes / np.maximum(classes.sum(0), 1)
    held, filled = np.zeros((folds, targets.shape[1])), np.zeros(folds)
    chosen = np.zeros(len(names), dtype=np.int64)
    for group in np.random.default_rng(seed).permutation(len(names)):
        crowding = held[:, classes[group] > 0] @ shares[group, classes[group] > 0]
        fold = np.lexsort((filled, crowding))[0]
        chosen[group] = fold
        held[fold] += shares[group]
        filled[fold] += sizes[group]
    return torch.from_numpy(chosen[member])


def standardised(train: Tensor, test: Tensor, scaled: bool) -> tuple[Tensor, Tensor]:
    """Both without the mean of `train`'s columns and, if `scaled`, in units of their deviations; ``[n, D]``.

    A column that is constant in `train` becomes 0 in both.
    """
    mean, deviation = train.mean(0), train.std(0, correction=0)
    varied = deviation > 1e-9 * (1e-9 + mean.abs())
    factor = varied / deviation.where(varied, torch.ones_like(deviation)) if scaled else varied.double()
    return (train - mean) * factor, (test - mean) * factor


def linear_scores(train: Tensor, targets: Tensor, test: Tensor, balanced: bool) -> Tensor:
    """Ridge regression of -1 and 1, closed form, of test files ``[t, D]``: float64 ``[t, C]``, the greatest wins.

    The penalty is the one of `PENALTIES` with the least squared error on files left out one at a time, which has a
    closed form too. balanced: each class weighs the same, however many files it has (one label a file).
    """
    share = targets.double().sum(0)
    weight = (targets / share.clamp(min=1)).sum(1) if balanced else torch.ones(len(train), dtype=torch.float64)
    weight = weight / weight.sum()
    wanted = targets.double() * 2 - 1
    mean, offset = weight @ train, weight @ wanted
    root = weight.sqrt()[:, None]
    left, values, right = torch.linalg.svd(root * (train - mean), full_matrices=False)
    kept = values > RANK * values.max().clamp(min=torch.finfo(values.dtype).tiny)
    left, values, right = left[:, kept], values[kept], right[kept]
    if not len(values):
        return offset.expand(len(test), -1)
    residual = root * (wanted - offset)
    inner = left.T @ residual
    squares = values.square()
    errors = []
    for penalty in PENALTIES * squares.mean():
        shrunk = squares / (squares + penalty)
        leverage = (left.square() @ shrunk)[:, None] + root.square()
        missed = (residual - left @ (shrunk[:, None] * inner)) / (1 - leverage).clamp(min=1e-6)
        errors.append(missed.square().sum())
    penalty = PENALTIES[int(torch.stack(errors).argmin())] * squares.mean()
    slopes = right.T @ ((values / (squares + penalty))[:, None] * inner)
    return (test - mean) @ slopes + offset


def neighbour_scores(train: Tensor, targets: Tensor, test: Tensor) -> Tensor:
    """Votes of the `NEIGHBOURS` files of greatest cosine: float64 ``[t, C]``; equal votes go to the more similar."""
    unit = [torch.nn.functional.normalize(part, dim=1) for part in (train, test)]
    near = (unit[1] @ unit[0].T).topk(min(NEIGHBOURS, len(train)), dim=1)
    votes = 1 + 1e-3 * near.values
    return (votes[:, :, None] * targets[near.indices]).sum(1)


READERS = ("linear", "k-NN", "paper")
"""What reads the features: `linear_scores`, `neighbour_scores`, and the paper's linear probe (`linear_probe`)."""


def read(feature: Tensor, scaled: bool, targets: Tensor, splits: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Scores float64 ``[n, C]`` of the first two readers, for the files that a split tests; the others' are 0.

    feature: ``[n, D]``; splits: indices of files to learn from and to test.
    """
    balanced = bool((targets.sum(1) == 1).all())
    found = {reader: torch.zeros(targets.shape, dtype=torch.float64) for reader in READERS[:2]}
    for learn, test in splits:
        known, asked = standardised(feature[learn].double(), feature[test].double(), scaled)
        found["linear"][test] = linear_scores(known, targets[learn], asked, balanced)
        found["k-NN"][test] = neighbour_scores(known, targets[learn], asked)
    return found


def draws(groups: Sequence[str], count: int, seed: int) -> Tensor:
    """How often a sample has each file: float64 ``[1 + count, n]``, first all once, then bootstrap draws of groups."""
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=count)
    return torch.from_numpy(np.concatenate([np.ones((1, len(names))), drawn])[:, member])


def accuracy(scores: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Share of files whose greatest score is their class: float64 ``[B]``; weights: ``[B, n]`` of `draws`."""
    return weights @ _right(scores, targets) / weights.sum(1)


def top_accuracy(scores: Tensor, targets: Tensor, weights: Tensor, count: int) -> Tensor:
    """Share of files whose class is among the `count` greatest scores: float64 ``[B]``; weights: as `accuracy`'s."""
    near = scores.topk(min(count, scores.shape[1]), dim=1).indices
    right = targets.gather(1, near).any(1).double()
    return weights @ right / weights.sum(1)


def balanced_accuracy(scores: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean over the classes that occur of each one's accuracy: float64 ``[B]``."""
    classes = targets.double()
    present = weights @ classes
    hits = (weights * _right(scores, targets)) @ classes
    return (hits / present.clamp(min=1)).sum(1) / (present > 0).sum(1).clamp(min=1)


def mean_average_precision(scores: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean over the classes that occur of sum_k (R_k - R_{k-1}) P_k over their thresholds: float64 ``[B]``."""
    total = torch.zeros(len(weights), dtype=torch.float64)
    occurring = torch.zeros(len(weights), dtype=torch.float64)
    for column, positive in zip(scores.T, targets.T, strict=True):
        order = column.argsort(descending=True, stable=True)
        falling, drawn = -column[order], weights[:, order]
        last = torch.searchsorted(falling, falling, right=True) - 1  # equal scores are one threshold
        found = drawn * positive[order]
        precision = found.cumsum(1)[:, last] / drawn.cumsum(1)[:, last].clamp(min=1)
        positives = found.sum(1)
        total += (found * precision).sum(1) / positives.clamp(min=1)
        occurring += positives > 0
    return total / occurring.clamp(min=1)


def _right(scores: Tensor, targets: Tensor) -> Tensor:
    return targets[torch.arange(len(scores)), scores.argmax(1)].double()
