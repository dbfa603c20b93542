"""Fine-tuning's phase: encoder and head learn labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bridle.evaluation.classification import values
from bridle.finetune_recipe import FinetunePhase
from bridle.modeling.classifier import (
    ClassifierModule,
    classification_loss,
    drop_factors,
    layer_rate,
    probabilities,
)
from bridle.training.health import Figures
from bridle.training.phases import Metrics, PhaseJob
from bridle.training.ranks import Ranks


class LearningModule(nn.Module):
    """A classifier with its loss."""

    def __init__(self, classifier: ClassifierModule, settings: FinetunePhase) -> None:
        super().__init__()
        self.classifier = classifier
        self.settings = settings

    def forward(
        self,
        values: Tensor,
        targets: Tensor,
        visible: Tensor | None,
        branches: Tensor | None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Metrics, Tensor]:
        """Returns the loss, metrics, and the logits, float32 ``[B, C]``."""
        logits = self.classifier(values, visible, valid, branches)
        smoothing = self.settings.label_smoothing if self.training else 0.0
        loss = classification_loss(logits, targets, self.settings.loss, smoothing)
        return loss, {"loss": loss.detach()}, logits.detach()


class FinetuneJob(PhaseJob):
    """See `PhaseJob`. several: whether a file may have several labels."""

    kind = "finetune"
    masked = False
    module: LearningModule

    def __init__(
        self, classifier: ClassifierModule, settings: FinetunePhase, several: bool, device: torch.device, bf16: bool
    ) -> None:
        super().__init__(None, device, bf16)
        self.settings, self.several = settings, several
        self.module = LearningModule(classifier, settings).to(device)
        self.positions = classifier.encoder.patch.count
        depth = len(classifier.encoder.blocks.blocks)

        def rate_of(name: str) -> float:
            return layer_rate(name.removeprefix("classifier."), depth, settings.layer_decay)

        self.rate_of = rate_of

    def inputs(self, batch: dict[str, Tensor]) -> tuple[Any, ...]:
        """Values, targets, visible positions, factors of the blocks' branches, and valid."""
        branches = drop_factors(batch["branches"], self.settings.drop_path) if "branches" in batch else None
        valid = self._valid(batch, self.positions(batch["values"]))
        return batch["values"], batch["targets"], batch.get("visible"), branches, valid

    def count(self, codes: Tensor) -> None:
        """There are no codes."""

    def begin_evaluation(self) -> None:
        """See `PhaseJob`."""
        self.seen: list[Tensor] = []

    def observe(self, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], positions: list[int]) -> None:
        """See `PhaseJob`."""
        self.seen.append(torch.stack([probabilities(outputs[2], self.settings.loss), inputs[1]]))

    def health(self, ranks: Ranks) -> Figures:
        """Figures of the first window of each held-out clip that was looked at."""
        scores, targets = ranks.gather(torch.cat(self.seen, dim=1).transpose(0, 1).contiguous()).unbind(1)
        return values(scores.cpu(), targets.cpu() > 0, self.several)
