"""Pictures for people's eyes, drawn with matplotlib's objects: nothing here opens a window or keeps global state."""

from __future__ import annotations

import io
import math

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from bridle.evaluation.codebooks import BINS
from bridle.evaluation.palette import CODEBOOKS

USED, DEAD = CODEBOOKS[0], "#c9c9c9"


def norms_picture(norms: Tensor, counts: Tensor, title: str) -> bytes:
    """PNG: a histogram of code norms for each codebook (as Figures 2 and 3), codes that never occurred in grey.

    norms: float ``[M, K]``; counts: ``[M, K]``.
    """
    columns = min(len(norms), 4)
    rows = math.ceil(len(norms) / columns)
    figure = Figure(figsize=(max(4.5, 2.7 * columns), 0.7 + 2.3 * rows), dpi=150, layout="constrained")
    figure.suptitle(f"Norms of the codes of {title}", fontsize=11)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    for stage, panel in enumerate(panels):
        if stage >= len(norms):
            panel.set_visible(False)
            continue
        occurs = counts[stage] > 0
        panel.hist(
            [norms[stage][occurs].numpy(), norms[stage][~occurs].numpy()],
            bins=np.histogram_bin_edges(norms[stage].numpy(), BINS), stacked=True, color=[USED, DEAD],
            label=["occurs", "never occurs"],
        )  # fmt: skip
        panel.set_title(f"codebook {stage + 1}", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("norm of a code", fontsize=8)
        if stage % columns == 0:
            panel.set_ylabel("codes", fontsize=8)
    panels[0].legend(fontsize=7, frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
