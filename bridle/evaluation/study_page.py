"""The page of a study, and its tables as text: Tables 2 to 4 and 6 and Figures 2 and 3 of the paper, laid out alike."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from bridle import __version__
from bridle.evaluation.page_style import CSS
from bridle.evaluation.probe import spelled, verdicts
from bridle.evaluation.probe_page import html_table
from bridle.evaluation.probe_scores import READERS

NAMES = {
    "balanced_accuracy": "balanced accuracy", "accuracy": "Top-1", "top_5_accuracy": "Top-5",
    "mean_average_precision": "mAP",
}  # fmt: skip


def score_table(found: Mapping[str, Any], reader: str) -> list[Sequence[str]]:
    """Head and rows as Tables 2 to 4: a row an arm and iteration, a linear probe's scores with intervals."""
    metrics = [name for name in NAMES if name in found["probe"]["scores"][0]]
    head = (f"Model (probe: {reader})", *(f"LP {NAMES[name]}" for name in metrics))
    linear = [score for score in found["probe"]["scores"] if score["reader"] == reader]
    return [head, *((score["feature"], *(spelled(score[name]) for name in metrics)) for score in linear)]


def usage_table(found: Mapping[str, Any]) -> list[Sequence[str]]:
    """Head and rows as Table 6, ECU by Eq. 31; means over the seeds, and the least and greatest of them."""
    rows: list[Sequence[str]] = [("Iteration", "Method", "Codebook", "CUR", "ECU")]
    for row in found["usage"]:
        cells = [f"{row[n]['value']:.3f} [{row[n]['least']:.3f}, {row[n]['greatest']:.3f}]" for n in ("cur", "ecu")]
        rows.append((f"iter{row['iteration']}", row["method"], str(row["codebook"] or "-"), *cells))
    return rows


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """A table in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def study_page(found: Mapping[str, Any], pictures: Iterable[tuple[str, bytes]]) -> str:
    """The page. found: what `bridle study` writes as JSON; pictures: title and PNG of each figure."""
    probe = found["probe"]
    tables = [score_table(found, reader) for reader in (READERS[0], READERS[2])]
    usage_head, *usage = usage_table(found)
    parts = [
        "<h1>VQ against RQ</h1>",
        f'<p class="quiet">Recipe {escape(found["recipe"])}, seeds {", ".join(map(str, found["seeds"]))},'
        f" {found['share']:g} of its steps; {probe['tested']} tested files of {len(probe['classes'])} classes; guessing"
        f" scores {probe['chance']:.3f}.</p>",
        *(f"<p>{escape(line)}.</p>" for line in verdicts(probe)),
        "<h2>Linear probes (as Tables 2 to 4)</h2>",
        '<p class="quiet">Means over the seeds; 95 % intervals span them and the tested files. “linear” is ridge'
        " regression in closed form, “paper” the paper's probe (AdamW).</p>",
        *(html_table(head, rows) for head, *rows in tables),
        "<h2>Use of the codebooks (as Table 6)</h2>",
        '<p class="quiet">CUR by Eq. 29, ECU by Eq. 31: 1 is best (the paper prints another quantity). iter1 is'
        " the random projection's tokenizer, iter2 the learned one. Means over the seeds, least and greatest.</p>",
        html_table(usage_head, usage),
        "<h2>Norms of the codes (as Figures 2 and 3)</h2>",
        *(_picture(title, png) for title, png in pictures),
        "<h2>How</h2>",
        f"<pre>{escape(found['command'])}</pre>",
        f'<p class="quiet">bridle {escape(__version__)}, commit {escape(found["commit"] or "unknown")}.</p>',
        f"<details><summary>The recipe</summary><pre>{escape(found['recipe_text'])}</pre></details>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>VQ against RQ · BRIDLE</title>\n<style>\n{CSS}\n</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _picture(title: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{data}"></figure>'
