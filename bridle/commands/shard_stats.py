"""`bridle shards stats`."""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np

from bridle.settings import RecipeError

LENGTHS = (1.0, 2.0, 5.0, 10.0)
REPORT_SECONDS = 2.0
NAMED = 6


def add_arguments(action: argparse.ArgumentParser) -> None:
    """Beside SHARDS and the cache."""
    action.add_argument("--modality", metavar="NAME", help="audio, image or video (default: by the first sample)")
    action.add_argument(
        "--seconds", type=float, nargs="+", default=list(LENGTHS), metavar="S", help="clip lengths to tell padding at"
    )
    action.add_argument("--mel-bins", type=int, default=128, metavar="N", help="audio: as the recipe's (128)")
    action.add_argument("--again", action="store_true", help="measure shards that have statistics, too")


def run(args: argparse.Namespace) -> int:
    """Measures, writes one file beside each index, and prints what the whole set is like."""
    from bridle.data.shards import open_shards
    from bridle.evaluation.data_statistics import Statistics, measure, statistics_file
    from bridle.modalities import build_modality

    name = args.modality or _modality_of(args)
    modality = build_modality(name, {"mel_bins": args.mel_bins} if name == "audio" else {})
    shards = open_shards(args.shards, extensions=modality.extensions, cache=args.cache, cache_gb=args.cache_gb)
    began = last = time.monotonic()

    def progress(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= REPORT_SECONDS:
            rate = done / (now - began)
            print(
                f"{done}/{len(shards)} samples, {rate:.0f}/s, {(len(shards) - done) / rate:.0f} s left", file=sys.stderr
            )
            last = now

    found: Statistics = measure(shards, modality, progress, again=args.again)
    named = f" (`bridle shards check --modality {name}` names them)" if found.skipped else ""
    print(f"{len(shards.shards)} shards, {found.samples} samples of {name}, {found.skipped} cannot be decoded{named}")
    print("kinds:   " + _counted(found.kinds))
    if found.rates:
        print("rates:   " + _counted(found.rates))
    if found.seconds:
        quantiles = np.quantile(found.seconds, (0, 0.25, 0.5, 0.75, 1)).tolist()
        spread = " ".join(f"{value:.2f}" for value in quantiles)
        print(f"seconds: {sum(found.seconds):.0f} in all; least, quartiles and most {spread}")
        shares = ", ".join(f"{100 * (found.padding(length) or 0):.0f} % at {length:g} s" for length in args.seconds)
        print(f"padding: {shares}")
    print("mean:    " + " ".join(f"{value:.4f}" for value in found.mean))
    print("std:     " + " ".join(f"{value:.4f}" for value in found.std))
    print(f"written beside each index, such as {statistics_file(shards.shards[0])};", end=" ")
    print("a recipe takes mean and std from there with clip.mean: auto, clip.std: auto")
    return 0


def _counted(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    others = f", and {len(ordered) - NAMED} others" if len(ordered) > NAMED else ""
    return ", ".join(f"{name} {count}" for name, count in ordered[:NAMED]) + others


def _modality_of(args: argparse.Namespace) -> str:
    """The first one that recognises the first sample; films before sound, since a film has sound too."""
    from bridle.data.shards import open_shards
    from bridle.modalities import REGISTRY, modality_class

    order = sorted(REGISTRY, key=lambda name: name == "audio")
    known = [extension for name in order for extension in modality_class(name).extensions]
    head = open_shards(args.shards, extensions=known, cache=args.cache, cache_gb=args.cache_gb).data(0)[:4096]
    for name in order:
        if modality_class(name).recognises(head):
            return name
    raise RecipeError(f"{args.shards[0]}: the first sample is none of {', '.join(order)}; say which with --modality")
