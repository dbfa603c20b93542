"""What a run folder holds, read without training: its recipe, and its finished phases as models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from bridle.config import ColdStartPhase, Recipe, RunSettings, refuse_finetuning
from bridle.evaluation.card_figures import heldout_figures, probe_figures
from bridle.modalities import build_modality
from bridle.model_folder import save_model
from bridle.recipe_files import RUN_RECIPE, read_run_recipe_file
from bridle.settings import JudgedByContent, MayChange, RecipeError, marked, parse_settings
from bridle.training.checkpoints import PhaseCheckpoints, read_position, read_tensors
from bridle.training.manifest import check_folder
from bridle.training.schedule import MAKES_ENCODER, iteration_of, tokenizer_phase_of

SettingsT = TypeVar("SettingsT", bound=RunSettings)


def export_model(
    run: Path, phase_index: int, target: Path, name: str | None = None, licence: str | None = None
) -> None:
    """Writes the model that phase `phase_index` of a run ended with, and the tokenizer that taught it.

    `name`: of the model; by default that of the run with the iteration.

    licence: of the weights, for its card.

    Raises:
        CheckpointError: the phase is not finished, or its files are damaged.
    """
    recipe = read_run_recipe(run)
    modality = build_modality(recipe.modality, recipe.clip)
    source = tokenizer_phase_of(recipe, phase_index)
    encoder = PhaseCheckpoints(run, phase_index, recipe.phases[phase_index].kind).finished
    tokenizer = PhaseCheckpoints(run, source, recipe.phases[source].kind).finished
    iteration = iteration_of(recipe, phase_index)
    for folder in (encoder, tokenizer):
        check_folder(folder)
    position = read_position(encoder)
    save_model(
        target,
        name=name or f"{run.resolve().name}-iteration-{iteration}",
        modality=recipe.modality,
        clip=modality.settings.model_dump(mode="json"),
        encoder_settings=recipe.model.encoder,
        quantizer_settings=recipe.model.quantizer,
        encoder=read_tensors(encoder / "encoder.safetensors"),
        tokenizer=read_tensors(tokenizer / "tokenizer.safetensors"),
        learned=not isinstance(recipe.phases[source], ColdStartPhase),
        trained={
            "iteration": iteration,
            "steps": position.step,
            "clips": position.samples,
            "run": run.resolve().name,
            "data": [pattern for source in recipe.data.mixture for pattern in source.shards],
            "figures": heldout_figures(run, phase_index),
            "probe": probe_figures(run),
        },
        licence=licence,
    )


def finished_encoder_phases(run: Path) -> list[int]:
    """Indexes of a run's finished phases that end with a model."""
    recipe = read_run_recipe(run)
    return [
        index
        for index, phase in enumerate(recipe.phases)
        if isinstance(phase, MAKES_ENCODER) and PhaseCheckpoints(run, index, phase.kind).is_finished()
    ]


def read_run_recipe(run: Path) -> Recipe:
    """The recipe a pretraining run's folder was started with.

    Raises:
        RecipeError: as `recipe_of`.
    """
    refuse_finetuning(read_run_recipe_file(run)[0], str(run))
    return recipe_of(run, Recipe)


def recipe_of(run: Path, kind: type[SettingsT]) -> SettingsT:
    """The recipe a run folder was started with, pretraining's or another kind of run's.

    Raises:
        RecipeError: no run there, or one of another kind.
    """
    return parse_settings(kind, read_run_recipe_file(run)[0], str(run / RUN_RECIPE))


def check_same_recipe(run: Path, recipe: RunSettings, *, other_names: bool = False, any_data: bool = False) -> None:
    """Refuses to go on with other science than the run began with.

    other_names: shards may be named otherwise, as their content is compared elsewhere; any_data: and weigh otherwise.

    Raises:
        RecipeError: names the first settings that differ.
    """
    if not (run / RUN_RECIPE).is_file():
        return
    before = flatten(recipe_of(run, type(recipe)).model_dump(mode="json"))
    now = flatten(recipe.model_dump(mode="json"))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    weighed = {key for key in before.keys() & now.keys() if key.endswith(".weight")}
    names = tuple(marked(type(recipe), JudgedByContent))
    data = {key for key in changed if key.startswith(names) and (any_data or (other_names and key not in weighed))}
    changed = [key for key in changed if key not in marked(type(recipe), MayChange) | data]
    if changed:
        shown = "; ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in changed[:3])
        raise RecipeError(
            f"{run} was begun with another recipe ({shown}); use the same settings, or another --run folder"
        )


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``{"train.batch_size": 16, …}``."""
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    else:
        return {prefix: tree}
    return {
        key: leaf
        for name, value in items
        for key, leaf in flatten(value, f"{prefix}.{name}" if prefix else str(name)).items()
    }
