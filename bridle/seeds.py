"""What random numbers are for, so that no two uses share any. The values belong to every run: none may change."""

from __future__ import annotations

from enum import IntEnum


class SeedPart(IntEnum):
    """What of a phase has a seed of its own; see `phase_seed`."""

    ORDER = 0
    COLD_START = 1
    HEAD = 1  # of a classifier: no fine-tuning has a cold start
    CODEBOOKS = 2
    ENCODER = 3
    DECODER = 4
    TOKENIZER = 5
    ESTIMATOR = 6


class Shuffle(IntEnum):
    """What of an order of samples is shuffled by itself: the third number of its key, after seed and epoch or pass."""

    BLOCKS_OF_EPOCH = 1
    SAMPLES_OF_WINDOW = 2
    BLOCKS_OF_PASS = 3
    CHOSEN = 4


def phase_seed(seed: int, index: int, part: SeedPart) -> int:
    """The seed of a component of phase `index` of a run with `seed`."""
    return (seed * 1_000 + index) * 10 + part
