"""`bridle tokenize MODEL_DIR INPUT ...`: files to codes, on the screen, one file each, or as a data set."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from bridle.commands import tokenize_bulk
from bridle.commands.options import add_model_arguments, load_model
from bridle.files import whole_file
from bridle.modalities.clip import ClipError
from bridle.model_folder import BridleModel, CodeStream
from bridle.remote.access import is_url
from bridle.settings import RecipeError

HELP = "turn files into codes: JSON lines on the screen, or with --out a data set for language models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add_model_arguments(parser)
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="*",
        default=[],
        help="files of the model's modality; with --out also folders, globs, shards",
    )
    parser.add_argument("--out", metavar="DIR", help="write a data set to this folder or s3:// address")
    parser.add_argument(
        "--format",
        choices=(*tokenize_bulk.FORMATS, "npz"),
        help="of the data set (default: parquet); npz writes DIR/NAME.npz for each input instead",
    )
    tokenize_bulk.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Tokenizes every input. Returns 1 if one of them could not be read, after the others are done.

    Raises:
        RecipeError: arguments that do not go together.
        ModelError: no model in MODEL_DIR.
        OSError: an answer cannot be written.
    """
    if args.out is not None and args.format != "npz":
        args.format = args.format or tokenize_bulk.FORMATS[0]
        return tokenize_bulk.run(args)
    from tqdm import tqdm

    args.inputs = [Path(name) for name in args.inputs]
    _check(args)
    model = load_model(args)
    failed = 0
    quiet = len(args.inputs) == 1 or (args.out is None and sys.stdout.isatty())
    for path in tqdm(
        args.inputs, unit="file", file=sys.stderr, disable=quiet, mininterval=0.5 if sys.stderr.isatty() else 10
    ):
        try:
            stream = model.tokenize(path)
        except (ClipError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
            if path.is_dir():
                reason = f"a folder; give its files ('{path}'/*), or make a data set of them all with --out DIR"
            tqdm.write(f"bridle tokenize: {path}: {reason.removeprefix(f'{path}: ')}", file=sys.stderr)
            failed += 1
            continue
        answer = describe(path, stream, model)
        if args.out is None:
            print(json.dumps(answer), flush=True)
        else:
            write(Path(args.out) / f"{path.name}.npz", answer)
    if failed and len(args.inputs) > 1:
        print(f"bridle tokenize: {failed} of {len(args.inputs)} files could not be tokenized", file=sys.stderr)
    return 1 if failed else 0


def describe(path: Path, stream: CodeStream, model: BridleModel) -> dict[str, Any]:
    """The fields of the service's answer, and `file`. `codes`: M lists of N integers, N row-major over `grid`."""
    answer: dict[str, Any] = {
        "file": str(path),
        "model": model.config.name,
        "modality": stream.modality,
        "grid": stream.grid,
        "codebooks": stream.codes.shape[1],
        "codebook_size": stream.codebook_size,
    }
    if stream.duration_s is not None:
        answer["duration_s"] = stream.duration_s
    return answer | {"codes": stream.codes.T.tolist()}


def write(target: Path, answer: dict[str, Any]) -> None:
    """One file, whole or not at all: `codes` int32 ``[M, N]``, and the other fields as JSON in `info`.

    Raises:
        OSError: a full disk and the like.
    """
    info = {key: value for key, value in answer.items() if key != "codes"}
    with whole_file(target) as aside, aside.open("wb") as file:
        np.savez_compressed(file, codes=np.array(answer["codes"], dtype=np.int32), info=np.array(json.dumps(info)))


def _check(args: argparse.Namespace) -> None:
    if not args.inputs:
        raise RecipeError("INPUT: give at least one file")
    if args.out is None and (args.format not in (None, "jsonl") or args.verify):
        raise RecipeError(
            f"{'--verify' if args.verify else f'--format {args.format}'} is for files; give --out DIR too"
        )
    if args.out is not None:
        if is_url(args.out) or args.verify:
            asked = "--verify" if args.verify else f"--out {args.out}"
            raise RecipeError(f"{asked}: not with --format npz, which writes files to a folder of this machine")
        double = [name for name, count in Counter(path.name for path in args.inputs).items() if count > 1]
        if double:
            raise RecipeError(
                f"--out: {len(double)} file names occur twice among the inputs, such as {double[0]};"
                " tokenize them into separate folders"
            )
