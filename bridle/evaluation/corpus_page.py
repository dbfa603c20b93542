"""A corpus's figures as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from bridle import __version__
from bridle.evaluation.report import CSS


def corpus_page(name: str, found: Mapping[str, Any]) -> str:
    """The page of `bridle.evaluation.corpus.figures`."""
    parts = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="quiet">A corpus of codes of {escape(found["model"]["name"])}, {found["model"]["modality"]}.</p>',
        _facts(found),
        "<h2>Codebooks</h2>",
        f'<p class="quiet">Entropies in bits. A position was seen {found["seen_per_position"]:.0f} times on average; '
        "given the position they come out too low where that is little.</p>",
        _table(
            ("codebook", "codes used", "entropy", "given the position", "commonest code"),
            (
                (
                    str(row["codebook"]), f"{row['used']} of {row['size']}", f"{row['entropy_bits']:.3f}",
                    f"{row['entropy_bits_given_position']:.3f}", f"{row['commonest_share']:.1%}",
                )
                for row in found["codebooks"]
            ),
        ),
        "<h2>The same codes more than once</h2>",
        f'<p class="quiet">{found["duplicate_clips"]} clips repeat the whole stream of another.</p>',
        _table(("times", "clips"), ((str(len(keys)), ", ".join(keys[:5])) for keys in found["duplicates"])),
        "<h2>Longest runs of one code</h2>",
        '<p class="quiet">Along time (or height), at one place of the other axes: silence, black, a stuck sensor.</p>',
        _table(
            ("steps", "codebook", "code", "from step", "clip"),
            (
                (str(row["steps"]), str(row["codebook"]), str(row["code"]), str(row["first"]), row["key"])
                for row in found["longest_runs"]
            ),
        ),
        "<h2>Commonest n-grams</h2>",
        '<p class="quiet">Of the first codebook, along time (or height).</p>',
        _table(
            ("codes", "times", "clips, for example"),
            (
                (" ".join(map(str, row["codes"])), str(row["times"]), ", ".join(row["clips"]))
                for row in found["commonest_ngrams"]
            ),
        ),
        "<h2>Labels</h2>" if found["labels"] else "",
        _table(("label", "clips"), ((label, str(times)) for label, times in found["labels"].items())),
        f'<p class="quiet">Written by bridle {escape(__version__)}.</p>',
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)} · BRIDLE corpus</title>\n<style>\n{CSS}\n</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _facts(found: Mapping[str, Any]) -> str:
    rows = {
        "Clips": f"{found['clips']}, and {found['skipped']} that could not be read",
        "Content": f"{found['hours']:.2f} hours" if found["hours"] is not None else None,
        "Codes": f"{found['codes']} at {found['positions']} positions; {found['tokens']} ids in documents",
        "A second": None if found["codes_per_second"] is None else (
            f"{found['codes_per_second']:.1f} codes, {found['bits_per_second']:.0f} bits "
            f"({found['bits_per_second_given_position']:.0f} given the position)"
        ),
        "A clip": f"{found['bits_per_clip']:.0f} bits",
    }  # fmt: skip
    lines = [f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in rows.items() if value is not None]
    return f"<dl>{''.join(lines)}</dl>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    if not lines:
        return ""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><tr>{top}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'
