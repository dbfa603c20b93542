"""A run as one HTML page that needs nothing else: no script, no link, no file beside it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from bridle import __version__
from bridle.data.shards import ShardSet, open_shards
from bridle.errors import MistakeError
from bridle.evaluation.card_figures import probe_figures
from bridle.evaluation.clips import ShownClip, Tile, heldout_clips
from bridle.evaluation.codebooks import Windows, code_norms, figures, measure
from bridle.evaluation.page_style import CSS
from bridle.evaluation.probe_page import html_table
from bridle.evaluation.probe_scores import READERS
from bridle.evaluation.run_folder import PhaseRows, RunFolder
from bridle.evaluation.topics import Chart, charts
from bridle.modalities import build_modality
from bridle.model_folder import BridleModel, load

RATES = {"Learning rate", "Throughput", "Waiting for data"}
"""Charts that stand behind the clips."""
MEASURED = 256
"""Held-out files of which codebook usage is measured, at most."""

HEALTH = {
    "accuracy": "accuracy", "position_accuracy": "by position alone", "codebook_perplexity": "perplexity",
    "cosine": "cosine", "mean_cosine": "of the mean at a position", "r2": "R² of codes",
    "r2_cold_start": "of the projection's", "participation_ratio": "directions of latents",
    "participation_ratio_cold_start": "of the projection's latents",
}  # fmt: skip
"""Keys of a row's health, in the order of the page, and what they are called there."""


@dataclass
class Report:
    """What goes into the page. usage: see `codebooks.figures`. notes: what could not be shown, and why, one sentence
    each."""

    run: RunFolder
    charts: list[Chart]
    clips: list[ShownClip]
    model: str | None = None
    usage: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def build_report(run: RunFolder) -> Report:
    """Draws everything. Clips or codes that cannot be had become a note; the charts stand without them."""
    report = Report(run, charts(run), [])
    if run.damaged_rows:
        report.notes.append(f"{run.damaged_rows} damaged lines of metrics.jsonl are left out.")
    if not run.phases:
        report.notes.append("No row of metrics has been written yet.")
    recipe = run.recipe
    model = _newest_model(run, report)
    if not recipe.data.heldout:
        report.notes.append("The recipe names no held-out clips (data.heldout), so none are shown.")
        return report
    try:
        modality = build_modality(recipe.modality, recipe.clip)
        report.clips = heldout_clips(recipe.data.heldout, modality, recipe.mask, model, recipe.data.cache)
        if model is not None:
            report.usage = _usage(
                model, open_shards(recipe.data.heldout, extensions=modality.extensions, cache=recipe.data.cache)
            )
    except (MistakeError, OSError) as error:
        report.notes.append(f"The held-out clips cannot be shown: {error}")
    return report


def _usage(model: BridleModel, shards: ShardSet) -> list[dict[str, Any]]:
    """Of files spread over all of them."""
    chosen = np.linspace(0, len(shards), min(MEASURED, len(shards)), endpoint=False).astype(int).tolist()
    windows = (window for number in chosen for window in Windows(shards, model.modality).of(number))
    return figures(measure(model, windows), code_norms(model))


def _newest_model(run: RunFolder, report: Report) -> BridleModel | None:
    if run.newest_model is None:
        report.notes.append("No iteration is finished yet, so there are no code maps.")
        return None
    try:
        model = load(run.newest_model)
    except (MistakeError, OSError) as error:
        report.notes.append(f"The newest model cannot be loaded, so there are no code maps: {error}")
        return None
    report.model = run.newest_model.name
    return model


def page(report: Report) -> str:
    """The page as HTML."""
    run = report.run
    title = escape(run.path.resolve().name)
    parts = [
        f"<h1>{title}</h1>", f'<p class="quiet">{escape(_state(run))}</p>',
        f'<p class="headline">{escape(headline(report))}</p>',
        *[f'<p class="note">{escape(note)}</p>' for note in report.notes],
        _clips(report), _phase_table(run), _health(run), _probe(run), _usage_table(report),
        *[_chart(chart) for chart in report.charts if chart.title not in RATES],
        *[_chart(chart) for chart in report.charts if chart.title in RATES],
        "<h2>What ran</h2>", _facts(run),
        f"<h2>Recipe</h2><details><summary>all settings</summary><pre>{escape(run.recipe_text)}</pre></details>",
        f'<p class="quiet">Written by bridle {escape(__version__)}.</p>',
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title} · BRIDLE run</title>\n<style>\n{CSS}\n</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def headline(report: Report) -> str:
    """The run in one or two sentences."""
    run = report.run
    said = "No phase has been evaluated on held-out clips yet."
    scored = [phase for phase in run.phases if phase.heldout and "accuracy" in phase.heldout[-1]]
    if scored:
        row = scored[-1].heldout[-1]
        accuracy, majority = float(np.mean(row["accuracy"])), float(np.mean(row.get("codebook_majority", 0.0)))
        said = (
            f"Of hidden patches of held-out clips, {100 * accuracy:.0f} % of the codes are predicted"
            f" (always naming the most frequent code: {100 * majority:.0f} %)."
        )
    if report.usage:
        used, ecu = (float(np.mean([row[key] for row in report.usage])) for key in ("cur", "ecu"))
        said += f" Held-out clips use {100 * used:.0f} % of {report.model}'s codes; effective usage (ECU) {ecu:.2f}."
    return said


