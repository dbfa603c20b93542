"""`bridle pack CODES --length L --out DIR`: documents to sequences of one length."""

from __future__ import annotations

import argparse

HELP = "pack tokenized documents into sequences of one length, boundaries kept"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("corpus", metavar="CODES", help="folder or s3:// address that `bridle tokenize --out` wrote")
    parser.add_argument("--length", metavar="L", type=int, required=True, help="ids of a sequence")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder or s3:// address to write Parquet files to")


def run(args: argparse.Namespace) -> int:
    """Packs, and says how full the sequences are.

    Raises:
        RecipeError, ValueError, OSError: see `pack_corpus`.
    """
    from bridle.tokens.packing import pack_corpus

    total = pack_corpus(args.corpus, args.out, args.length)["summary"]
    print(
        f"{args.out}: {total['documents']} documents in {total['rows']} sequences of {args.length} ids, "
        f"{total['filled']:.1%} filled"
    )
    return 0
