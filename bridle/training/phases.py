"""A phase is a small module with one loss, which DeepSpeed wraps, and the frozen half that stands beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bridle.config import QuantizerSettings
from bridle.modeling.decoder import Decoder
from bridle.modeling.encoder import Encoder
from bridle.modeling.losses import cosine_similarity, masked_code_loss
from bridle.modeling.patches import gather_positions
from bridle.modeling.quantizer import ResidualQuantizer
from bridle.modeling.tokenizer import Estimator, LearnedTokenizer, Tokenizer

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class EncoderModule(nn.Module):
    """Encoder and decoder, with Eq. 4."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, values: Tensor, visible: Tensor, masked: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss, the metrics of `EncoderPhaseJob.metric_names`, and the codes that were to be predicted."""
        grid = self.encoder.patch.grid(values)
        logits = self.decoder(self.encoder(values, visible), visible, masked, grid)
        targets = gather_positions(codes, masked)
        losses, accuracy = masked_code_loss(logits, targets)
        loss = losses.sum()
        return loss, torch.cat([loss.detach()[None], losses.detach(), accuracy]), targets


class TokenizerModule(nn.Module):
    """Tokenizer and estimator, with Eqs. 5 to 7."""

    def __init__(self, tokenizer: LearnedTokenizer, estimator: Estimator, cosine_weight: float) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.estimator = estimator
        self.cosine_weight = cosine_weight

    def forward(self, values: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss, the metrics of `TokenizerPhaseJob.metric_names`, and the codes."""
        grid = self.tokenizer.encoder.patch.grid(values)
        quantized, commitment = self.tokenizer.quantizer(self.tokenizer.latents(values))
        cosine = cosine_similarity(self.estimator(quantized.quantized, grid), embeddings)
        loss = commitment + self.cosine_weight * (1.0 - cosine)
        metrics = torch.stack([loss.detach(), commitment.detach(), cosine.detach()])
        return loss, torch.cat([metrics, quantized.errors]), quantized.codes


class PhaseJob:
    """One trained phase: what is trained, what is frozen, what is measured.

    module: what DeepSpeed wraps; parts: its components by name, each saved under that name.
    """

    kind: str
    module: nn.Module
    metric_names: list[str]
    masked: bool
    """Whether clips come with a mask."""

    def __init__(self, quantizer: QuantizerSettings, device: torch.device, bf16: bool) -> None:
        self.device = device
        self.bf16 = bf16
        self.usage = torch.zeros(quantizer.codebooks, quantizer.codebook_size, device=device)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Components by name."""
        return dict(self.module.named_children())

    def inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Arguments of the module's forward, the frozen half's part included."""
        raise TypeError("use EncoderPhaseJob or TokenizerPhaseJob")

    def after_step(self, all_reduce: Callable[[Tensor], Any] | None) -> None:
        """Runs once per optimizer step, after it."""

    def count(self, codes: Tensor) -> None:
        """Adds ``[B, n, M]`` codes to `usage`, without leaving the device."""
        flat = codes.flatten(0, -2).T.contiguous()
        self.usage.scatter_add_(1, flat, torch.ones_like(flat, dtype=self.usage.dtype))

    def _frozen(self, module: ModuleT) -> ModuleT:
        return module.to(self.device).eval().requires_grad_(False)


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
    ) -> None:
        super().__init__(quantizer, device, bf16)
        self.module = EncoderModule(encoder, decoder).to(device)
        self.tokenizer = self._frozen(tokenizer)
        stages = range(1, quantizer.codebooks + 1)
        self.metric_names = [
            "loss",
            *(f"loss_codebook_{m}" for m in stages),
            *(f"accuracy_codebook_{m}" for m in stages),
        ]

    @torch.no_grad()
    def inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Values, visible, masked, and the frozen tokenizer's codes."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            codes = self.tokenizer.codes(batch["values"])
        return batch["values"], batch["visible"], batch["masked"], codes


class TokenizerPhaseJob(PhaseJob):
    """A fresh tokenizer learns from the frozen encoder; both see the unmasked clip."""

    kind = "tokenizer"
    masked = False

    def __init__(
        self,
        tokenizer: LearnedTokenizer,
        estimator: Estimator,
        encoder: Encoder,
        quantizer: QuantizerSettings,
        device: torch.device,
        bf16: bool,
    ) -> None:
        super().__init__(quantizer, device, bf16)
        self.module = TokenizerModule(tokenizer, estimator, quantizer.cosine_weight).to(device)
        self.quantizer: ResidualQuantizer = tokenizer.quantizer
        self.encoder = self._frozen(encoder)
        stages = range(1, quantizer.codebooks + 1)
        self.metric_names = ["loss", "commitment", "cosine", *(f"error_stage_{m}" for m in stages)]

    @torch.no_grad()
    def inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Values, and the frozen encoder's embeddings."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            embeddings = self.encoder.embeddings(batch["values"])
        return batch["values"], embeddings

    def after_step(self, all_reduce: Callable[[Tensor], Any] | None) -> None:
        """Moves the codebooks (Eqs. 9-13) by the statistics of all ranks and micro-batches."""
        self.quantizer.update(all_reduce)
