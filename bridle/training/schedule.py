"""Which phase of a recipe gets what from which: pure functions of the list of phases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridle.config import ColdStartPhase, EncoderPhase, JointPhase, Recipe
from bridle.settings import RecipeError

MAKES_ENCODER = (EncoderPhase, JointPhase)
"""Phases that end with an encoder, and so with a model."""


def tokenizer_phase_of(recipe: Recipe, index: int) -> int:
    """Index of the phase whose tokenizer gives the encoder of phase `index` its targets: itself, where it is joint."""
    if isinstance(recipe.phases[index], JointPhase):
        return index
    return max(i for i in range(index) if not isinstance(recipe.phases[i], EncoderPhase))


def encoder_before(recipe: Recipe, index: int) -> int | None:
    """Index of the last phase before `index` that ends with an encoder."""
    found = [i for i in range(index) if isinstance(recipe.phases[i], MAKES_ENCODER)]
    return found[-1] if found else None


def tokenizer_before(recipe: Recipe, index: int) -> int | None:
    """Index of the last phase before `index` that ends with a learned tokenizer."""
    found = [i for i in range(index) if not isinstance(recipe.phases[i], ColdStartPhase | EncoderPhase)]
    return found[-1] if found else None


def cold_start_of(recipe: Recipe) -> int:
    """Index of the cold start, with which every recipe begins."""
    return next(i for i, phase in enumerate(recipe.phases) if isinstance(phase, ColdStartPhase))


def iteration_of(recipe: Recipe, index: int) -> int:
    """Number of the model that phase `index` ends with, from 1."""
    return sum(isinstance(phase, MAKES_ENCODER) for phase in recipe.phases[: index + 1])


def last_model(recipe: Recipe) -> int:
    """Index of the phase that ends with the final model; -1 where none does."""
    return max((i for i, phase in enumerate(recipe.phases) if isinstance(phase, MAKES_ENCODER)), default=-1)


def check_joint(recipe: Recipe, ds_config: Mapping[str, Any]) -> None:
    """A joint phase's teacher follows whole weights, and its tokenizer rests by parameter group.

    Raises:
        RecipeError: a joint phase with ZeRO stage 3, which holds neither.
    """
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    for index, phase in enumerate(recipe.phases):
        if stage == 3 and isinstance(phase, JointPhase):
            raise RecipeError(f"phases.{index}: kind joint does not work with ZeRO stage 3; take ds_configs/zero2.json")
