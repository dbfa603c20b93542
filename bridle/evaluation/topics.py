"""Which charts a run's report has, and what each says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bridle.evaluation.curves import Line, Panel, draw, level, series
from bridle.evaluation.run_folder import PhaseRows, RunFolder

Value = Callable[[dict[str, Any]], float | None]
Curves = Sequence[tuple[str, Value]]
Bounds = tuple[float | None, float | None]
LOSS = (
    "Encoder phases: cross-entropy summed over codebooks (Eq. 4), in nats; a uniform guess among {size} codes costs"
    " {guess:.2f}. Tokenizer phases: commitment and cosine loss (Eqs. 5 to 7)."
)
ACCURACY = (
    "Share of hidden patches whose code is predicted, per codebook. Chance is 1/{size} = {chance:.4f}; always naming"
    " the most frequent code scores the dotted line of the same colour."
)
COSINE = "Between what the estimator makes of the quantized latents and the encoder's embeddings (Eq. 6)."
ERROR = "Squared norm of what each codebook leaves of a latent of norm 1 (Eq. 2)."
USAGE = (
    "Share of each codebook's codes seen since the row before: in encoder phases those to be predicted, in tokenizer"
    " phases those being learned."
)
PARTS = "Mean of the ranks. What is left goes to waiting for clips, and to rows, evaluation and checkpoints."
WAIT = "Share of the time that training waits for clips."


@dataclass(frozen=True)
class Chart:
    """title and caption as plain text; svg: an element to put into a page."""

    title: str
    caption: str
    svg: str


def charts(run: RunFolder) -> list[Chart]:
    """All charts for which the run has rows."""
    quantizer = run.recipe.model.quantizer
    size, stages = quantizer.codebook_size, range(quantizer.codebooks)
    guess, chance = quantizer.codebooks * math.log(size), 1 / size
    encoders = [phase for phase in run.phases if phase.kind != "tokenizer"]
    tokenizers = [phase for phase in run.phases if phase.kind != "encoder"]
    usage, accuracy, error = (_each(key, stages) for key in ("codebook_usage", "accuracy", "error"))
    losses = [
        _with_level(panel, "uniform guess", guess) if phase.kind == "encoder" else panel
        for phase, panel in zip(run.phases, _panels(run.phases, "loss", _one("loss"), (0, None)), strict=True)
    ]
    accuracies = [
        _with_level(_with_majority(panel, phase, stages), "chance", chance)
        for phase, panel in zip(encoders, _panels(encoders, "share predicted", accuracy, (0, 1)), strict=True)
    ]
    found = [
        ("Loss", LOSS.format(size=size, guess=guess), losses),
        ("Accuracy on hidden patches", ACCURACY.format(size=size, chance=chance), accuracies),
        ("Cosine to the encoder", COSINE, _panels(tokenizers, "cosine", _one("cosine"), (None, 1))),
        ("Quantization error", ERROR, _panels(tokenizers, "share left over", error, (0, None))),
        ("Codebook usage", USAGE, _panels(run.phases, "share of codes", usage, (0, 1.02))),
        ("Learning rate", "", _panels(run.phases, "learning rate", _one("lr"), (0, None))),
        (
            "Throughput",
            "Over all ranks.",
            _panels(run.phases, "clips per second", _one("samples_per_second"), (0, None)),
        ),
        ("Where a step's time goes", PARTS, _panels(run.phases, "share of time", _parts(), (0, 1))),
        ("Waiting for data", WAIT, _panels(run.phases, "share of time", _one("data_wait"), (0, 1))),
    ]
    filled = [(title, caption, [panel for panel in panels if panel.lines]) for title, caption, panels in found]
    return [_chart(title, caption, panels) for title, caption, panels in filled if panels]


def _chart(title: str, caption: str, panels: Sequence[Panel]) -> Chart:
    last = "; ".join(f"{panel.title}: {_last(panel)}" for panel in panels)
    return Chart(title, caption, draw(panels, f"{title} over optimizer steps. Last values: {last}."))


def _last(panel: Panel) -> str:
    return ", ".join(f"{line.label} {line.values[-1]:.4g}" for line in panel.lines)


def _panels(phases: Sequence[PhaseRows], unit: str, curves: Curves, bounds: Bounds) -> list[Panel]:
    """A panel for each phase: training as lines, held-out clips as points of the same colour."""
    return [Panel(phase.name, unit, _lines(phase, curves), bounds) for phase in phases]


def _lines(phase: PhaseRows, curves: Curves) -> list[Line]:
    lines = []
    for colour, (label, value) in enumerate(curves):
        lines.append(Line(label, *series(phase.train, value), colour))
        lines.append(Line("held out", *series(phase.heldout, value), colour, "heldout"))
    return [line for line in lines if line.steps]


def _with_majority(panel: Panel, phase: PhaseRows, stages: range) -> Panel:
    """Adds how often the most frequent code occurs: what always naming it would score."""
    lines = [
        Line("most frequent code", *series(phase.train, value), colour, "baseline")
        for colour, (_, value) in enumerate(_each("codebook_majority", stages))
    ]
    return replace(panel, lines=[*panel.lines, *(line for line in lines if line.steps)])


def _with_level(panel: Panel, label: str, value: float) -> Panel:
    steps = [step for line in panel.lines for step in line.steps]
    return replace(panel, lines=[*panel.lines, level(label, value, steps)]) if steps else panel


def _one(key: str) -> Curves:
    """The single number that rows hold under `key`."""
    return [("training", lambda row: row.get(key))]


def _parts() -> Curves:
    """A curve for each part of a step; rows of older runs have none."""

    def value_of(part: str) -> Value:
        return lambda row: row.get(part)

    return [(part.replace("_", " "), value_of(part)) for part in ("forward", "backward", "optimizer", "codebooks")]


def _each(key: str, stages: range) -> Curves:
    """A curve per codebook of the list that rows hold under `key`."""

    def value_of(stage: int) -> Value:
        return lambda row: row[key][stage] if key in row else None

    return [(f"codebook {stage + 1}", value_of(stage)) for stage in stages]
