"""`bridle classify CLASSIFIER_DIR FILES`: the classes of files, with their probabilities."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HELP = "tell the classes of files with a classifier that `bridle finetune` left"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument(
        "classifier", metavar="CLASSIFIER_DIR", help="classifier folder, such as runs/finetune-audio-mini/classifier"
    )
    parser.add_argument("inputs", metavar="FILE", nargs="+", help="files of the classifier's modality; - is stdin")
    parser.add_argument("--top", type=_count, default=5, metavar="N", help="classes to print, likeliest first (5)")
    parser.add_argument("--device", default="cpu", help="where it runs: cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")


def run(args: argparse.Namespace) -> int:
    """Prints one JSON line a file; one that cannot be read costs a line on stderr, and the exit code is 1 at the end.

    Raises:
        RecipeError: the device is unknown or not there.
        ModelError: not a classifier folder.
    """
    from bridle.classifier import load_classifier
    from bridle.commands.options import device_of
    from bridle.modalities.clip import ClipError

    classifier = load_classifier(args.classifier, device_of(args.device), args.dtype)
    failed = False
    for name in args.inputs:
        try:
            found = classifier.classify(sys.stdin.buffer.read() if name == "-" else Path(name))
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
