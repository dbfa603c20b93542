"""`bridle classify CLASSIFIER_DIR FILES`: the classes of files, with their probabilities."""

from __future__ import annotations

import argparse
import json
import sys

HELP = "tell the classes of files with a classifier that `bridle finetune` left"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument(
        "classifier", metavar="CLASSIFIER_DIR", help="classifier folder, such as runs/finetune-audio-mini/classifier"
    )
    parser.add_argument("inputs", metavar="FILE", nargs="+", help="files of the classifier's modality; - is stdin")
    parser.add_argument("--top", type=_count, default=5, metavar="N", help="classes to print, likeliest first (5)")
    parser.add_argument(
        "--clips",
        type=_count,
        default=1,
        metavar="N",
        help="films: so many evenly spaced clips, instead of all windows",
    )
    parser.add_argument(
        "--crops", type=int, default=1, choices=[1, 3], help="films: the centre, or both ends of the longer side too"
    )
    parser.add_argument("--device", default="cpu", help="where it runs: cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")


def run(args: argparse.Namespace) -> int:
    """Prints one JSON line a file; one that cannot be read costs a line on stderr, and the exit code is 1 at the end.

    Raises:
        RecipeError: the device is unknown or not there; clips or crops of what is no film.
        ModelError: not a classifier folder.
    """
    from bridle.classifier import load_classifier
    from bridle.commands.options import device_of
    from bridle.evaluation.classification import views
    from bridle.modalities.clip import ClipError
    from bridle.model import read_source
    from bridle.settings import RecipeError

    classifier = load_classifier(args.classifier, device_of(args.device), args.dtype)
    modality = classifier.modality
    if args.clips * args.crops > 1 and not hasattr(modality, "view"):
        raise RecipeError(f"--clips, --crops: for films, and {args.classifier} is a classifier of {modality.name}")
    failed = False
    for name in args.inputs:
        try:
            source = sys.stdin.buffer.read() if name == "-" else read_source(name, modality.limits.max_bytes)
            found = classifier.mean(views(modality, source, args.clips, args.crops))
        except (ClipError, OSError) as error:
            print(f"bridle classify: {name}: {' '.join(str(error).split())}", file=sys.stderr)
            failed = True
            continue
        best = found.topk(min(args.top, len(found)))
        classes = [
            {"class": classifier.config.classes[index], "probability": round(value, 6)}
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        print(json.dumps({"file": name, "model": classifier.config.name, "classes": classes}), flush=True)
    return int(failed)


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number, 1 or more")
    return int(text)
