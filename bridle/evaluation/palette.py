"""The colours of the report, the command line's pictures and the playground: told apart whatever colours one sees.

The playground's script holds the same anchors; a test compares them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CODEBOOKS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8f7a00", "#808080")
"""One for each codebook, in turn: Okabe and Ito's, with a yellow and a grey that stand out on white and on black."""
CODES = (
    "#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838",
)  # fmt: skip
"""Anchors of cividis (Nuñez et al., 2018), dark to light: it looks alike with and without red-green blindness."""
SPREAD = 0.618034
"""Neighbouring codes lie this share of the map apart (the golden section), so that they look different."""
TINT = 0.7548777, 1.5
"""Step of a second order, in which a code's tint goes by up to so much through grey to its opposite, its lightness
kept: more colours than the map alone has."""


def code_colours(codes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """uint8 ``[..., 3]``: a colour for each code, the same every time; neighbouring codes look different."""
    anchors = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in CODES], dtype=np.float64)
    place = (codes * SPREAD) % 1.0 * (len(CODES) - 1)
    below = np.floor(place).astype(int)
    share = (place - below)[..., None]
    colours = anchors[below] * (1 - share) + anchors[below + 1] * share
    paler = ((codes * TINT[0]) % 1.0 * TINT[1])[..., None]
    grey = (colours @ [0.2126, 0.7152, 0.0722])[..., None]
    return np.floor(np.clip(colours * (1 - paler) + grey * paler, 0, 255) + 0.5).astype(np.uint8)
