"""`bridle export RUN MODEL_DIR`: a run's encoder and tokenizer as a model folder."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from bridle.commands.local_path import local_path
from bridle.errors import MistakeError

HELP = "write the model folder of a run's finished iteration"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("run", metavar="RUN", help="run folder, such as runs/audio-mini or s3://BUCKET/PREFIX")
    parser.add_argument(
        "target", metavar="MODEL_DIR", type=local_path, help="folder to write; an older model there is replaced"
    )
    parser.add_argument("--licence", metavar="NAME", help="of the weights, for the model's card, e.g. cc-by-4.0")
    parser.add_argument(
        "--iteration", type=int, metavar="N", help="which iteration, from 1 (default: the newest finished)"
    )
    parser.add_argument(
        "--name", type=_name, metavar="NAME", help="what the service calls the model (default: RUN-iteration-N)"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the folder and says what is in it.

    Raises:
        RecipeError: no run there, or an iteration that the recipe does not have.
        ValueError: nothing to export yet, or something that is no model stands in the way.
    """
    from bridle.training.remote_run import is_result, on_disk
    from bridle.training.run_folder import export_model, finished_encoder_phases, read_run_recipe
    from bridle.training.schedule import MAKES_ENCODER

    _refuse_to_overwrite(args.target)
    with on_disk(args.run, is_result) as run:
        phases = [i for i, phase in enumerate(read_run_recipe(run).phases) if isinstance(phase, MAKES_ENCODER)]
        chosen = _choose(args.run, args.iteration, phases, finished_encoder_phases(run))
        export_model(run, chosen, args.target, args.name, args.licence)
    named = f" as '{args.name}'" if args.name else ""
    print(f"iteration {phases.index(chosen) + 1} of {args.run} written to {args.target}{named}")
    return 0


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        raise argparse.ArgumentTypeError(
            f"'{text}' is no name for a model: give up to 100 letters, digits, '.', '_' and '-', the first no sign"
        )
    return text


def _choose(run: str, iteration: int | None, phases: list[int], finished: list[int]) -> int:
    """Index of the phase to export, which ends with an encoder."""
    from bridle.settings import RecipeError

    if iteration is not None and not 1 <= iteration <= len(phases):
        raise RecipeError(f"--iteration {iteration}: {run} has iterations 1 to {len(phases)}")
    if not finished:
        raise MistakeError(f"{run}: no iteration is finished yet; let the run reach the end of its first encoder phase")
    if iteration is None:
        return finished[-1]
    if phases[iteration - 1] not in finished:
        done = ", ".join(str(phases.index(index) + 1) for index in finished)
        raise MistakeError(f"{run}: iteration {iteration} is not finished yet; finished: {done}")
    return phases[iteration - 1]


def _refuse_to_overwrite(target: Path) -> None:
    from bridle.model_folder import ModelError, read_config

    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        try:
            read_config(target)
        except (ModelError, OSError):
            raise MistakeError(
                f"{target}: exists and is no model folder; nothing was written, choose another path"
            ) from None
