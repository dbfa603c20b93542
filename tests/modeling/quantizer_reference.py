"""The paper's equations once more, in plain numpy float64, for the quantizer's tests."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from bridle.config import QuantizerSettings
from bridle.modeling.quantizer import ResidualQuantizer


def with_codebooks(codebooks: torch.Tensor, **settings: object) -> ResidualQuantizer:
    """A quantizer whose state is loaded, with N = 1 and m = c."""
    stages, size, dim = codebooks.shape
    quantizer = ResidualQuantizer(QuantizerSettings(codebooks=stages, codebook_size=size, dim=dim, **settings))
    state = {
        "codebooks": codebooks,
        "cluster_size": torch.ones(stages, size),
        "code_sum": codebooks.clone(),
        "initialized": torch.tensor(True),
    }
    quantizer.load_state_dict(state)
    return quantizer


def random_quantizer(seed: int, stages: int, size: int, dim: int, **settings: object) -> ResidualQuantizer:
    """Random codes, each stage's at about two thirds of the length of the one before."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 0.67 ** torch.arange(1, stages + 1).view(-1, 1, 1) / dim**0.5
    return with_codebooks(torch.randn(stages, size, dim, generator=generator) * lengths, **settings)


def random_latents(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1000))


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-6)


def residuals(z: np.ndarray, codebooks: np.ndarray, codes: np.ndarray, norm: str) -> Iterator[np.ndarray]:
    """e_1 ... e_{M+1} of Eqs. 1-2 for given codes: float64 ``[S, d]`` each, as the stage sees it."""
    residual = unit(z.astype(np.float64))
    for stage, codebook in enumerate(codebooks.astype(np.float64)):
        if norm == "every" and stage:
            residual = unit(residual)
        yield residual
        residual = residual - codebook[codes[:, stage]]
    yield residual


def squared_distances(points: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    return ((points[:, None, :] - codebook[None].astype(np.float64)) ** 2).sum(-1)


class MovingAverage:
    """Eqs. 9-13 for one codebook, as printed."""

    def __init__(self, sizes: np.ndarray, sums: np.ndarray, decay: float, epsilon: float) -> None:
        self.sizes, self.sums = sizes.astype(np.float64), sums.astype(np.float64)
        self.decay, self.epsilon = decay, epsilon

    def step(self, z: np.ndarray, q: np.ndarray) -> np.ndarray:
        count = len(self.sizes)
        n, ell = np.zeros(count), np.zeros_like(self.sums)
        for j in range(len(z)):
            n[q[j]] += 1
            ell[q[j]] += z[j]
        self.sizes = self.decay * self.sizes + (1 - self.decay) * n
        total = self.sizes.sum()
        smoothed = (self.sizes + self.epsilon) * total / (total + count * self.epsilon)
        self.sums = self.decay * self.sums + (1 - self.decay) * ell
        return self.sums / smoothed[:, None]
