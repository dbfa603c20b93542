"""The four components, built from a recipe's model section."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bridle.config import ModelSettings
from bridle.modeling.decoder import Decoder
from bridle.modeling.encoder import Encoder
from bridle.modeling.patches import PatchShape
from bridle.modeling.tokenizer import ColdStartTokenizer, Estimator, LearnedTokenizer


class Components:
    """Builds any component with weights that depend on the seed given, and on nothing that ran before."""

    def __init__(self, settings: ModelSettings, patch: PatchShape) -> None:
        self.settings = settings
        self.patch = patch

    def encoder(self, seed: int) -> Encoder:
        """E."""
        with seeded(seed):
            return Encoder(self.settings.encoder, self.patch)

    def decoder(self, seed: int) -> Decoder:
        """D."""
        with seeded(seed):
            return Decoder(self.settings.decoder, self.settings.encoder, self.settings.quantizer)

    def cold_start_tokenizer(self, seed: int) -> ColdStartTokenizer:
        """Iteration 1's tokenizer."""
        with seeded(seed):
            return ColdStartTokenizer(self.settings.quantizer, self.patch)

    def tokenizer(self, seed: int) -> LearnedTokenizer:
        """T."""
        with seeded(seed):
            return LearnedTokenizer(self.settings.encoder, self.settings.quantizer, self.patch)

    def estimator(self, seed: int) -> Estimator:
        """TE."""
        with seeded(seed):
            return Estimator(self.settings.estimator, self.settings.encoder, self.settings.quantizer)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights drawn inside depend on the seed alone; what is drawn after it goes on as before."""
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
        torch.manual_seed(seed)
        yield


def parameter_count(module: nn.Module) -> int:
    """Learned numbers of a module."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
