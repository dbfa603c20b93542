"""Joint training (Eq. 8): encoder and tokenizer learn in one phase, each from the other as it is at that step.

Both halves stop the gradient at what the other gives them: the codes to predict, and the embeddings to estimate. What
the paper leaves open for residual codes is how to keep them from running after each other. Here the tokenizer and its
codebooks rest between its steps, and its teacher is a slow copy of the encoder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bridle.config import JointPhase, QuantizerSettings
from bridle.modeling.encoder import Encoder
from bridle.modeling.tokenizer import Tokenizer
from bridle.training.engine import SlowStep
from bridle.training.health import Codes, Figures, Predictions, folds
from bridle.training.phases import EncoderModule, Means, PhaseJob, TokenizerModule
from bridle.training.ranks import Ranks

LEARNED = ("commitment", "cosine", "error")
"""Metrics that only the tokenizer's own steps have."""
SCALE_MEMORY = 0.99
"""Share of the target's mean and deviation that a tokenizer step keeps."""


class SlowCopy(nn.Module):
    """An encoder whose weights are buffers: saved with the module, never trained, float32 in every precision."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        for part in encoder.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                delattr(part, name)
                part.register_buffer(name, parameter.detach().clone())

    @torch.no_grad()
    def follow(self, encoder: Encoder, decay: float) -> None:
        """Moves every weight towards the encoder's: decay times its own, the rest the other's."""
        weights = dict(encoder.named_parameters())
        for name, buffer in self.encoder.named_buffers():
            buffer.lerp_(weights[name].to(buffer), 1 - decay)

    def forward(self, values: Tensor, valid: Tensor | None) -> Tensor:
        """As `Encoder.embeddings`."""
        return self.encoder.embeddings(values, valid)


class JointModule(nn.Module):
    """All four components and a teacher, with Eq. 8."""

    def __init__(self, students: EncoderModule, tokenizers: TokenizerModule, settings: JointPhase) -> None:
        super().__init__()
        self.students, self.tokenizers = students, tokenizers
        self.alpha = settings.alpha
        self.teacher: SlowCopy | None = None
        if settings.teacher == "slow":
            self.teacher = SlowCopy(copy.deepcopy(students.encoder))

    def forward(
        self, values: Tensor, visible: Tensor, masked: Tensor, learn: bool, valid: Tensor | None = None
    ) -> tuple[Any, ...]:
        """Loss, metrics, and the codes to be predicted.

        learn: whether this is one of the tokenizer's steps. If so there follow the codes of all positions, the latents,
        and the teacher's embeddings.
        """
        if not learn:
            with torch.no_grad():
                codes = self.tokenizers.tokenizer.codes(values, valid)
            loss, metrics, targets = self.students(values, visible, masked, codes, valid)
            none = loss.detach().new_zeros(codes.shape[-1])
            rest = {"commitment": none[0], "cosine": none[0], "error": none, "tokenizer_share": none[0]}
            return loss, metrics | rest, targets
        with torch.no_grad():
            teach = self.students.encoder.embeddings if self.teacher is None else self.teacher
            embeddings = teach(values, valid)
        loss, learned, codes, latents = self.tokenizers(values, embeddings, valid)
        own, predicted, targets = self.students(values, visible, masked, codes.clamp(min=0), valid)
        total = own + self.alpha * loss
        metrics = predicted | learned | {"loss": total.detach(), "tokenizer_share": torch.ones_like(total.detach())}
        return total, metrics, targets, codes, latents, embeddings


class JointPhaseJob(PhaseJob):
    """Encoder and decoder, tokenizer and estimator, in one module."""

    kind = "joint"
    masked = True
    slow_part = "tokenizers"
    module: JointModule

    def __init__(
        self,
        students: EncoderModule,
        tokenizers: TokenizerModule,
        settings: JointPhase,
        quantizer: QuantizerSettings,
        device: torch.device,
        bf16: bool,
        control: Tokenizer,
    ) -> None:
        """control: as `TokenizerPhaseJob`'s."""
        super().__init__(quantizer, device, bf16)
        self.settings = settings
        self.module = JointModule(students, tokenizers, settings).to(device)
        self.control = self._frozen(control)
        self.learns, self._steps = True, 0

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Components by their path in the module."""
        halves = self.module.students, self.module.tokenizers
        found = {
            f"{name}.{part}": module
            for name, half in zip(("students", "tokenizers"), halves, strict=True)
            for part, module in half.named_children()
        }
        return found | ({} if self.module.teacher is None else {"teacher": self.module.teacher})

    def begin_step(self, step: int) -> None:
        """The tokenizer learns at step 0 and every `tokenizer_every` after it, and rests in between."""
        self.learns = step % self.settings.tokenizer_every == 0
        self._steps = -(-step // self.settings.tokenizer_every)

    @property
    def slow_step(self) -> SlowStep:
        """The tokenizer's and estimator's."""
        return SlowStep(rests=not self.learns, steps=self._steps)

    def inputs(self, batch: dict[str, Tensor]) -> tuple[Any, ...]:
        """Values, visible, masked, whether the tokenizer learns, and valid."""
        valid = self._valid(batch, batch["visible"].shape[1] + batch["masked"].shape[1])
        learns = self.learns or not self.module.training
        return batch["values"], batch["visible"], batch["masked"], learns, valid

    def after_step(self, all_reduce: Callable[[Tensor], Any] | None) -> None:
        """Moves codebooks (Eqs. 9-13), teacher and the target's scale, after the tokenizer's steps only."""
        if not self.learns:
            return
        tokenizers = self.module.tokenizers
        tokenizers.tokenizer.quantizer.update(all_reduce)
        if tokenizers.target is not None:
            tokenizers.target.update(all_reduce, SCALE_MEMORY)
        if self.module.teacher is not None:
            self.module.teacher.follow(self.module.students.encoder, self.settings.teacher_decay)

    def settle(self, means: Means) -> Means:
        """The tokenizer's metrics as means over its own steps; left out where it took none."""
        share = means["tokenizer_share"]
        assert isinstance(share, float)
        return {
            name: _divided(value, share) if name in LEARNED else value
            for name, value in means.items()
            if share or name not in LEARNED
        }

    def begin_evaluation(self) -> None:
        """See `PhaseJob`."""
        codebooks, size = self.usage.shape
        self.predictions = Predictions(size)
        target = self.module.tokenizers.target or nn.Identity()
        self.codes = Codes(self.control, target, codebooks, size, self.bf16)

    def observe(self, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], positions: list[int]) -> None:
        """See `PhaseJob`."""
        values, *_, valid = inputs
        codes, latents, embeddings = outputs[3:]
        self.predictions.add(codes.clamp(min=0), valid)
        self.codes.add(values, embeddings, valid, latents, codes, folds(positions, self.device))

    def health(self, ranks: Ranks) -> Figures:
        """See `PhaseJob`."""
        return self.predictions.figures(ranks) | self.codes.figures(ranks)


def _divided(value: float | list[float], by: float) -> float | list[float]:
    return value / by if isinstance(value, float) else [each / by for each in value]
