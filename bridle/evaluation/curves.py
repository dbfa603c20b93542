"""Charts of a run's metrics, as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from bridle.evaluation.palette import CODEBOOKS

TEXT, LINE = "#010203", "#040506"
"""Stand-ins that become the page's colours."""
MOST_POINTS = 300
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "bridle", "font.family": "DejaVu Sans", "font.size": 8,
    "axes.titlesize": 8.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.5,
    "text.color": TEXT, "axes.labelcolor": TEXT, "axes.titlecolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT,
    "axes.edgecolor": LINE, "grid.color": LINE, "xtick.labelcolor": TEXT, "ytick.labelcolor": TEXT,
    "legend.frameon": False, "legend.fontsize": 7.5, "lines.linewidth": 1.3,
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One curve: values over optimizer steps.

    kind: `training` is a line, `heldout` points, `level` a dashed line in the text's colour, `baseline` a dotted one.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: int = 0
    kind: Literal["training", "heldout", "baseline", "level"] = "training"

    @property
    def style(self) -> dict[str, Any]:
        """What matplotlib is told beyond the colour."""
        alone = {"marker": "_", "markersize": 8} if len(self.steps) == 1 else {}
        return {
            "training": alone,
            "heldout": {"marker": "o", "markersize": 3.5, "linestyle": ""},
            "baseline": {"linestyle": (0, (1, 2)), "linewidth": 1.1, **alone},
            "level": {"color": TEXT, "linestyle": (0, (4, 3)), "linewidth": 0.9},
        }[self.kind]


@dataclass(frozen=True)
class Panel:
    """One pair of axes. bounds: the vertical axis' ends; none of the two: fitted."""

    title: str
    unit: str
    lines: Sequence[Line]
    bounds: tuple[float | None, float | None] = (None, None)


def level(label: str, value: float, steps: Sequence[float]) -> Line:
    """A dashed horizontal line over the steps given."""
    return Line(label, [min(steps), max(steps)], [value, value], kind="level")


def series(
    rows: Iterable[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]
) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have one; long series become means of neighbours."""
    points = [(float(row["step"]), found) for row in rows if (found := value(row)) is not None]
    if not points:
        return [], []
    parts = np.array_split(np.array(points), min(len(points), MOST_POINTS))
    means = [part.mean(0) for part in parts]
    return [float(step) for step, _ in means], [float(number) for _, number in means]


def draw(panels: Sequence[Panel], description: str) -> str:
    """Panels side by side, three in a row, as one `<svg>` element with `description` for those who cannot see it."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 2.5 * rows), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
        for panel, axes in zip(panels, figure.subplots(rows, columns, squeeze=False).flat, strict=False):
            _draw_panel(panel, axes)
        for axes in figure.axes[len(panels) :]:
            axes.set_visible(False)
        _draw_legend([line for panel in panels for line in panel.lines], figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), description)


def _draw_panel(panel: Panel, axes: Axes) -> None:
    for line in panel.lines:
        axes.plot(line.steps, line.values, **{"color": CODEBOOKS[line.colour % len(CODEBOOKS)], **line.style})
    axes.set_title(panel.title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(panel.unit)
    axes.set_ylim(*panel.bounds)
    axes.margins(x=0.02)
    axes.locator_params(axis="x", integer=True, nbins=5)
    axes.locator_params(axis="y", nbins=5)


def _draw_legend(lines: Sequence[Line], figure: Figure) -> None:
    """One for all panels; what comes in every curve's colour is shown in the text's."""
    handles = {}
    order = ("training", "heldout", "baseline", "level")
    for line in sorted(lines, key=lambda line: order.index(line.kind)):
        colour = CODEBOOKS[line.colour % len(CODEBOOKS)] if line.kind == "training" else TEXT
        handles[line.label] = Line2D([], [], **{"color": colour, **line.style})
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=8)


def _inline(svg: str, description: str) -> str:
    """SVG as an element of an HTML page: no prolog, no metadata, no namespaces, the page's colours and font."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    svg = f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(description)}">' + svg[svg.index(">") + 1 :]
    for stand_in, wanted in ((TEXT, "currentColor"), (LINE, "var(--line)"), ("'DejaVu Sans'", "system-ui, sans-serif")):
        svg = svg.replace(stand_in, wanted)
    return svg.strip()
