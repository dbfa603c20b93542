"""Pretrains: walks the recipe's interleaved schedule and leaves a servable model.

deepspeed bridle/pretrain.py --deepspeed_config ds_configs/zero2.json [--recipe NAME|FILE.yaml] [--data SHARDS ...]
                             [--run DIR|URL] [--from RUN[:PHASE[:STEP]]] [dotted.key=value ...]
"""

from __future__ import annotations

import argparse
import atexit
import glob
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bridle.training.attended import attended
from bridle.training.foreign_warnings import ForeignWarnings
from bridle.training.stopping import StopRequest

if TYPE_CHECKING:
    from bridle.config import DataSource

log = logging.getLogger("bridle")
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z0-9_]+)*=")
"""What follows ``--data A B`` and looks like this is an override, not a third pattern."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="pretrain.py", description=__doc__.split("\n\n", 1)[0])
    parser.add_argument(
        "--deepspeed_config",
        required=True,
        metavar="FILE|builtin:NAME",
        help="DeepSpeed's JSON, e.g. ds_configs/zero2.json, or one that ships with the package, e.g. builtin:zero2",
    )
    parser.add_argument(
        "--recipe", default="audio-mini", metavar="NAME|FILE", help="shipped name or YAML file (default: audio-mini)"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="SHARDS[@WEIGHT]",
        help="paths, globs or braces; local, URLs (s3://, gs://, …), pipe:; several are mixed by their weights",
    )
    parser.add_argument("--heldout", nargs="+", metavar="SHARDS", help="the same, for evaluation between phases")
    parser.add_argument(
        "--run", metavar="DIR|URL", help="run folder, or s3://BUCKET/PREFIX; resumes from it (default: runs/RECIPE)"
    )
    parser.add_argument(
        "--from",
        dest="origin",
        metavar="RUN[:PHASE[:STEP]]",
        help="begin a new run with what another had learned by the end of a phase, or by a checkpoint",
    )
    parser.add_argument(
        "--allow-new-data", action="store_true", help="go on with a run although its shards have changed (docs/data.md)"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="dotted.key=value", help="settings of the recipe to change"
    )
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when the run is done, 75 when it was asked to stop, 2 on a wrong argument or a run folder in use, 1 on
    failure; see docs/training.md, "Exit codes"."""
    return begin("pretrain", __file__, lambda stop, foreign: pretrain(parse(arguments), stop, foreign))


def begin(program: str, script: str, job: Callable[[StopRequest, ForeignWarnings], int]) -> int:
    """Listens for signals, then runs `job`; a mistake of the user becomes one line and an exit code.

    script: the path of the file that was started.
    """
    # A script's folder stands first on the path, where bridle/ray.py would be taken for Ray by whoever imports that.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(script).resolve().parent]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    foreign = ForeignWarnings.divert()
    stop = StopRequest().listen()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost peer costs pages of C++ frames
    from bridle.cli import report_mistakes

    code = report_mistakes(program, lambda: job(stop, foreign))
    atexit.register(stop.over)
    return code


def pretrain(args: argparse.Namespace, stop: StopRequest, foreign: ForeignWarnings) -> int:
    """Reads the recipe and runs it."""
    from bridle.config import load_recipe
    from bridle.modalities import REGISTRY

    recipe = load_recipe(args.recipe, overrides(args))  # before the seconds that torch and DeepSpeed take to import
    from bridle.training.engine import read_ds_config
    from bridle.training.run import PretrainingRun

    if os.environ.get("RANK", "0") == "0" and not recipe.data.heldout:
        log.warning("%s", no_heldout(recipe.data.mixture))
    ds_config = read_ds_config(args.deepspeed_config)
    where = args.run or f"runs/{Path(args.recipe).stem}"
    make = partial(
        PretrainingRun, recipe, ds_config, args.deepspeed_config, allow_new_data=args.allow_new_data, origin=args.origin
    )
    loaders = ("bridle.data.stream", "bridle.training.clips", REGISTRY[recipe.modality].partition(":")[0])
    code = attended(
        "pretrain", where, recipe.train.collective_timeout, make, stop, foreign, loaders if recipe.data.workers else ()
    )
    if not code:
        log.info("done: %s/models/final", where)
    return code


def no_heldout(sources: Sequence[DataSource]) -> str:
    """What to say where a run has no held-out clips; names those that `shards build` has put beside its shards."""
    beside = dict.fromkeys(f"{Path(pattern).parent}/heldout/*.tar" for source in sources for pattern in source.shards)
    found = [f"'{path}'" for path in beside if glob.glob(path)]  # noqa: PTH207
    given = " ".join(found) or "SHARDS (`bridle shards build --heldout 0.05` makes some)"
    return f"no held-out clips, so nothing is evaluated and the report shows no clips: give --heldout {given}"


def overrides(args: argparse.Namespace) -> list[str]:
    """`dotted.key=value` overrides of the whole command line; --data without --heldout means no held-out clips.

    With a weight anywhere in --data each word is a source of its own, without one all words are one list of shards.

    Raises:
        RecipeError: a weight that is none.
    """
    from bridle.data.patterns import split_weight

    given = {"shards": args.data or [], "heldout": args.heldout or []}
    trailing = [word for words in given.values() for word in words if OVERRIDE.match(word)]
    given = {key: [word for word in words if not OVERRIDE.match(word)] for key, words in given.items()}
    data = [f"data.{key}={json.dumps(words)}" for key, words in given.items() if words]
    weighted = [split_weight(word) for word in given["shards"]]
    if any(weight is not None for _, weight in weighted):
        sources = [{"shards": [word], "weight": 1.0 if weight is None else weight} for word, weight in weighted]
        data += ["data.shards=null", f"data.sources={json.dumps(sources)}"]
    elif weighted:
        data.append("data.sources=null")
    if weighted and not given["heldout"]:
        data.append("data.heldout=null")
    return [*data, *trailing, *args.overrides]


if __name__ == "__main__":
    sys.exit(main())
