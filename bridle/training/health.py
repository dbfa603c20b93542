"""The figures of `bridle.evaluation.health` over a phase's held-out clips, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bridle.evaluation.health import FOLDS, CodeFit, MeanAtPosition, Spread, participation_ratio, position_accuracy
from bridle.modeling.lookup import full_float32
from bridle.modeling.patches import content_mask
from bridle.modeling.tokenizer import Tokenizer
from bridle.training.ranks import Ranks

Figures = dict[str, Any]


class Predictions:
    """What an encoder phase predicts, beside who guesses by position alone."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.codes: list[Tensor] = []
        self.content: list[Tensor] = []

    def add(self, codes: Tensor, valid: Tensor | None) -> None:
        """codes: int64 ``[b, N, M]``, those of the whole clips; valid: int64 ``[b]``, positions of content."""
        self.codes.append(codes)
        self.content.append(_content(codes, valid))

    def figures(self, ranks: Ranks) -> Figures:
        """`position_accuracy`, per codebook."""
        codes, content = ranks.gather(torch.cat(self.codes)), ranks.gather(torch.cat(self.content).to(torch.uint8))
        return {"position_accuracy": position_accuracy(codes, content.bool(), self.size)}


class Codes:
    """What a tokenizer phase's codes tell of the teacher, beside the cold start's, and how its latents spread."""

    def __init__(self, control: Tokenizer, target: nn.Module, codebooks: int, size: int, bf16: bool) -> None:
        self.control, self.target, self.bf16 = control, target, bf16
        self.codebooks, self.size = codebooks, size
        self.found: tuple[Spread, Spread, CodeFit, CodeFit, MeanAtPosition] | None = None

    def add(
        self, values: Tensor, embeddings: Tensor, valid: Tensor | None, latents: Tensor, codes: Tensor, fold: Tensor
    ) -> None:
        """One batch; codes: int64 ``[b, N, M]``; fold: int64 ``[b]``, see `folds`."""
        content = _content(codes, valid)
        if self.found is None:
            device, width, positions = values.device, embeddings.shape[-1], embeddings.shape[1]
            self.found = (
                Spread(latents.shape[-1], device),
                Spread(latents.shape[-1], device),
                CodeFit(self.codebooks, self.size, width, device),
                CodeFit(self.codebooks, self.size, width, device),
                MeanAtPosition(positions, width, device),
            )
        spread, cold_spread, learned, cold, mean = self.found
        with torch.autocast(values.device.type, torch.bfloat16, enabled=self.bf16):
            control = self.control.quantizer.encode(self.control.latents(values, valid))
        fold_of = fold[:, None].expand_as(content)[content]
        spread.add(latents[content])
        cold_spread.add(control.latents[content])
        with full_float32(values.device):  # TF32 would cost R^2 its third digit
            learned.add(codes[content], embeddings[content], fold_of)
            cold.add(control.codes[content], embeddings[content], fold_of)
        mean.add(self.target(embeddings), content, fold)

    def figures(self, ranks: Ranks) -> Figures:
        """`participation_ratio` of the latents, `r2` of codes on the teacher's embeddings, both also `_cold_start`, and
        `mean_cosine`, that of the mean embedding at each position with what the estimator predicts."""
        assert self.found is not None
        spread, cold_spread, learned, cold, mean = self.found
        figures = {
            "participation_ratio": participation_ratio(spread.covariance(ranks.sum)),
            "participation_ratio_cold_start": participation_ratio(cold_spread.covariance(ranks.sum)),
            "r2": learned.r2(ranks.sum),
            "r2_cold_start": cold.r2(ranks.sum),
            "mean_cosine": mean.cosine(ranks.sum),
        }
        return {name: value for name, value in figures.items() if value is not None}


def folds(positions: Sequence[int], device: torch.device) -> Tensor:
    """int64 ``[b]``: the fold of the held-out clips that each belongs to, by its position in the stream."""
    return torch.tensor([position % FOLDS for position in positions], device=device)


def _content(codes: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return torch.ones(codes.shape[:2], dtype=torch.bool, device=codes.device)
    return content_mask(valid, codes.shape[1])
