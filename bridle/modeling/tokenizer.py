"""Tokenizers turn a clip into codes: the cold start's random projection, and the learned one with its estimator."""

from __future__ import annotations

from torch import Tensor, nn

from bridle.config import EncoderSettings, EstimatorSettings, QuantizerSettings
from bridle.modeling.blocks import PositionwiseBlocks, TransformerBlocks, start_weights
from bridle.modeling.encoder import Encoder
from bridle.modeling.patches import PatchShape, content_mask
from bridle.modeling.positions import Positions
from bridle.modeling.quantizer import ResidualQuantizer


class Tokenizer(nn.Module):
    """A map from clips to latents, and the residual quantizer behind it.

    Subclasses implement `latents`; the quantizer normalises them.
    """

    def __init__(self, quantizer: QuantizerSettings, patch: PatchShape) -> None:
        super().__init__()
        self.patch = patch
        self.quantizer = ResidualQuantizer(quantizer)

    def latents(self, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """``[B, C, *S]`` to ``[B, N, d]``, before normalisation.

        valid: int64 ``[B]``, positions of each clip that are content; what lies behind them changes nothing before
        them, and its own latents mean nothing. None: all of them.
        """
        raise TypeError("use ColdStartTokenizer or LearnedTokenizer")

    def codes(self, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """``[B, C, *S]`` to int64 codes ``[B, N, M]``; valid: as in `latents`. Changes no state."""
        return self.quantizer.encode(self.latents(values, valid)).codes


class ColdStartTokenizer(Tokenizer):
    """Iteration 1's: a frozen random linear projection of the patch of the normalised clip.

    No positions are added, so that a target says what is in a patch and not where it is.
    """

    def __init__(self, quantizer: QuantizerSettings, patch: PatchShape) -> None:
        super().__init__(quantizer, patch)
        self.projection = nn.Linear(patch.numel, quantizer.dim, bias=False)
        nn.init.xavier_normal_(self.projection.weight)
        self.projection.requires_grad_(False)

    def latents(self, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """See `Tokenizer.latents`; each patch is looked at by itself."""
        latents: Tensor = self.projection(self.patch.cut(values).to(self.projection.weight))
        return latents


class LearnedTokenizer(Tokenizer):
    """T of the paper: an encoder of E's architecture, then Linear, Tanh, Linear to d."""

    def __init__(self, encoder: EncoderSettings, quantizer: QuantizerSettings, patch: PatchShape) -> None:
        super().__init__(quantizer, patch)
        self.encoder = Encoder(encoder, patch)
        self.head = nn.Sequential(
            nn.Linear(encoder.width, encoder.width), nn.Tanh(), nn.Linear(encoder.width, quantizer.dim)
        )
        start_weights(self.head)

    def latents(self, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """See `Tokenizer.latents`."""
        latents: Tensor = self.head(self.encoder.embeddings(values, valid))
        return latents


class Estimator(nn.Module):
    """TE of the paper: predicts the main encoder's embeddings from quantized latents.

    It gets the positions of the grid, so that codes need not spend capacity on them. Its blocks see one position at a
    time, as Eq. 6 writes TE(q_t), or are the transformer of the paper's architecture.
    """

    def __init__(self, settings: EstimatorSettings, encoder: EncoderSettings, quantizer: QuantizerSettings) -> None:
        super().__init__()
        self.width = encoder.width
        self.embed = nn.Linear(quantizer.dim, encoder.width)
        self.blocks: TransformerBlocks | PositionwiseBlocks
        if settings.attention:
            self.blocks = TransformerBlocks(encoder.width, settings.depth, encoder.heads)
        else:
            self.blocks = PositionwiseBlocks(encoder.width, settings.depth)
        self.norm = nn.LayerNorm(encoder.width)
        self.positions = Positions(encoder.width)
        self.head = nn.Linear(encoder.width, encoder.width)
        start_weights(self)

    def forward(self, quantized: Tensor, grid: tuple[int, ...], valid: Tensor | None = None) -> Tensor:
        """``[B, N, d]`` to ``[B, N, width]``; valid: as in `Tokenizer.latents`."""
        tokens = self.embed(quantized.to(self.embed.weight.dtype))
        content = None if valid is None else content_mask(valid, tokens.shape[1])
        tokens = self.blocks(tokens + self.positions(grid, tokens), grid, content)
        estimate: Tensor = self.head(self.norm(tokens))
        return estimate
