"""Whether codes and predictions say something of the content: figures that a collapse cannot hide behind.

Usage, loss and accuracy look healthy while latents shrink to a line and predictions say no more than where a patch is.
Each figure here stands beside what a control scores that has seen nothing: the cold start's codes, or the position
alone. They are sums over clips, so that ranks add up to what one process finds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FOLDS = 4
"""Parts of the held-out clips, each judged by a fit on the others. A fit on half of 26 films favoured codes that vary
little: .61 for learned ones and .63 for the projection's, where fits on the 150 training films gave .95 and .80."""
RIDGE = 1.0
"""Added to the count of each code when a code's mean embedding is fitted."""
PSEUDO_CLIPS = 4.0
"""Clips' worth of the codebook's overall histogram in the guess at one position."""
TIE = 1e-9
"""Clips by which one code must lead to be the guess."""
Sum = Callable[[Tensor], Tensor]
"""Adds a tensor up over all ranks."""


def participation_ratio(covariance: Tensor) -> float:
    """(tr C)^2 / tr(C^2) of a covariance ``[d, d]``: about how many directions share the variance, from 1 to d."""
    return float(covariance.trace().square() / covariance.square().sum().clamp(min=torch.finfo(covariance.dtype).tiny))


class Spread:
    """Mean and covariance of vectors, one batch after another."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sums = torch.zeros(1 + width, 1 + width, dtype=torch.float64, device=device)

    def add(self, points: Tensor) -> None:
        """points: any float dtype ``[S, d]``."""
        points = functional.pad(points.double(), (1, 0), value=1.0)
        self.sums += points.T @ points

    def covariance(self, all_sum: Sum) -> Tensor:
        """float64 ``[d, d]`` over all ranks."""
        sums = all_sum(self.sums.clone())
        count, mean = sums[0, 0].clamp(min=1), sums[0, 1:] / sums[0, 0].clamp(min=1)
        return sums[1:, 1:] / count - torch.outer(mean, mean)


class CodeFit:
    """R^2 of embeddings on one-hot codes: how much of what the teacher knows a linear reader finds in the codes.

    Fitted on the clips of all folds but one and tested on that one, each in its turn, by normal equations: one pass,
    nothing kept.
    """

    def __init__(self, codebooks: int, size: int, width: int, device: torch.device) -> None:
        self.size, self.columns = size, 1 + codebooks * size
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.inner = torch.zeros(FOLDS, self.columns, self.columns, **options)
        self.cross = torch.zeros(FOLDS, self.columns, width, **options)
        self.squares = torch.zeros(FOLDS, **options)

    def add(self, codes: Tensor, embeddings: Tensor, fold: Tensor) -> None:
        """codes: int64 ``[S, M]``; embeddings: ``[S, D]``; fold: int64 ``[S]`` below `FOLDS`, the same for all of a
        clip."""
        shift = 1 + self.size * torch.arange(codes.shape[1], device=codes.device)
        design = torch.zeros(len(codes), self.columns, device=codes.device)
        design[:, 0] = 1.0
        design.scatter_(1, codes + shift, 1.0)
        for each in range(FOLDS):
            chosen, wanted = design[fold == each], embeddings[fold == each]
            self.inner[each] += chosen.T @ chosen
            self.cross[each] += chosen.T @ wanted.float()
            self.squares[each] += wanted.double().square().sum()

    def r2(self, all_sum: Sum) -> float | None:
        """Over all ranks; none where fewer than two folds have clips."""
        inner, cross, squares = (all_sum(part.clone()) for part in (self.inner, self.cross, self.squares))
        filled = [each for each in range(FOLDS) if inner[each, 0, 0] > 0]
        if len(filled) < 2:
            return None
        ridge = RIDGE * torch.eye(self.columns, dtype=inner.dtype, device=inner.device)
        ridge[0, 0] = 0.0
        errors, total = 0.0, 0.0
        for test in filled:
            others, known = inner.sum(0) - inner[test], cross.sum(0) - cross[test]
            weights = torch.linalg.solve(others + ridge, known)
            errors += float(
                squares[test] - 2 * (weights * cross[test]).sum() + (weights * (inner[test] @ weights)).sum()
            )
            mean = known[0] / others[0, 0]
            total += float(squares[test] - 2 * mean @ cross[test, 0] + inner[test, 0, 0] * mean.square().sum())
        return 1.0 - errors / total if total > 0 else None


class MeanAtPosition:
    """Cosine of embeddings to the mean embedding at their position, which knows nothing of the clip.

    The mean is of the clips of all folds but one, and the cosine that one's, each in its turn.
    """

    def __init__(self, positions: int, width: int, device: torch.device) -> None:
        self.sums = torch.zeros(FOLDS, 2, positions, width, dtype=torch.float64, device=device)
        self.counts = torch.zeros(FOLDS, dtype=torch.float64, device=device)

    def add(self, embeddings: Tensor, content: Tensor, fold: Tensor) -> None:
        """embeddings: ``[B, N, D]``; content: bool ``[B, N]``; fold: int64 ``[B]`` below `FOLDS`."""
        directions = functional.normalize(embeddings.double(), dim=-1)
        for each in range(FOLDS):
            weights = (content & (fold == each)[:, None]).unsqueeze(-1)
            self.sums[each, 0] += (embeddings.double() * weights).sum(0)
            self.sums[each, 1] += (directions * weights).sum(0)
            self.counts[each] += weights.sum()

    def cosine(self, all_sum: Sum) -> float | None:
        """Over all ranks; none where fewer than two folds have clips."""
        sums, counts = all_sum(self.sums.clone()), all_sum(self.counts.clone())
        if int((counts > 0).sum()) < 2:
            return None
        means = functional.normalize(sums[:, 0].sum(0) - sums[:, 0], dim=-1)
        return float((means * sums[:, 1]).sum() / counts.sum())


def position_accuracy(codes: Tensor, content: Tensor, size: int) -> list[float]:
    """Accuracy of who knows a code's position only and guesses the code that most other clips have there.

    codes: int64 ``[C, N, M]`` of C clips; content: bool ``[C, N]``; size: K. The clip at hand is left out of the count,
    to which `PSEUDO_CLIPS` of the codebook's overall histogram are added. One figure per codebook.
    """
    _, positions, codebooks = codes.shape
    accuracies = []
    for stage in range(codebooks):
        own = codes[..., stage]
        weights = content.double()
        counts = torch.zeros(positions, size, dtype=torch.float64, device=codes.device)
        counts.scatter_add_(1, own.T, weights.T)
        overall = counts.sum(0)
        scores = counts + PSEUDO_CLIPS * overall / overall.sum().clamp(min=1)
        best, second = scores.topk(2, dim=1)
        top = best.expand_as(best)
        mine = scores.gather(1, own.T).T - 1.0
        leader = second[:, 0] == own
        rival = torch.where(leader, top[:, 1], top[:, 0])
        hits = (mine > rival + TIE) & content
        accuracies.append(int(hits.sum()) / max(1, int(content.sum())))
    return accuracies


def verdict(row: Mapping[str, Any]) -> tuple[bool, str] | None:
    """Whether a phase did what it is for, by its last held-out row, and a sentence that says so.

    None where the figures are missing: too few held-out clips.
    """
    sentences = [found for found in (_predictions(row), _codes(row)) if found is not None]
    if not sentences:
        return None
    return all(good for good, _ in sentences), "; ".join(text for _, text in sentences)


def _predictions(row: Mapping[str, Any]) -> tuple[bool, str] | None:
    if "position_accuracy" not in row:
        return None
    found, control = (sum(row[key]) / len(row[key]) for key in ("accuracy", "position_accuracy"))
    good = found > control
    text = "are predicted better than" if good else "are NOT predicted better than"
    return good, f"codes of hidden patches {text} by their position alone: accuracy {found:.3f} against {control:.3f}"


def _codes(row: Mapping[str, Any]) -> tuple[bool, str] | None:
    if row.get("r2") is None or row.get("r2_cold_start") is None:
        return None
    # R² is of the teacher as it is, and rises when teacher and tokenizer collapse together; latents then narrow.
    telling = row["r2"] > row["r2_cold_start"]
    wide = row["participation_ratio"] > row["participation_ratio_cold_start"]
    told = "codes tell more than the projection's" if telling else "codes do NOT tell more than the projection's"
    spread = "latents spread wider than its" if wide else "latents do NOT spread wider than its, they collapse"
    return telling and wide, (
        f"{told}: R² {row['r2']:.3f} against {row['r2_cold_start']:.3f}; {spread}:"
        f" {row['participation_ratio']:.1f} directions against {row['participation_ratio_cold_start']:.1f}"
    )
