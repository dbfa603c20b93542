"""The colours of the report, the command line's pictures and the playground: told apart whatever colours one sees.

The playground's script holds the same anchors; a test compares them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CODEBOOKS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8f7a00", "#808080")
"""One for each codebook, in turn: Okabe and Ito's, with a yellow and a grey that stand out on white and on black."""
STEPS = 0.618034, 0.7548777
"""How far from one code to the next, as shares of the ranges of lightness and hue: neighbours look different."""
DARK, RANGE, ORANGE, BLUE = 24, 212, 70, 110
"""Codes run from dark to light, and from blue to orange: both are seen with and without red-green blindness."""


def code_colours(codes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """uint8 ``[..., 3]``: a colour for each code, the same every time."""
    light = DARK + RANGE * ((codes * STEPS[0]) % 1.0)
    warm = 2 * ((codes * STEPS[1]) % 1.0) - 1
    colours = np.stack([light + ORANGE * warm, light, light - BLUE * warm], axis=-1)
    return np.floor(np.clip(colours, 0, 255) + 0.5).astype(np.uint8)
