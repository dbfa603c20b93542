"""A run of fine-tuning, or its folds, as one HTML page that needs nothing else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from bridle import __version__
from bridle.evaluation.classification import SCORES, Scored, figures, joined, read_scores, spelled
from bridle.evaluation.curves import Line, Panel, draw, series
from bridle.evaluation.page_style import CSS
from bridle.evaluation.probe_page import html_table
from bridle.finetune_recipe import FinetuneRecipe
from bridle.recipe_files import RUN_RECIPE, read_run_recipe_file
from bridle.settings import RecipeError, parse_settings

CONFUSED = 10
"""Pairs of classes that are shown, the most frequent first."""
FIGURES = ("accuracy", "balanced_accuracy", "top_5_accuracy", "mean_average_precision")


@dataclass(frozen=True)
class TunedRun:
    """A run's folder. rows: of metrics.jsonl that can be read; scored: of held-out files, none before it is done, or
    without any."""

    path: Path
    recipe: FinetuneRecipe
    recipe_text: str
    rows: list[dict[str, Any]]
    damaged_rows: int
    scored: Scored | None

    @property
    def finished(self) -> bool:
        """Whether the classifier is there."""
        return (self.path / "classifier" / "config.json").is_file()


def is_tuned(path: Path) -> bool:
    """Whether a folder holds a run of fine-tuning, or folds of one."""
    return any(_raw(run) is not None for run in [path, *_folds(path)])


def _folds(path: Path) -> list[Path]:
    return sorted(path.glob("fold-*"))


def _raw(path: Path) -> dict[str, Any] | None:
    """The recipe of a run of fine-tuning, as plain data; none of another run's."""
    try:
        raw, _ = read_run_recipe_file(path)
        return raw if raw["phases"][0]["kind"] == "finetune" else None
    except (RecipeError, KeyError, TypeError, IndexError):
        return None


def read_tuned(path: Path) -> TunedRun:
    """Reads a run's folder; what is not written yet is empty.

    Raises:
        RecipeError: its recipe is none of fine-tuning. ValueError: its scores are damaged.
    """
    raw = _raw(path)
    if raw is None:
        raise RecipeError(f"{path / RUN_RECIPE}: not a recipe of fine-tuning; give a run folder of `bridle finetune`")
    rows, damaged = [], 0
    metrics = path / "metrics.jsonl"
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.is_file() else ():
        try:
            row = json.loads(line)
            rows.append(row | {"step": int(row["step"]), "loss": float(row["loss"]), "split": str(row["split"])})
        except (ValueError, KeyError, TypeError):  # a run that was killed while it wrote leaves half a line
            damaged += 1
    text = read_run_recipe_file(path)[1]
    recipe = parse_settings(FinetuneRecipe, raw, str(path / RUN_RECIPE))
    return TunedRun(path, recipe, text, rows, damaged, read_scores(path) if (path / SCORES).is_file() else None)


def tuned_page(path: Path) -> tuple[str, str, list[str]]:
    """The page, its headline, and what could not be shown.

    Raises:
        RecipeError, ValueError: see `read_tuned`.
    """
    runs = [read_tuned(run) for run in _folds(path) if _raw(run) is not None]
    runs = runs or [read_tuned(path)]
    notes = [f"{run.damaged_rows} damaged lines of {run.path.name}/metrics.jsonl are left out." for run in runs
             if run.damaged_rows]  # fmt: skip
    notes += [f"{run.path.name} is not finished." for run in runs if not run.finished]
    scored = [run.scored for run in runs if run.scored is not None]
    every = joined(scored) if scored else None
    if every is None:
        notes.append("Nothing says how good the classifier is: no held-out files, or they are not scored yet.")
    said, title = _headline(every, runs), escape(path.resolve().name)
    parts = [
        f"<h1>{title}</h1>", '<p class="quiet">BRIDLE fine-tuning</p>', f'<p class="headline">{escape(said)}</p>',
        *[f'<p class="note">{escape(note)}</p>' for note in notes],
        _figures(runs, every), _classes(every), _confused(every), *[_curves(run, len(runs) > 1) for run in runs],
        "<h2>What ran</h2>", _facts(runs),
        f"<h2>Recipe</h2><details><summary>all settings</summary><pre>{escape(runs[-1].recipe_text)}</pre></details>",
        f'<p class="quiet">Written by bridle {escape(__version__)}.</p>',
    ]  # fmt: skip
    html = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title} · BRIDLE fine-tuning</title>\n<style>\n{CSS}\n</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )
    return html, said, notes


