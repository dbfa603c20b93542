"""`bridle compare RUN ... --with RUN ...`: whether one kind of fine-tuning does better than another, file by file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "compare fine-tuned runs on their held-out files, with paired intervals"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="run folders of fine-tuning (of folds: the one above them), best one a seed",
    )
    parser.add_argument("--with", dest="others", metavar="RUN", nargs="+", required=True, help="those to compare with")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap draws (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints a line a metric: both figures and the difference, each with its 95 % interval.

    Raises:
        RecipeError: a folder without scores.
        ValueError: they were scored on other files or classes.
    """
    from bridle.evaluation.classification import difference, read_scores, spelled

    ours, theirs = ([read_scores(Path(run)) for run in runs] for runs in (args.runs, args.others))
    found = difference(ours, theirs, args.seed)
    if args.json:
        print(json.dumps({"files": len(ours[0].files), "metrics": found}))
        return 0
    print(f"{len(ours[0].files)} held-out files; {len(ours)} runs against {len(theirs)}")
    for name, row in found.items():
        value, low, high = row["difference"]
        word = "above" if low > 0 else "below" if high < 0 else "not told apart from"
        print(
            f"{name.replace('_', ' ')}: {spelled(row['ours'])} {word} {spelled(row['theirs'])};"
            f" difference {value:+.3f} [{low:+.3f}, {high:+.3f}]"
        )
    return 0
