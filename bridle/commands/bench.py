"""`bridle bench RECIPE`: how fast the real training step is here, and what share of the machine's rate it reaches."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bridle.commands.options import add_step_arguments, step_recipe

if TYPE_CHECKING:
    from bridle.measuring.bench import Figures
    from bridle.measuring.workbench import Workbench

HELP = "measure the training step of a recipe on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add_step_arguments(parser)
    parser.add_argument("--micro-batch", type=int, metavar="N", help="clips per rank and forward pass (the recipe's)")
    parser.add_argument(
        "--accumulation", type=int, default=1, metavar="N", help="forward passes per optimizer step (default: 1)"
    )
    parser.add_argument(
        "--phase", type=int, action="append", metavar="INDEX", help="only this one, from 0; may be given again (all)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="medians are of so many (default: 5)")
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="steps of a round (default: 1)")
    parser.add_argument("--no-reference", action="store_true", help="leave ViTMAE's step out")
    parser.add_argument("--no-kernels", action="store_true", help="leave the profile out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")


def run(args: argparse.Namespace) -> int:
    """Prints a table for each phase.

    Raises:
        RecipeError: no such recipe or phase, settings that cannot be.
        ShardError: shards that cannot be read.
    """
    logging.getLogger("bridle").setLevel(logging.WARNING)
    from bridle.files import write_json
    from bridle.measuring.bench import bench_phase
    from bridle.measuring.workbench import Workbench, trained_phases, with_batch
    from bridle.settings import RecipeError
    from bridle.training.engine import read_ds_config
    from bridle.training.rendezvous import join, leave

    for name in ("micro_batch", "accumulation", "rounds", "steps"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise RecipeError(f"--{name.replace('_', '-')} {number}: expected at least 1")
    recipe, config = step_recipe(args), read_ds_config(args.deepspeed_config)
    trained = trained_phases(recipe)
    if unknown := set(args.phase or []) - set(trained):
        raise RecipeError(f"--phase {min(unknown)}: {args.recipe} trains in phases {trained}")
    ranks = join(recipe.train.collective_timeout)
    try:
        with tempfile.TemporaryDirectory() as folder:
            recipe = with_batch(recipe, args.micro_batch, args.accumulation, ranks.world)
            bench = Workbench(recipe, config, args.deepspeed_config, ranks, Path(folder))
            if ranks.first:
                print(_heading(args, bench), flush=True)
            found = []
            for index in args.phase or trained:
                found.append(
                    bench_phase(bench, index, args.rounds, args.steps, not args.no_reference, not args.no_kernels)
                )
                if ranks.first:
                    print(_table(found[-1]), flush=True)
        if args.json and ranks.first:
            about = {"recipe": args.recipe, "device": str(ranks.device), "ranks": ranks.world, "bf16": bench.bf16}
            write_json(args.json, about | {"phases": [dataclasses.asdict(figures) for figures in found]})
    finally:
        leave()
    return 0


def _heading(args: argparse.Namespace, bench: Workbench) -> str:
    import torch

    ranks, train = bench.ranks, bench.recipe.train
    device = (
        torch.cuda.get_device_name(ranks.device)
        if ranks.device.type == "cuda"
        else (f"CPU, {torch.get_num_threads()} threads")
    )
    return (
        f"{args.recipe}, {args.deepspeed_config}, {'bf16' if bench.bf16 else 'fp32'}, {device}, ranks: {ranks.world},"
        f" micro-batch {train.micro_batch_size}, {train.batch_size} clips a step"
    )


def _table(found: Figures) -> str:
    parts = "  ".join(f"{name.replace('_', ' ')} {100 * share:.1f}%" for name, share in found.parts.items())
    rows = [
        ("clips/s, all ranks", f"{found.clips_per_second:.2f}"),
        ("step", f"{found.step_seconds:.3f} s: {parts}"),
        ("FLOP a clip", f"{found.flops_per_clip / 1e9:.1f} G, attention included"),
        ("achieved", f"{found.achieved / 1e12:.3f} TFLOP/s, {found.share:.2f} of the best product's"
         f" {found.best_product / 1e12:.3f}"),
        ("MFU", "no stated rate is known for this device" if found.mfu is None else f"{found.mfu:.3f}"),
        ("memory", f"{found.memory / 2**30:.2f} GiB"),
        ("padding", f"{100 * found.padding:.1f}% of positions"),
    ]  # fmt: skip
    if found.busy is not None:
        rows.append(("GPU computes", f"{100 * found.busy:.0f}% of the step, by its profile"))
    if found.reference is not None:
        ratio = found.share / found.reference
        rows.append(("ViTMAE", f"{found.reference:.2f} of the best product; this step reaches {ratio:.2f} times that"))
    lines = [f"phase {found.phase}", *(f"  {name:<20}{text}" for name, text in rows)]
    lines += [f"  {100 * share:5.1f}%  {name[:90]}" for name, share in found.kernels]
    return "\n".join(lines)
