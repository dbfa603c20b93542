"""Arguments that several commands share."""

from __future__ import annotations

import argparse

import torch

from bridle.model_folder import DTYPES, BridleModel, load
from bridle.settings import RecipeError


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL_DIR, --device and --dtype."""
    parser.add_argument("model", metavar="MODEL_DIR", help="model folder, such as runs/audio-mini/models/final")
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
    return load(args.model, _device(args.device), args.dtype)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        count = torch.cuda.device_count()
        found = "cpu" if not count else f"cpu, cuda, cuda:0 to cuda:{count - 1}"
        raise RecipeError(f"--device {name}: not on this machine; it has {found}") from None
    return device
