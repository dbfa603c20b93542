"""Whether a recipe's parts fit the clips that its modality gives: found before anything starts."""

from __future__ import annotations

from bridle.config import MaskSettings, Recipe
from bridle.modeling.masking import hidden_count
from bridle.modeling.positions import least_width
from bridle.settings import RecipeError


def check_recipe(recipe: Recipe, grid: tuple[int, ...]) -> None:
    """grid: patches along each axis of a clip.

    Raises:
        RecipeError: a mask or a decoder that knows no such grid, or a width without room for its positions.
    """
    check_mask(recipe.mask, grid)
    model = recipe.model
    if model.decoder.kind == "swin" and len(grid) != 2:
        raise RecipeError(
            f"model.decoder.kind swin needs clips with a grid of two axes; this one is {grid}: take kind transformer"
        )
    check_width(model.encoder.width, grid, "model.encoder.width")
    check_width(model.decoder.width, grid, "model.decoder.width")


def check_width(width: int, grid: tuple[int, ...], field: str) -> None:
    """Raises RecipeError, which names the recipe's field, where a grid's positions do not fit a width."""
    if width < least_width(grid):
        raise RecipeError(f"{field} = {width}: expected {least_width(grid)} or more, for positions on {len(grid)} axes")


def check_mask(mask: MaskSettings, grid: tuple[int, ...], below: str = "") -> None:
    """below: what stands before ``mask`` in the recipe, with a dot.

    Raises:
        RecipeError: its kind or its ratio does not fit a grid.
    """
    try:
        hidden_count(mask, grid)
    except ValueError as error:
        raise RecipeError(f"{below}{error}") from None
