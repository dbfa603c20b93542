"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import json

import torch

from bridle.config import Recipe, load_recipe
from bridle.model_folder import DTYPES, BridleModel, load
from bridle.settings import RecipeError


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL_DIR, --device and --dtype."""
    parser.add_argument(
        "model", metavar="MODEL_DIR", help="model folder, such as runs/audio-mini/models/final, or builtin:audio"
    )
    parser.add_argument("--device", default="cpu", help="where the model runs: cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument(
        "--dtype", default="float32", choices=list(DTYPES), help="of the transformer; codes are always found in float32"
    )


def load_model(args: argparse.Namespace) -> BridleModel:
    """The model that `add_model_arguments` asked for.

    Raises:
        RecipeError: the device is unknown or not there.
        ModelError: not a model folder; see `bridle.load`.
    """
    return load(args.model, device_of(args.device), args.dtype)


def device_of(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        RecipeError: it is unknown or not there.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        count = torch.cuda.device_count()
        found = "cpu" if not count else f"cpu, cuda, cuda:0 to cuda:{count - 1}"
        raise RecipeError(f"--device {name}: not on this machine; it has {found}") from None
    return device


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what says which training step: RECIPE, overrides, --deepspeed_config and --data."""
    name = parser.prog.rpartition(" ")[2]
    parser.usage = f"bridle {name} RECIPE [dotted.key=value ...] [options]"
    parser.add_argument("recipe", metavar="RECIPE", help="shipped name or YAML file")
    parser.add_argument(
        "--deepspeed_config", default="builtin:zero2", metavar="FILE|builtin:NAME", help="(default: builtin:zero2)"
    )
    parser.add_argument(
        "--data", nargs="+", metavar="SHARDS", help="(default: the recipe's, else the sample that ships)"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="dotted.key=value", help="settings of the recipe to change"
    )


def step_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that `add_step_arguments` asked for.

    Raises:
        RecipeError: unknown, or settings that cannot be.
    """
    data = ["data.sources=null", f"data.shards={json.dumps(args.data)}"] if args.data else []
    return load_recipe(args.recipe, [*data, *args.overrides])
