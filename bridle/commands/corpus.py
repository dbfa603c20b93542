"""`bridle corpus CODES`: what a tokenized corpus holds, before a language model is trained on it."""

from __future__ import annotations

import argparse
from pathlib import Path

from bridle.commands.local_path import local_path

HELP = "write a page and JSON about a tokenized corpus: entropies, duplicates, runs, n-grams"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("corpus", metavar="CODES", help="folder or s3:// address that `bridle tokenize --out` wrote")
    parser.add_argument("--out", metavar="DIR", type=local_path, default=Path(), help="for corpus.html and corpus.json")


def run(args: argparse.Namespace) -> int:
    """Writes both and prints the figures that matter most.

    Raises:
        ValueError, OSError: see `bridle.evaluation.corpus.measure`.
    """
    from bridle.evaluation.corpus import figures, measure
    from bridle.evaluation.corpus_page import corpus_page
    from bridle.files import whole_file, write_json
    from bridle.tokens.corpus import Corpus

    corpus = Corpus(args.corpus)
    found = figures(corpus, measure(corpus))
    write_json(args.out / "corpus.json", found)
    with whole_file(args.out / "corpus.html") as aside:
        aside.write_text(corpus_page(args.corpus.rstrip("/").rsplit("/", 1)[-1], found), encoding="utf-8")
    for row in found["codebooks"]:
        print(
            f"codebook {row['codebook']}: {row['used']} of {row['size']} codes, {row['entropy_bits']:.3f} bits, "
            f"{row['entropy_bits_given_position']:.3f} given the position"
        )
    time = f", {found['hours']:.2f} h, {found['bits_per_second']:.0f} bits/s" if found["hours"] is not None else ""
    print(f"{found['clips']} clips{time}; {found['duplicate_clips']} duplicates")
    print(f"written: {args.out / 'corpus.html'}, {args.out / 'corpus.json'}")
    return 0