def _probe(run: RunFolder) -> str:
    """What ``bridle probe --out RUN`` found; nothing without one."""
    found = probe_figures(run.path)
    if not found:
        return ""
    readers = [reader for reader in READERS if any(reader in scores for scores in found["scores"].values())]
    rows = [(name, *(scores.get(reader, "") for reader in readers)) for name, scores in found["scores"].items()]
    return (
        "<h2>Probe of labels</h2>"
        f'<p class="quiet">{escape(found["about"])}; model {escape(found["sha256"][:12])}.</p>'
        + "".join(f"<p>{escape(line)}.</p>" for line in found["verdicts"])
        + html_table(("feature", *readers), rows)
    )


def _usage_table(report: Report) -> str:
    if not report.usage:
        return ""
    head = ("codebook", "CUR", "ECU", "perplexity", "dead", "error", "mean norm", "least norm", "greatest norm")
    lines = [f"<tr>{''.join(f'<th>{text}</th>' for text in head)}</tr>"]
    for row in report.usage:
        norms = [row["norm_mean"], row["norm_edges"][0], row["norm_edges"][-1]]
        rates = [f"{row['cur']:.3f}", f"{row['ecu']:.3f}", f"{row['perplexity']:.1f}", str(row["dead"])]
        cells = [str(row["codebook"]), *rates, f"{row['error']:.4f}", *(f"{norm:.4f}" for norm in norms)]
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    about = (
        f"{report.model} on up to {MEASURED} held-out files. CUR: share of the codes that occur (Eq. 29); ECU: 1 where"
        " all occur equally often (Eq. 31); error: what is left of a latent of norm 1; norms: of the codes. Few clips"
        " cannot fill many codes: `bridle codebooks` looks at a whole data set."
    )
    table = f'<div class="wide"><table>{"".join(lines)}</table></div>'
    return f'<h2>Codebooks</h2><p class="quiet">{escape(about)}</p>{table}'


def _state(run: RunFolder) -> str:
    if run.written is None:
        return "BRIDLE run, just begun"
    when = f"last row {run.written:%Y-%m-%d %H:%M} UTC"
    if run.finished:
        return f"BRIDLE run, finished; {when}"
    newest = run.phases[-1] if run.phases else None
    where = f"at step {_last_step(newest)} of {newest.name}" if newest else "before its first row"
    return f"BRIDLE run, not finished: {where}; {when}"


