"""`bridle report RUN`: a run, finished or still going, as one HTML page."""

from __future__ import annotations

import argparse
import sys

from bridle.commands.local_path import local_path

HELP = "write a run's curves, codebook usage and a few clips with their codes as one HTML page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("run", metavar="RUN", help="run folder, such as runs/audio-mini or s3://BUCKET/PREFIX")
    parser.add_argument("--out", metavar="FILE", type=local_path, help="where to write it (default: RUN/report.html)")


def run(args: argparse.Namespace) -> int:
    """Writes the page, whole or not at all, and says what could not be shown.

    Raises:
        RecipeError: no run there.
        OSError: the page cannot be written.
    """
    from bridle.evaluation.finetune_page import is_tuned, tuned_page
    from bridle.evaluation.report import build_report, headline, page
    from bridle.evaluation.run_folder import read_run
    from bridle.files import whole_file
    from bridle.remote.access import is_url
    from bridle.remote.store import RemoteStore
    from bridle.training.remote_run import is_reported, on_disk

    with on_disk(args.run, is_reported) as run:
        if is_tuned(run):
            html, said, notes = tuned_page(run)
        else:
            report = build_report(read_run(run))
            html, said, notes = page(report), headline(report), report.notes
        target = args.out or run / "report.html"
        with whole_file(target) as aside:
            aside.write_text(html, encoding="utf-8")
        if args.out is None and is_url(args.run):
            RemoteStore(args.run).put(target, "report.html")
    for note in notes:
        print(f"bridle report: {note}", file=sys.stderr)
    print(said, file=sys.stderr)
    print(args.out or f"{args.run.rstrip('/')}/report.html")
    return 0
