"""`clip.mean: auto` and `clip.std: auto`: the figures that `bridle shards stats` wrote beside the shards' indexes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from bridle.config import RunSettings
from bridle.data.shards import open_shards
from bridle.errors import MistakeError
from bridle.evaluation.data_statistics import read
from bridle.modalities import build_modality
from bridle.settings import RecipeError
from bridle.training.ranks import Ranks
from bridle.training.run_folder import recipe_of

log = logging.getLogger("bridle")
SettingsT = TypeVar("SettingsT", bound=RunSettings)
AUTO = "auto"
FIGURES = ("mean", "std")
FAR_MEAN = 1.0
"""Deviations by which a batch's mean may lie off before a warning."""
FAR_STD = 1.6
"""Factor by which a batch's deviation may be off before a warning."""


def with_figures(recipe: SettingsT, run: Path, ranks: Ranks) -> SettingsT:
    """The recipe with numbers where its clip section says auto; of a run that has begun, those it began with.

    Rank 0 reads them, so that no two ranks have others.

    Raises:
        RecipeError: a shard has no statistics.
    """
    wanted = [name for name in FIGURES if recipe.clip.get(name) == AUTO]
    if not wanted:
        return recipe
    found: dict[str, Any] = ranks.on_first(lambda: _figures(recipe, run, wanted))
    if ranks.first:
        log.info("clip: %s", ", ".join(f"{name} {value}" for name, value in found.items()))
    return recipe.model_copy(update={"clip": recipe.clip | found})


def _figures(recipe: RunSettings, run: Path, wanted: list[str]) -> dict[str, Any]:
    if (run / "recipe.yaml").is_file():
        begun = build_modality(recipe.modality, recipe_of(run, type(recipe)).clip).settings.model_dump()
        return {name: begun[name] for name in wanted}
    settings = {name: value for name, value in recipe.clip.items() if name not in wanted}
    modality = build_modality(recipe.modality, settings)
    data = recipe.data
    sets = [
        (
            open_shards(source.shards, extensions=modality.extensions, cache=data.cache, cache_gb=data.cache_gb),
            source.weight,
        )
        for source in data.mixture
    ]
    try:
        found = read(sets, modality)
    except MistakeError as error:
        raise RecipeError(f"clip.{wanted[0]}: auto: {error}") from None
    figures = {"mean": found.mean, "std": found.std}
    return {name: figures[name] if len(figures[name]) > 1 else figures[name][0] for name in wanted}


def warn_of_other_statistics(values: Tensor, content: Tensor, deviation: float) -> None:
    """Warns when a batch is not what the recipe's mean and std make of the data they are of.

    values: normalised patches ``[B, N, P]``; content: bool ``[B, N]``; deviation: of normalised values, if they fit.
    """
    found = values[content].double()
    mean, std = float(found.mean()) / deviation, float(found.std()) / deviation
    if abs(mean) > FAR_MEAN or not 1 / FAR_STD < std < FAR_STD:
        log.warning(
            "the first batch's values do not fit clip.mean and clip.std: mean %.2f deviations off, deviation %.2f times"
            " the expected; run `bridle shards stats` on your shards and set clip.mean and clip.std to auto",
            mean, std,
        )  # fmt: skip
