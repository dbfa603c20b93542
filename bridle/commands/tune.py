"""`bridle tune RECIPE`: finds the micro-batch for this machine."""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bridle.commands.options import add_step_arguments, step_recipe

if TYPE_CHECKING:
    from bridle.measuring.tune import Trial

HELP = "find the largest micro-batch that fits this machine, and the fastest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add_step_arguments(parser)
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="ranks of the run to come, which share its batch (default: 1)"
    )
    parser.add_argument("--least", type=int, default=1, metavar="N", help="smallest micro-batch to try (default: 1)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="steps that count at each size (default: 3)")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="on a CPU: what the process may take (default: what is free)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the override line here too")


def run(args: argparse.Namespace) -> int:
    """Prints a row for each size that divides a rank's share of the batch, and the override that gives the fastest.

    Raises:
        RecipeError: no such recipe, settings that cannot be, not one size fits.
        ShardError: shards that cannot be read.
    """
    logging.getLogger("bridle").setLevel(logging.WARNING)
    from bridle.files import whole_file
    from bridle.measuring.tune import host_limit, lengths, sizes, trials
    from bridle.measuring.workbench import trained_phases
    from bridle.settings import RecipeError
    from bridle.training.engine import read_ds_config, split_batch
    from bridle.training.rendezvous import join, leave

    for name in ("ranks", "least", "rounds"):
        if getattr(args, name) < 1:
            raise RecipeError(f"--{name} {getattr(args, name)}: expected at least 1")
    recipe, config = step_recipe(args), read_ds_config(args.deepspeed_config)
    split_batch(recipe.train.model_copy(update={"micro_batch_size": None}), args.ranks)
    candidates = sizes(recipe, args.ranks, args.least)
    if not candidates:
        clips = recipe.train.batch_size // args.ranks
        raise RecipeError(f"--least {args.least}: a rank has {clips} clips a step; give a smaller one")
    ranks = join(recipe.train.collective_timeout)
    try:
        if ranks.world > 1:
            raise RecipeError("bridle tune runs as one process; say with --ranks how many the run will have")
        limit = host_limit() if args.memory is None else args.memory * 2**30
        phases = [f"{index} {recipe.phases[index].kind}" for index in trained_phases(recipe)]
        print(
            "micro-batch  " + "  ".join(f"{name:>12}" for name in phases) + "        memory  (clips/s of each phase)",
            flush=True,
        )
        tried = []
        with tempfile.TemporaryDirectory() as folder:
            for trial in trials(
                recipe, config, args.deepspeed_config, ranks, Path(folder), candidates, args.rounds, limit
            ):
                tried.append(trial)
                print(_row(trial, len(phases)), flush=True)
    finally:
        leave()
    fitting = [trial for trial in tried if not trial.fault]
    if not fitting:
        raise RecipeError(f"not even a micro-batch of {candidates[0]} fits: {tried[0].fault}")
    weights = lengths(recipe)
    fastest = min(fitting, key=lambda trial: trial.recipe_seconds(weights))
    line = f"train.micro_batch_size={fastest.micro_batch}"
    print(f"largest that fits: {fitting[-1].micro_batch}{'' if tried[-1].fault else ', the whole batch'}")
    print(f"fastest over the recipe: {fastest.micro_batch}\n{line}")
    if args.out:
        with whole_file(args.out) as aside:
            aside.write_text(line + "\n", encoding="utf-8")
    return 0


def _row(trial: Trial, phases: int) -> str:
    rates = [f"{rate:>12.2f}" for rate in trial.clips_per_second] or [f"{'-':>12}"] * phases
    memory = f"{trial.memory / 2**30:>8.2f} GiB"
    return f"{trial.micro_batch:>11}  {'  '.join(rates)}  {memory}  {trial.fault}".rstrip()
