"""`bridle finetune MODEL_DIR SHARDS`: fine-tunes on this machine, one rank a GPU, and leaves a classifier folder."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bridle.finetune_arguments import add_run_arguments

HELP = "fine-tune a model's encoder on labelled shards, and leave a classifier"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("model", metavar="MODEL_DIR", help="model folder, such as runs/audio-mini/models/final")
    parser.add_argument(
        "shards",
        metavar="SHARDS|dotted.key=value",
        nargs="*",
        default=[],
        help="labelled tars (default: those of the recipe), and settings of the recipe to change",
    )
    add_run_arguments(parser)
    parser.add_argument("--folds", nargs="+", metavar="F", help="one run a fold, in RUN/fold-F, and figures of all")
    parser.add_argument(
        "--deepspeed_config", default="builtin:zero1", metavar="FILE|builtin:NAME", help="(default: builtin:zero1)"
    )
    parser.add_argument("--ranks", metavar="N", help="processes on this machine (one a GPU, or one)")


def run(args: argparse.Namespace) -> int:
    """Starts the ranks as `bridle launch --finetune` would; returns their exit code.

    Raises:
        RecipeError: a count that cannot be; folds and held-out shards.
        ModelError: no model folder.
    """
    from bridle.folder_config import read_config
    from bridle.hub import local_folder
    from bridle.settings import RecipeError

    config = read_config(local_folder(args.model))
    args.recipe = args.recipe or f"{config.modality}-mini"
    if not args.folds:
        return _start(args, args.run, args.fold)
    if args.heldout or args.fold:
        raise RecipeError("--folds: each fold is held out in its turn; leave --heldout and --fold out")
    above = (args.run or f"runs/finetune-{Path(args.recipe).stem}").rstrip("/")
    runs = [f"{above}/fold-{fold.replace('/', '-of-')}" for fold in args.folds]
    for fold, folder in zip(args.folds, runs, strict=True):
        if code := _start(args, folder, fold):
            return code
    print(_over_folds(runs))
    return 0


def _start(args: argparse.Namespace, folder: str | None, fold: str | None) -> int:
    from bridle.commands.launch import placement, start
    from bridle.ports import free_port

    arguments = ["--deepspeed_config", args.deepspeed_config, "--recipe", args.recipe, "--model", args.model]
    for flag, words in (("--data", args.shards), ("--heldout", args.heldout or [])):
        arguments += [flag, *words] if words else []
    for flag, word in (("--labels", args.labels), ("--fold", fold), ("--run", folder)):
        arguments += [flag, word] if word else []
    arguments += [flag for flag, on in (("--scratch", args.scratch), ("--allow-new-data", args.allow_new_data)) if on]
    here = argparse.Namespace(
        nnodes="1", node_rank="0", nproc_per_node=args.ranks, master_addr="127.0.0.1", master_port=str(free_port())
    )
    return start([sys.executable, "-m", "bridle.finetune", *arguments], placement(here, os.environ))


def _over_folds(runs: Sequence[str]) -> str:
    """Each fold's figures, and those of all files together, each scored by the run that did not see it."""
    from bridle.evaluation.classification import figures, joined, read_scores, spelled
    from bridle.training.remote_run import is_result, on_disk

    scored = []
    for run in runs:
        with on_disk(run, is_result) as folder:
            scored.append(read_scores(folder))
    every = joined(scored)
    rows = [(run.rpartition("/")[2], one) for run, one in zip(runs, scored, strict=True)] + [("all folds", every)]
    return "\n".join(
        f"{name}: {len(one.files)} files, "
        + ", ".join(
            f"{metric.replace('_', ' ')} {spelled(found)}"
            for metric, found in figures(one.scores, one.targets, one.several).items()
        )
        for name, one in rows
    )
