"""A phase is a small module with one loss, which DeepSpeed wraps, and the frozen half that stands beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bridle.config import QuantizerSettings, TrainSettings
from bridle.modeling.blocks import compile_blocks, recompute_activations
from bridle.modeling.decoder import Decoder
from bridle.modeling.encoder import Encoder
from bridle.modeling.losses import cosine_similarity, masked_code_loss
from bridle.modeling.patches import clip_weights, content_mask, gather_positions
from bridle.modeling.quantizer import ResidualQuantizer
from bridle.modeling.target import TargetScale
from bridle.modeling.tokenizer import Estimator, LearnedTokenizer, Tokenizer
from bridle.training.engine import SlowStep
from bridle.training.health import Codes, Figures, Predictions, folds
from bridle.training.ranks import Ranks

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Metrics = dict[str, Tensor]
"""What a forward pass measures, detached: float32 by the names of a row, ``[]``, or ``[M]`` by codebook or stage."""
Means = dict[str, float | list[float]]
"""The same on the host, as means over a window."""
PADDING = -1
"""Stands for the code of a position that is none; `PhaseJob.count` leaves it out."""


class EncoderModule(nn.Module):
    """Encoder and decoder, with Eq. 4."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(
        self, values: Tensor, visible: Tensor, masked: Tensor, codes: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, Metrics, Tensor]:
        """Returns the loss, metrics, and the codes that were to be predicted.

        codes: int64 ``[B, N, M]``, or ``[B, N, M, S]`` with soft codes; valid: int64 ``[B]``, positions of content;
        none: all.
        """
        grid = self.encoder.patch.grid(values)
        logits = self.decoder(self.encoder(values, visible, valid), visible, masked, grid, valid)
        targets = gather_positions(codes.flatten(2), masked).unflatten(2, codes.shape[2:])
        content = None if valid is None else content_mask(valid, masked)
        losses, accuracy = masked_code_loss(logits, targets, None if content is None else clip_weights(content))
        loss = losses.sum()
        nearest = targets if codes.ndim == 3 else targets[..., 0]
        metrics = {"loss": loss.detach(), "loss_per_codebook": losses.detach(), "accuracy": accuracy}
        return loss, metrics, _content_only(nearest, content)


class TokenizerModule(nn.Module):
    """Tokenizer and estimator, with Eqs. 5 to 7; target: the scale of what the estimator predicts, none: raw."""

    def __init__(
        self, tokenizer: LearnedTokenizer, estimator: Estimator, cosine_weight: float, target: TargetScale | None = None
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.estimator = estimator
        self.cosine_weight = cosine_weight
        self.target = target

    def forward(
        self, values: Tensor, embeddings: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, Metrics, Tensor, Tensor]:
        """Returns the loss, metrics, the codes, and the latents (float32 ``[B, N, d]``, of unit length).

        valid: int64 ``[B]``, positions of content; none: all.
        """
        grid = self.tokenizer.encoder.patch.grid(values)
        content = None if valid is None else content_mask(valid, embeddings.shape[1])
        weights = None if content is None else clip_weights(content)
        if self.target is not None:
            embeddings = self.target(embeddings, content)
        quantized, commitment = self.tokenizer.quantizer(self.tokenizer.latents(values, valid), weights)
        cosine = cosine_similarity(self.estimator(quantized.quantized, grid, valid), embeddings, weights)
        loss = commitment + self.cosine_weight * (1.0 - cosine)
        metrics = {
            "loss": loss.detach(),
            "commitment": commitment.detach(),
            "cosine": cosine.detach(),
            "error": quantized.errors,
        }
        return loss, metrics, _content_only(quantized.codes, content), quantized.latents.detach()


def _content_only(codes: Tensor, content: Tensor | None) -> Tensor:
    """``[B, n, M]`` with `PADDING` where ``content [B, n]`` is false."""
    return codes if content is None else torch.where(content.unsqueeze(-1), codes, PADDING)


class PhaseJob:
    """One trained phase: what is trained, what is frozen, what is measured.

    module: what DeepSpeed wraps; parts: its components by name, each saved under that name.
    """

    kind: str
    module: nn.Module
    masked: bool
    """Whether clips come with a mask."""
    slow_part: str | None = None
    """Name of the module's child whose weights rest in some steps."""
    rate_of: Callable[[str], float] | None = None
    """From a parameter's name to the share of the learning rate that it gets; none: all of it."""

    def __init__(self, quantizer: QuantizerSettings | None, device: torch.device, bf16: bool) -> None:
        self.device = device
        self.bf16 = bf16
        size = (0, 1) if quantizer is None else (quantizer.codebooks, quantizer.codebook_size)
        self.usage = torch.zeros(size, device=device)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Components by name."""
        return dict(self.module.named_children())

    def prepare(self, train: TrainSettings) -> PhaseJob:
        """What the recipe wants of the blocks, before anything runs; the frozen half's are compiled, too."""
        if train.activation_checkpointing:
            recompute_activations(self.module)
        if train.compile:
            for part in [value for value in vars(self).values() if isinstance(value, nn.Module)]:
                compile_blocks(part)
        return self

    def begin_step(self, step: int) -> None:
        """Runs before optimizer step `step`, counted from 0."""

    def inputs(self, batch: dict[str, Tensor]) -> tuple[Any, ...]:
        """Arguments of the module's forward, the frozen half's part included; the last is `valid`, none without
        padding."""
        raise TypeError("use EncoderPhaseJob or TokenizerPhaseJob")

    @property
    def slow_step(self) -> SlowStep | None:
        """Of the part whose weights rest in some steps; none where all learn in each."""
        return None

    def settle(self, means: Means) -> Means:
        """Means over all steps of a window as what the row tells."""
        return means

    def after_step(self, all_reduce: Callable[[Tensor], Any] | None) -> None:
        """Runs once per optimizer step, after it."""

    def begin_evaluation(self) -> None:
        """Forgets what `observe` has seen."""
        raise TypeError("use EncoderPhaseJob or TokenizerPhaseJob")

    def observe(self, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], positions: list[int]) -> None:
        """Looks at one held-out batch: what the module was given, what it gave, and the clips' positions."""

    def health(self, ranks: Ranks) -> Figures:
        """Figures of what was observed (see `bridle.training.health`), over all ranks, which must all call it."""
        raise TypeError("use EncoderPhaseJob or TokenizerPhaseJob")

    def count(self, codes: Tensor) -> None:
        """Adds ``[B, n, M]`` codes, but for `PADDING`, to `usage`, without leaving the device."""
        flat = codes.flatten(0, -2).T
        seen = flat != PADDING
        self.usage.scatter_add_(1, torch.where(seen, flat, 0), seen.to(self.usage.dtype))

    def _frozen(self, module: ModuleT) -> ModuleT:
        """Ready to be looked at only. In bfloat16 what autocast would cast in every forward pass is cast now: the
        weights of the products, and nothing else, so that the numbers are the same."""
        if self.bf16:
            for part in module.modules():
                if isinstance(part, nn.Linear):
                    part.to(torch.bfloat16)
        return module.to(self.device).eval().requires_grad_(False)

    def _valid(self, batch: dict[str, Tensor], positions: int) -> Tensor | None:
        """int64 ``[B]``: positions of content; none where no clip has padding."""
        return positions - batch["padding"] if "padding" in batch else None


