"""What a probe found as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from bridle import __version__
from bridle.evaluation.page_style import CSS
from bridle.evaluation.probe import spelled, verdicts
from bridle.evaluation.probe_scores import READERS


def probe_page(found: Mapping[str, Any]) -> str:
    """The page of what `bridle probe` writes as JSON."""
    model, metric = found["model"], found["metric"].replace("_", " ")
    parts = [
        f"<h1>{escape(model['name'])}</h1>",
        f'<p class="quiet">What linear readers and nearest neighbours find of labels in features of a frozen'
        f" {escape(model['modality'])} model, beside controls that have learned nothing.</p>",
        *(f"<p>{escape(line)}.</p>" for line in verdicts(dict(found))),
        _facts(found),
        "<h2>Scores</h2>",
        f'<p class="quiet">{escape(metric)} with 95 % intervals over {found["tested"]} tested files; guessing scores'
        f" {found['chance']:.3f}. A control's score is the mean over its seeds; its interval spans them."
        f"{_paper(found)}</p>",
        html_table(("feature", "numbers", *readers_of(found)), _score_rows(found)),
        "<h2>Above the controls</h2>",
        '<p class="quiet">Differences of pairs: both scored on the same draws of files.</p>',
        html_table(("feature", "control", "reader", "difference"), _pair_rows(found)),
        f'<p class="quiet">Written by bridle {escape(__version__)}.</p>',
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(model['name'])} · BRIDLE probe</title>\n<style>\n{CSS}\n</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def readers_of(found: Mapping[str, Any]) -> list[str]:
    """The readers that scored the features, in the order of `READERS`."""
    names = {score["reader"] for score in found["scores"]}
    return [reader for reader in READERS if reader in names]


def _paper(found: Mapping[str, Any]) -> str:
    settings = found.get("paper")  # older files have none
    if not settings:
        return ""
    return (
        f" “paper” is the paper's linear probe: AdamW at {settings['lr']:g} for {settings['epochs']} epochs of batches"
        f" of {settings['batch']}."
    )


def score_rows(found: Mapping[str, Any]) -> list[tuple[str, int, list[Mapping[str, Any]]]]:
    """Name and width of each feature, and its scores by reader, in the order of `READERS`."""
    rows: dict[str, tuple[int, list[Mapping[str, Any]]]] = {}
    for score in found["scores"]:
        rows.setdefault(score["feature"], (score["columns"], []))[1].append(score)
    return [(name, *row) for name, row in rows.items()]


def _score_rows(found: Mapping[str, Any]) -> Iterable[Sequence[str]]:
    for name, columns, scores in score_rows(found):
        yield name, str(columns), *(spelled(score[found["metric"]]) for score in scores)


def _pair_rows(found: Mapping[str, Any]) -> Iterable[Sequence[str]]:
    for row in found["comparisons"]:
        difference = row[found["metric"]]["difference"]
        low, high = difference["interval"]
        spelled_out = f"{difference['value']:+.3f} [{low:+.3f}, {high:+.3f}]"
        yield row["feature"], f"{row['word']} {row['control']}", row["reader"], spelled_out


def _facts(found: Mapping[str, Any]) -> str:
    rows = {
        "Labels": f"{found['labels']}: " + ", ".join(f"{name} ({count})" for name, count in found["classes"].items()),
        "Left out": ", ".join(f"{name} ({count})" for name, count in found["left_out"].items()) or None,
        "Files": f"{found['files']}, {len(found['skipped'])} unreadable, {found['unlabelled']} without a label",
        "Learned from": ", ".join(found["shards"]),
        "Tested on": ", ".join(found["test"]) if found["test"] else f"the same in {found['folds']} folds",
        "Kept together": f"{found['group']}, {found['groups']} groups" if found["group"] else None,
        "Seed": str(found["seed"]),
    }
    lines = [f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in rows.items() if value is not None]
    return f"<dl>{''.join(lines)}</dl>"


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Head and rows of cells, which need no escaping yet; wide ones scroll."""
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><tr>{top}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'
