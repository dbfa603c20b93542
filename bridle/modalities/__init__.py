"""One file per modality: decode, features, augmentation, default geometry. Nothing here knows where bytes came from."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, cast

from bridle.modalities.clip import Limits, Modality
from bridle.settings import RecipeError, nearest, parse_settings

REGISTRY = {
    "audio": "bridle.modalities.audio:Audio",
    "image": "bridle.modalities.image:Image",
    "video": "bridle.modalities.video:Video",
}
"""A modality's name, and where it stands. Imported on use, so that a decoder is only needed by those who use it."""


def modality_class(name: str) -> type[Modality]:
    """The class registered under `name`.

    Raises:
        RecipeError: no such modality.
    """
    if name not in REGISTRY:
        raise RecipeError(f"modality '{name}' is unknown{nearest(name, REGISTRY)}")
    module, _, attribute = REGISTRY[name].partition(":")
    return cast(type[Modality], getattr(importlib.import_module(module), attribute))


def build_modality(name: str, settings: Mapping[str, Any], limits: Limits | None = None, raw: bool = False) -> Modality:
    """A modality with checked settings (a recipe's `clip` section); raw: see `Modality`.

    Raises:
        RecipeError: no such modality, an unknown key, a wrong value.
    """
    cls = modality_class(name)
    parsed = parse_settings(cls.settings_class, settings, f"clip settings of modality {name}")
    return cls(parsed, limits or Limits(), raw)  # type: ignore[call-arg]