class EncoderPhaseJob(PhaseJob):
    """The encoder learns from the frozen tokenizer, which sees the unmasked clip."""

    kind = "encoder"
    masked = True

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        tokenizer: Tokenizer,
        quantizer: QuantizerSettings,
        device: torch.device,
        bf16: bool,
        soft_codes: int = 1,
    ) -> None:
        super().__init__(quantizer, device, bf16)
        self.module = EncoderModule(encoder, decoder).to(device)
        self.tokenizer = self._frozen(tokenizer)
        self.soft_codes = soft_codes

    @torch.no_grad()
    def inputs(self, batch: dict[str, Tensor]) -> tuple[Any, ...]:
        """Values, visible, masked, the frozen tokenizer's codes, and valid."""
        valid = self._valid(batch, batch["visible"].shape[1] + batch["masked"].shape[1])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            latents = self.tokenizer.latents(batch["values"], valid)
        if self.soft_codes > 1:
            codes = self.tokenizer.quantizer.soft_codes(latents, self.soft_codes)
        else:
            codes = self.tokenizer.quantizer.encode(latents).codes
        return batch["values"], batch["visible"], batch["masked"], codes, valid

    def begin_evaluation(self) -> None:
        """See `PhaseJob`."""
        self.predictions = Predictions(self.usage.shape[1])

    def observe(self, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], positions: list[int]) -> None:
        """See `PhaseJob`."""
        *_, codes, valid = inputs
        self.predictions.add(codes if codes.ndim == 3 else codes[..., 0], valid)

    def health(self, ranks: Ranks) -> Figures:
        """See `PhaseJob`."""
        return self.predictions.figures(ranks)


class TokenizerPhaseJob(PhaseJob):
    """A fresh tokenizer learns from the frozen encoder; both see the unmasked clip."""

    kind = "tokenizer"
    masked = False
    module: TokenizerModule

    def __init__(
        self,
        tokenizer: LearnedTokenizer,
        estimator: Estimator,
        encoder: Encoder,
        quantizer: QuantizerSettings,
        device: torch.device,
        bf16: bool,
        target: TargetScale | None = None,
        control: Tokenizer | None = None,
    ) -> None:
        """control: the cold start's tokenizer, whose codes evaluations compare with; none where there are no such."""
        super().__init__(quantizer, device, bf16)
        self.control = None if control is None else self._frozen(control)
        self.module = TokenizerModule(tokenizer, estimator, quantizer.cosine_weight, target).to(device)
        self.quantizer: ResidualQuantizer = tokenizer.quantizer
        self.encoder = self._frozen(encoder)

    @torch.no_grad()
    def inputs(self, batch: dict[str, Tensor]) -> tuple[Any, ...]:
        """Values, the frozen encoder's embeddings, and valid."""
        valid = self._valid(batch, self.encoder.patch.count(batch["values"]))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            embeddings = self.encoder.embeddings(batch["values"], valid)
        return batch["values"], embeddings, valid

    def begin_evaluation(self) -> None:
        """See `PhaseJob`."""
        target = self.module.target or nn.Identity()
        codebooks, size = self.usage.shape
        assert self.control is not None
        self.codes = Codes(self.control, target, codebooks, size, self.bf16)

    def observe(self, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], positions: list[int]) -> None:
        """See `PhaseJob`."""
        values, embeddings, valid = inputs
        _, _, codes, latents = outputs
        self.codes.add(values, embeddings, valid, latents, codes, folds(positions, self.device))

    def health(self, ranks: Ranks) -> Figures:
        """See `PhaseJob`."""
        return self.codes.figures(ranks)

    def after_step(self, all_reduce: Callable[[Tensor], Any] | None) -> None:
        """Moves the codebooks (Eqs. 9-13) by the statistics of all ranks and micro-batches."""
        self.quantizer.update(all_reduce)
