"""Fine-tunes a model folder's encoder on labelled shards and leaves a classifier folder.

deepspeed bridle/finetune.py --deepspeed_config ds_configs/zero2.json --recipe NAME|FILE.yaml --model MODEL_FOLDER
                             [--scratch] [--data SHARDS ...] [--heldout SHARDS ...] [--fold F] [--run DIR|URL] [k=v ...]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bridle.finetune_arguments import add_run_arguments
from bridle.pretrain import begin, overrides
from bridle.training.attended import attended
from bridle.training.foreign_warnings import ForeignWarnings
from bridle.training.stopping import StopRequest

log = logging.getLogger("bridle")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="finetune.py", description=__doc__.split("\n\n", 1)[0])
    parser.add_argument(
        "--deepspeed_config",
        required=True,
        metavar="FILE|builtin:NAME",
        help="DeepSpeed's JSON, e.g. ds_configs/zero2.json, or one that ships with the package, e.g. builtin:zero2",
    )
    parser.add_argument("--model", metavar="MODEL_DIR", help="model folder to begin with, or OWNER/NAME of the hub")
    add_run_arguments(parser)
    parser.set_defaults(recipe="audio-mini")
    parser.add_argument("--data", nargs="+", metavar="SHARDS", help="labelled shards to learn from")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="dotted.key=value", help="settings of the recipe to change"
    )
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes as pretraining's; see docs/training.md, "Exit codes"."""
    return begin("finetune", __file__, lambda stop, foreign: finetune(parse(arguments), stop, foreign))


def finetune(args: argparse.Namespace, stop: StopRequest, foreign: ForeignWarnings) -> int:
    """Reads the recipe and runs it."""
    from bridle.finetune_recipe import load_finetune_recipe
    from bridle.modalities import REGISTRY

    recipe = load_finetune_recipe(args.recipe, [*_settings(args), *overrides(args)])
    from bridle.training.engine import read_ds_config
    from bridle.training.finetune_run import FinetuneRun

    if os.environ.get("RANK", "0") == "0" and not recipe.data.heldout and recipe.fold is None:
        log.warning("no held-out files, so nothing says how good the classifier is: give --heldout SHARDS or --fold F")
    where = args.run or f"runs/finetune-{Path(args.recipe).stem}"
    config = read_ds_config(args.deepspeed_config)
    make = partial(
        FinetuneRun, recipe, config, args.deepspeed_config, model=args.model, scratch=args.scratch,
        allow_new_data=args.allow_new_data,
    )  # fmt: skip
    loaders = (
        "bridle.data.stream", "bridle.training.labelled", "bridle.training.heldout_scores",
        REGISTRY[recipe.modality].partition(":")[0],
    )  # fmt: skip
    patience = recipe.train.collective_timeout
    code = attended("finetune", where, patience, make, stop, foreign, loaders if recipe.data.workers else ())
    if not code:
        log.info("done: %s/classifier", where)
    return code


def _settings(args: argparse.Namespace) -> list[str]:
    """The flags that stand for settings of the recipe."""
    given = [f"labels={json.dumps(args.labels)}"] if args.labels else []
    if args.fold:
        given += [f"fold={json.dumps(args.fold)}", "data.heldout=null"]
    return given


if __name__ == "__main__":
    sys.exit(main())
