"""Recipe files: YAML that ships with the package or is a user's own, with ``dotted.key=value`` overrides."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from bridle.settings import RecipeError, apply_override, nearest

RUN_RECIPE = "recipe.yaml"
"""Name in a run folder."""


def shipped_recipes(below: str = "") -> list[str]:
    """Names of the recipes inside the package; below: `finetune` for those of fine-tuning."""
    folder = resources.files("bridle") / "recipes" / below
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_recipe_file(name: str, overrides: Iterable[str] = (), below: str = "") -> dict[str, Any]:
    """A shipped recipe by name (below: see `shipped_recipes`) or a YAML file by path, with overrides applied.

    Raises:
        RecipeError: unknown recipe, malformed YAML or override.
    """
    raw = _read(name, below)
    for override in overrides:
        apply_override(raw, override)
    return raw


def _read(name: str, below: str) -> dict[str, Any]:
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            known = ", ".join(shipped_recipes(below))
            raise RecipeError(f"recipe {name}: no such file; give a path to a YAML file or one of: {known}")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"recipe {name}: not a text in UTF-8 ({error.reason} at byte {error.start})") from None
    elif name in shipped_recipes(below):
        text = (resources.files("bridle") / "recipes" / below / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise RecipeError(f"recipe '{name}' is unknown{nearest(name, shipped_recipes(below))} (or give a FILE.yaml)")
    return parse_recipe(text, f"recipe {name}")


def parse_recipe(text: str, where: str) -> dict[str, Any]:
    """A recipe's text as plain data.

    Raises:
        RecipeError: malformed YAML, or no mapping.
    """
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: found {type(raw).__name__}, expected a mapping of settings")
    return raw


def read_run_recipe_file(run: Path) -> tuple[dict[str, Any], str]:
    """The recipe that a run folder was started with, as plain data and as text.

    Raises:
        RecipeError: no run there, or its recipe is malformed.
    """
    path = run / RUN_RECIPE
    if not path.is_file():
        raise no_run(run)
    text = path.read_text(encoding="utf-8", errors="replace")
    return parse_recipe(text, str(path)), text


def no_run(run: Path | str) -> RecipeError:
    """What to say of a place that is no run folder."""
    return RecipeError(f"{run}: no {RUN_RECIPE} there; give a run folder, such as runs/audio-mini")
