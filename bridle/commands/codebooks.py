"""`bridle codebooks MODEL_DIR SHARDS`: how a data set uses a model's codebooks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from bridle.commands.local_path import local_path
from bridle.commands.options import add_model_arguments, load_model

HELP = "usage, entropy, dead codes, error and norms of a model's codebooks over a data set"
FACTS = ("name", "modality", "codebooks", "codebook_size", "dim", "sha256")
COLUMNS = ("codebook", "CUR", "UE (nats)", "ECU", "perplexity", "dead", "error", "mean norm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add_model_arguments(parser)
    parser.add_argument(
        "shards",
        metavar="SHARDS",
        nargs="+",
        help="tars: paths, globs, braces, s3://…, https://…, pipe:, builtin:audio",
    )
    parser.add_argument("--out", metavar="DIR", type=local_path, help="write codebooks.json and code_norms.png there")
    parser.add_argument("--workers", metavar="N", type=_count, default=1, help="decoding processes (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Prints a table; with --out, writes the figures and the picture too.

    Raises:
        RecipeError: a wrong argument.
        ModelError, ShardError: no model, no data.
        ValueError: nothing could be decoded.
    """
    from bridle.data.loaders import made_by_workers
    from bridle.data.shards import open_shards
    from bridle.evaluation.codebooks import Windows, code_norms, figures, measure
    from bridle.evaluation.pictures import norms_picture
    from bridle.files import whole_file, write_json

    model = load_model(args)
    shards = open_shards(args.shards, extensions=model.modality.extensions)
    windows = made_by_workers(Windows(shards, model.modality), args.workers)
    usage = measure(model, _with_progress(windows, len(shards)))
    norms = code_norms(model)
    rows = figures(usage, norms)
    print(_table(rows))
    print(
        f"{usage.positions} positions of {usage.files} files; {model.config.name}, codebooks of {norms.shape[1]} codes"
    )
    if args.out is not None:
        facts = {
            "model": {key: model.info[key] for key in FACTS},
            "shards": args.shards,
            "files": usage.files, "windows": usage.windows, "positions": usage.positions, "skipped": usage.skipped,
        }  # fmt: skip
        write_json(args.out / "codebooks.json", facts | {"per_codebook": rows})
        with whole_file(args.out / "code_norms.png") as aside:
            aside.write_bytes(norms_picture(norms, usage.counts, model.config.name))
        print(f"written: {args.out / 'codebooks.json'}, {args.out / 'code_norms.png'}")
    return 0


def _with_progress(windows: Iterable[Any], files: int) -> Iterator[Any]:
    """Passes windows on, shows how many files are begun, and names the ones that are skipped."""
    from tqdm import tqdm

    from bridle.evaluation.codebooks import Skipped

    with tqdm(total=files, unit="file", file=sys.stderr, mininterval=0.5 if sys.stderr.isatty() else 10) as bar:
        for item in windows:
            if isinstance(item, Skipped):
                tqdm.write(f"bridle codebooks: skipped {item.reason}", file=sys.stderr)
            if not item.begun if isinstance(item, Skipped) else item.first:
                bar.update()
            yield item


def _table(rows: list[dict[str, Any]]) -> str:
    keys = ("codebook", "cur", "ue", "ecu", "perplexity", "dead", "error", "norm_mean")
    formats = ("d", ".3f", ".3f", ".3f", ".1f", "d", ".4f", ".4f")
    cells = [[format(row[key], how) for key, how in zip(keys, formats, strict=True)] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(COLUMNS, *cells, strict=True)]
    lines = [COLUMNS, *cells]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"found {text}, expected a number of processes, 0 or more")
    return int(text)