def _facts(run: RunFolder) -> str:
    recipe, environment = run.recipe, run.environment
    encoder, quantizer = recipe.model.encoder, recipe.model.quantizer
    packages = environment.get("packages", {})
    versions = [f"{name} {packages[name]}" for name in ("torch", "deepspeed", "timm") if name in packages]
    zero = run.ds_config.get("zero_optimization", {}).get("stage", 0)
    grid, ranks = build_modality(recipe.modality, recipe.clip).grid, environment.get("ranks", "?")
    facts = {
        "Modality": f"{recipe.modality}, {' × '.join(map(str, grid.values()))} patches ({' × '.join(grid)})",
        "Encoder": f"width {encoder.width}, depth {encoder.depth}, {encoder.heads} heads",
        "Quantizer": f"{quantizer.codebooks} codebooks of {quantizer.codebook_size} codes of width {quantizer.dim}",
        "Mask": f"{recipe.mask.kind.replace('_', ' and ')}, {100 * recipe.mask.ratio:g} % hidden",
        "Data": ", ".join(
            _weighted(pattern, source.weight) for source in recipe.data.mixture for pattern in source.shards
        ),
        "Held out": ", ".join(recipe.data.heldout or ["none"]),
        "Batch": f"{recipe.train.batch_size} clips, seed {recipe.seed}",
        "Machine": ", ".join(
            [f"{ranks} rank{'' if ranks == 1 else 's'}", str(environment.get("device", "?")), f"ZeRO stage {zero}"]
        ),
        "Software": ", ".join([f"bridle {environment.get('bridle', '?')}", *versions]),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<dl>{rows}</dl>"


def _weighted(pattern: str, weight: float) -> str:
    """As `--data` takes it."""
    return pattern if weight == 1 else f"{pattern}@{weight:g}"


def _phase_table(run: RunFolder) -> str:
    if not run.phases:
        return ""
    head = (
        "",
        "steps",
        "loss",
        "held-out loss",
        "held-out accuracy",
        "most frequent code",
        "held-out cosine",
        "least codebook usage",
    )
    lines = [f"<tr>{''.join(f'<th>{text}</th>' for text in head)}</tr>"]
    for phase in run.phases:
        heldout = phase.heldout[-1] if phase.heldout else {}
        newest = (phase.train or phase.heldout)[-1]
        steps = f"{_last_step(phase)} of {phase.settings.steps}" if phase.settings.steps else str(_last_step(phase))
        accuracy, majority = heldout.get("accuracy"), heldout.get("codebook_majority")
        cells = [
            escape(phase.name), steps, f"{newest['loss']:.3f}",
            f"{heldout['loss']:.3f}" if heldout else "–",
            f"{np.mean(accuracy):.3f}" if accuracy else "–",
            f"{np.mean(majority):.3f}" if accuracy and majority else "–",
            f"{heldout['cosine']:.3f}" if "cosine" in heldout else "–",
            f"{100 * min(newest['codebook_usage']):.0f} %",
        ]  # fmt: skip
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f'<h2>Phases</h2><div class="wide"><table>{"".join(lines)}</table></div>'


def _health(run: RunFolder) -> str:
    """The verdict on each phase, and the figures behind it, of its last held-out row."""
    lines = [f"<tr>{''.join(f'<th>{text}</th>' for text in ('', *HEALTH.values()))}</tr>"]
    sentences = []
    for phase in run.phases:
        row = phase.heldout[-1] if phase.heldout else {}
        figures = [row.get(key) for key in HEALTH]
        if any(figure is not None for figure in figures):
            cells = ["–" if figure is None else f"{np.mean(figure):.3f}" for figure in figures]
            lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in (escape(phase.name), *cells))}</tr>")
        if "verdict" in row:
            style = "" if row.get("healthy") else ' class="note"'
            sentences.append(f"<p{style}>{escape(phase.name)}: {escape(row['verdict'])}.</p>")
    if len(lines) == 1:
        return ""
    about = "On held-out clips, padding left out; means over codebooks. Each figure stands before its control."
    table = f'<div class="wide"><table>{"".join(lines)}</table></div>'
    return f'<h2>Health</h2><p class="quiet">{about}</p>{"".join(sentences)}{table}'


def _last_step(phase: PhaseRows) -> int:
    return max(int(row["step"]) for row in (*phase.train[-1:], *phase.heldout[-1:]))


def _chart(chart: Chart) -> str:
    caption = f'<p class="quiet">{escape(chart.caption)}</p>' if chart.caption else ""
    return f'<h2>{escape(chart.title)}</h2>{caption}<figure class="wide">{chart.svg}</figure>'


def _clips(report: Report) -> str:
    if not report.clips:
        return ""
    text = "Each with a mask as in training."
    if report.model:
        text += f" Code maps from {report.model}; colours tell codes of one codebook apart and mean nothing else."
    parts = [f'<h2>Held-out clips</h2><p class="quiet">{escape(text)}</p>']
    for clip in report.clips:
        height, width, _ = clip.tiles[0].pixels.shape
        columns = 3 if width < 1.5 * height else 2 if width < 3 * height else 1
        tiles = "".join(_tile(tile) for tile in clip.tiles)
        tiles = f'<div class="tiles" style="--columns: {columns}; --narrow: {1 + columns // 3}">{tiles}</div>'
        parts.append(f"<h3>{escape(clip.name)}</h3>{_player(clip)}{tiles}")
    return "\n".join(parts)


def _player(clip: ShownClip) -> str:
    if clip.sound is None:
        return ""
    source = f"data:audio/mpeg;base64,{base64.b64encode(clip.sound).decode()}"
    return f'<audio controls preload="metadata" src="{source}" aria-label="Sound of {escape(clip.name)}"></audio>'


def _tile(tile: Tile) -> str:
    out = io.BytesIO()
    Image.fromarray(tile.pixels).save(out, format="PNG", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    caption = escape(tile.caption)
    return f'<figure><img src="{source}" alt="{escape(tile.alt)}"><figcaption>{caption}</figcaption></figure>'