def _headline(every: Scored | None, runs: Sequence[TunedRun]) -> str:
    start = runs[0].recipe.start
    begun = "random weights" if start is None or start.scratch else start.name
    if every is None:
        return f"Fine-tuning from {begun}; no held-out figures yet."
    name, found = next(iter(figures(every.scores, every.targets, every.several).items()))
    return (
        f"Fine-tuned from {begun}: {name.replace('_', ' ')} {spelled(found)} on {len(every.files)} held-out files of"
        f" {len(every.classes)} classes; guessing scores {float(every.targets.double().mean()):.3f}."
    )


def _figures(runs: Sequence[TunedRun], every: Scored | None) -> str:
    if every is None:
        return ""
    named = [(run.path.name, run.scored) for run in runs if run.scored is not None]
    named += [("all folds", every)] if len(runs) > 1 else []
    rows: list[Sequence[str]] = []
    for name, scored in named:
        found = figures(scored.scores, scored.targets, scored.several)
        rows.append((name, str(len(scored.files)), *map(spelled, found.values())))
    about = "95 % intervals over draws of files. Of folds, each file is scored by the run that did not learn from it."
    head = ("run", "files", *(name.replace("_", " ") for name in found))
    return f'<h2>Held-out files</h2><p class="quiet">{about}</p>{html_table(head, rows)}'


def _classes(every: Scored | None) -> str:
    """Of each class: files, how many are told rightly, and how often it is told."""
    if every is None or every.several:
        return ""
    told, truth = every.scores.argmax(1), every.targets
    rows = []
    for number, name in enumerate(every.classes):
        own, named = truth[:, number], told == number
        right = int((own & named).sum())
        shares = [f"{right / int(part.sum()):.3f}" if part.any() else "–" for part in (own, named)]
        rows.append((name, str(int(own.sum())), *shares))
    return "<h2>Classes</h2>" + html_table(("class", "files", "found (recall)", "told rightly (precision)"), rows)


def _confused(every: Scored | None) -> str:
    if every is None or every.several:
        return ""
    pairs = Counter(
        (every.classes[int(right)], every.classes[int(told)])
        for right, told in zip(every.targets.int().argmax(1), every.scores.argmax(1), strict=True)
        if right != told
    )
    rows = [(right, told, str(count)) for (right, told), count in pairs.most_common(CONFUSED)]
    return "<h2>Most often confused</h2>" + html_table(("is", "told", "files"), rows) if rows else ""


def _curves(run: TunedRun, named: bool) -> str:
    split = {name: [row for row in run.rows if row["split"] == name] for name in ("train", "heldout")}
    panels = [
        Panel("Loss", run.recipe.phase.loss, list(_lines(split, "loss"))),
        *(
            Panel(name.replace("_", " ").capitalize(), "", list(_lines({"heldout": split["heldout"]}, name)), (0, 1))
            for name in FIGURES
            if any(name in row for row in split["heldout"])
        ),
    ]
    panels = [panel for panel in panels if panel.lines]
    if not panels:
        return ""
    title = f"Curves of {run.path.name}" if named else "Curves"
    about = "Training losses are of mixed and masked clips. Held-out points are of each file's first window."
    words = f"{title}: " + ", ".join(panel.title for panel in panels)
    return f'<h2>{escape(title)}</h2><p class="quiet">{about}</p><figure class="wide">{draw(panels, words)}</figure>'


def _lines(split: dict[str, list[dict[str, Any]]], key: str) -> Iterable[Line]:
    for name, rows in split.items():
        steps, values = series(rows, lambda row: row.get(key))
        if steps:
            label = "training" if name == "train" else "held out"
            yield Line(label, steps, values, kind="training" if name == "train" else "heldout")


def _facts(runs: Sequence[TunedRun]) -> str:
    recipe, start = runs[-1].recipe, runs[-1].recipe.start
    phase, views = recipe.phase, recipe.views
    facts = {
        "Begins with": "random weights" if start is None else f"{start.name}, sha256 {start.sha256[:12]}"
        + (" (its shape alone, with random weights)" if start.scratch else ""),
        "Data": ", ".join(pattern for source in recipe.data.mixture for pattern in source.shards),
        "Held out": f"fold {recipe.fold}" if recipe.fold else ", ".join(recipe.data.heldout or ["none"]),
        "Labels": recipe.labels,
        "Steps": f"{max((row['step'] for row in runs[-1].rows), default=0)}, batch {recipe.train.batch_size},"
        f" rate {phase.lr:g}, layer decay {phase.layer_decay:g}, loss {phase.loss}",
        "Views": f"{views.clips} clips by {views.crops} crops" if views.clips * views.crops > 1 else "all windows",
        "Seed": str(recipe.seed),
    }  # fmt: skip
    rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<dl>{rows}</dl>"
