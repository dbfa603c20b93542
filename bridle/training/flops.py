"""How many floating-point operations a clip costs in a phase: matrix products and attention, as MFU counts them.

A product of ``[n, a]`` and ``[a, b]`` is ``2 n a b`` operations; a backward pass is two products for each of the
forward pass, and one where the input is data. Attention is counted by its products too, softmax and all that is
element-wise is not, and nothing that is computed a second time (fused attention, activation checkpoints) counts twice:
so a step that spends time elsewhere has a lower share of the machine's rate. `torch.utils.flop_counter` finds the same
number where attention is not fused; it counts fused attention on CPUs as nothing.
"""

from __future__ import annotations

import math

from bridle.config import EncoderPhase, EncoderSettings, JointPhase, Recipe
from bridle.modeling.masking import hidden_count
from bridle.modeling.patches import PatchShape
from bridle.training.schedule import cold_start_of, tokenizer_phase_of

MLP = 4
"""Width of a block's hidden layer over the block's own."""
TRAINED = 3
"""Forward and backward pass together, in forward passes."""


class ClipFlops:
    """Operations of one clip in each phase of a recipe.

    grid: patches along each axis of a clip.
    """

    def __init__(self, recipe: Recipe, patch: PatchShape, grid: tuple[int, ...]) -> None:
        self.recipe, self.patch, self.grid = recipe, patch, grid
        self.model, self.positions = recipe.model, math.prod(grid)
        self.hidden = hidden_count(recipe.mask, grid)

    def of_phase(self, index: int) -> float:
        """One clip's share of a step of phase `index`, the frozen half's part included; of a joint phase the mean over
        steps in which the tokenizer learns and in which it rests."""
        phase = self.recipe.phases[index]
        if isinstance(phase, JointPhase):
            learns = self.tokenizer(TRAINED) + self.encoder(self.positions)
            rests = self.tokenizer_codes()
            return self.student() + rests + (learns - rests) / phase.tokenizer_every
        if isinstance(phase, EncoderPhase):
            cold = tokenizer_phase_of(self.recipe, index) == cold_start_of(self.recipe)
            return self.student() + (self.cold_start_codes() if cold else self.tokenizer_codes())
        return self.tokenizer(TRAINED) + self.encoder(self.positions)

    def student(self) -> float:
        """Encoder and decoder, forwards and backwards."""
        return self.encoder(self.positions - self.hidden, TRAINED) + TRAINED * self.decoder()

    def tokenizer(self, times: int) -> float:
        """The learned tokenizer and its estimator, `times` forward passes; the lookup has no backward pass."""
        width, dim = self.model.encoder.width, self.model.quantizer.dim
        head = _product(self.positions, width, width) + _product(self.positions, width, dim)
        estimator = (
            _product(self.positions, dim, width) + self._estimator_blocks() + _product(self.positions, width, width)
        )
        return self.encoder(self.positions, times) + times * (head + estimator) + self.lookup()

    def tokenizer_codes(self) -> float:
        """The learned tokenizer as the frozen half."""
        width, dim = self.model.encoder.width, self.model.quantizer.dim
        head = _product(self.positions, width, width) + _product(self.positions, width, dim)
        return self.encoder(self.positions) + head + self.lookup()

    def cold_start_codes(self) -> float:
        """The random projection as the frozen half."""
        return _product(self.positions, self.patch.numel, self.model.quantizer.dim) + self.lookup()

    def lookup(self) -> float:
        """Distances of every position to every code of every stage."""
        quantizer = self.model.quantizer
        return quantizer.codebooks * _product(self.positions, quantizer.dim, quantizer.codebook_size)

    def encoder(self, positions: int, times: int = 1) -> float:
        """An encoder that sees so many positions, `times` forward passes; no gradient goes back into the patches."""
        return encoder_flops(self.model.encoder, self.patch, positions, times)

    def decoder(self) -> float:
        """One forward pass of the decoder, whose logits are those of hidden positions."""
        settings, quantizer = self.model.decoder, self.model.quantizer
        embed = _product(self.positions - self.hidden, self.model.encoder.width, settings.width)
        head = _product(self.hidden, settings.width, quantizer.codebooks * quantizer.codebook_size)
        if settings.kind == "swin":
            block = _swin_block(self.grid, settings.width, settings.window)
        else:
            block = _block(self.positions, settings.width)
        return embed + settings.depth * block + head

    def _estimator_blocks(self) -> float:
        width, depth = self.model.encoder.width, self.model.estimator.depth
        if self.model.estimator.attention:
            return depth * _block(self.positions, width)
        return depth * _perceptron(self.positions, width)


def encoder_flops(settings: EncoderSettings, patch: PatchShape, positions: int, times: int = 1) -> float:
    """See `ClipFlops.encoder`."""
    tokens = positions + settings.class_token
    embed = _product(positions, patch.numel, settings.width)
    return times * settings.depth * _block(tokens, settings.width) + min(times, 2) * embed


def _product(rows: int, width: int, columns: int) -> float:
    return 2.0 * rows * width * columns


def _perceptron(tokens: int, width: int) -> float:
    return 2 * _product(tokens, width, MLP * width)


def _block(tokens: int, width: int) -> float:
    """Queries, keys, values and the way out; every token with every token, twice; the perceptron."""
    return 4 * _product(tokens, width, width) + 2 * _product(tokens, width, tokens) + _perceptron(tokens, width)


def _swin_block(grid: tuple[int, ...], width: int, window: int) -> float:
    """Attention within windows, over a grid that is padded to whole ones."""
    padded = math.prod(math.ceil(side / window) * window for side in grid)
    attention = 4 * _product(padded, width, width) + 2 * _product(padded, width, window**2)
    return attention + _perceptron(math.prod(grid), width)
